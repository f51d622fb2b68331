"""Low-rank updates that do something, beside a checkpoint: for tests of what reads or keeps any."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from bridge.checkpoints.reading import open_checkpoint
from bridge.checkpoints.safetensors_io import specs_of
from bridge.checkpoints.writing import write_lora
from bridge.config import LoraConfig, lora_names, tensor_shapes

SOME = LoraConfig(2, 5.0, ("q_proj", "o_proj", "down_proj"))


def add_lora(path: Path, lora: LoraConfig = SOME, seed: int = 1) -> Path:
    """Put random updates, float32, into the checkpoint directory `path`."""
    config = replace(open_checkpoint(path).config, lora=lora)
    rng, shapes = np.random.default_rng(seed), tensor_shapes(config)
    tensors = {n: rng.normal(scale=0.3, size=shapes[n]).astype("f4") for n in lora_names(config)}
    write_lora(path, lora, specs_of(tensors), iter(tensors.items()))
    return path
