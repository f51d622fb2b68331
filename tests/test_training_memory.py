"""The memory that `--dry-run` foretells, against what steps take, and of hosts too large to run."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bridge.config import LoraConfig, lora_names, parse_config, tensor_shapes
from bridge.training.memory import Load, first_to_lower, peak

SCRIPT = Path(__file__).with_name("training_peaks.py")
QWEN = {
    "model_type": "qwen2",
    "vocab_size": 151_936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's peak from /proc")
def test_what_is_foretold_is_what_steps_take():
    asked = ["blocks", "vocabulary"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *asked], capture_output=True, text=True, check=True
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["case"] for line in found] == asked
    for line in found:
        assert abs(line["foretold"] / line["measured"] - 1) < 0.15, line


def test_a_host_of_15_billion_parameters_by_hand():
    config = parse_config(QWEN)
    names = list(tensor_shapes(config))
    load = Load(cells=4096, alone=2048, targets=2048)
    found = peak(config, "bfloat16", names, load)
    parameters = 1_777_088_000
    assert found.kept["weights"] == 2 * parameters
    assert found.kept["masters"] == 4 * parameters and found.kept["moments"] == 8 * parameters
    assert found.update["gradients"] in (4 * parameters, 4 * 151_936 * 1536)
    kept = 4 * 1536 + 3 * 8960 + 2 * 128 * (12 + 2)  # of a cell and layer, with all trained
    again = peak(config, "bfloat16", names, Load(4096, 2048, 2048, loss_chunk=2048))
    assert again.update["logits"] == 2048 * 151_936 * (4 + 4 + 2)
    assert again.update["activations"] == 2 * 4096 * (28 * kept + 3 * 1536)
    less = peak(config, "bfloat16", names, Load(4096, 2048, 2048, checkpoint_activations=True))
    assert less.total < found.total and less.update["gradients"] == 4 * parameters


def test_what_is_to_be_lowered_first():
    config = parse_config(QWEN)
    lora = parse_config(QWEN)
    object.__setattr__(lora, "lora", LoraConfig(16, 32.0))

    def first(config, names, load, dtype="bfloat16"):
        host = not all(".lora_" in name for name in names)
        return first_to_lower(peak(config, dtype, names, load).parts, dtype, load, host)

    everything, updates = list(tensor_shapes(config)), lora_names(lora)
    assert first(config, everything, Load(512, 256, 256)) == "trainable = bridge"
    long = Load(16_384, 8192, 8192)
    assert first(lora, updates, long) == "checkpoint_activations = true"
    wide = replace(long, checkpoint_activations=True, loss_chunk=8192)
    assert first(lora, updates, wide) == "loss_chunk"
    decoded = Load(512, 256, 256, prompts=(512,) * 64, width=8, new_tokens=2048)
    assert first(lora, updates, decoded) == "max_rows"
    assert first(lora, updates, Load(512, 256, 256), "float32") == "dtype = bfloat16"
