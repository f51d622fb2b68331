"""Measures the memory of training steps in a process of its own, and prints what was foretold.

    python training_peaks.py CASE...

Prints a line of JSON a case: the bytes foretold, and those that two steps of torch on the CPU took
at most. glibc is told to give memory back at once, or what is free would be measured too.
"""

import ctypes
import gc
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

M_MMAP_THRESHOLD = -3
ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 1 << 16)

from bridge.config import parse_config, tensor_shapes  # noqa: E402
from bridge.contract import SFT, AdamW  # noqa: E402
from bridge.model import trainable_names  # noqa: E402
from bridge.registry import find_backend  # noqa: E402
from bridge.training.batches import Group, count_cells, make_batch  # noqa: E402
from bridge.training.memory import Load, peak  # noqa: E402

SMALL = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 97}
WIDE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "vocab_size": 2000}
CASES: dict[str, tuple[dict[str, int], str, dict[str, Any]]] = {
    "all": (WIDE, "all", {}),
    "blocks": (WIDE, "bridge", {}),
    "checkpointed": (WIDE, "all", {"checkpoint_activations": True}),
    "vocabulary": ({**WIDE, "num_hidden_layers": 2, "vocab_size": 40_000}, "all", {}),
}


def measure(sizes: dict[str, int], trainable: str, options: dict[str, Any]) -> tuple[int, int]:
    """Bytes foretold and measured."""
    D, layers = sizes["hidden_size"], sizes["num_hidden_layers"]
    blocks = {"spec_version": "1.0", "kind": "attention", "num_heads": 4, "head_dim": D // 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    bridge = {**blocks, "layers": list(range(1, layers)), "norm_eps": 1e-6}
    raw = {"model_type": "llama", **sizes, **heads, "max_position_embeddings": 512}
    config, rng = parse_config({**raw, "bridge": bridge}), np.random.default_rng(0)
    shapes = tensor_shapes(config)
    tensors = {n: rng.normal(scale=0.02, size=s).astype(np.float32) for n, s in shapes.items()}
    model = find_backend("torch").load(config, tensors, device="cpu", dtype="float32")
    del tensors
    names = trainable_names(config, trainable)
    groups = [Group([g] * 96, [[row] * 64 for row in range(8)]) for g in range(2)]
    load = Load(count_cells(groups), 16 * 63, 16 * 64, **options)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is what there is now
    before = _status("VmRSS")
    trainer = model.trainer(SFT(), AdamW(), names, **options)
    for _ in range(2):
        trainer.step(make_batch(groups))
    weights = 4 * sum(int(np.prod(shape)) for shape in shapes.values())
    foretold = peak(config, "float32", names, load).total
    return foretold, _status("VmHWM") - before + weights


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    measure(SMALL, "all", {})  # what a first step loads is not of the second
    for case in sys.argv[1:]:
        foretold, measured = measure(*CASES[case])
        print(json.dumps({"case": case, "foretold": foretold, "measured": measured}))
