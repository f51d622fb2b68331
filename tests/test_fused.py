"""The fused decoding step gives the plain one's numbers, and its absence is no error.

Conformance runs it on small models of every family; here are the widths of head that it has code of
its own for, and what its compiling depends on.
"""

from contextlib import nullcontext
from unittest.mock import patch

import numpy as np
import pytest
import torch

from bridge.config import parse_config
from bridge_conformance.cases import random_tensors
from bridge_torch import fused, narrow
from bridge_torch.backend import TorchBackend
from bridge_torch.decode import step as plain_step

pytestmark = pytest.mark.usefixtures("one_thread")
needs_compiler = pytest.mark.skipif(fused.kernels() is None, reason="no C compiler here")


def load(head_dim, dtype="float32"):
    config = parse_config(
        {
            "model_type": "qwen3",
            "vocab_size": 40,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": head_dim,
            "max_position_embeddings": 128,
            "tie_word_embeddings": False,
            "bridge": {
                "spec_version": "1.0",
                "kind": "attention",
                "num_heads": 2,
                "head_dim": head_dim,
                "layers": [0, 1],
                "norm_eps": 1e-6,
            },
        }
    )
    tensors = random_tensors(config, 0, "float32")
    return TorchBackend().load(config, tensors, device="cpu", dtype=dtype)


def prefill(model, prompts, widths, plain):
    """A decoder by the plain step or by the one that serves."""
    with patch.object(fused, "serves", lambda *_: False) if plain else nullcontext():
        return model.prefill(prompts, widths, 8)


def decode(model, plain=False):
    """Logits of seven steps; every other row leaves at the fifth."""
    decoder = prefill(model, [np.arange(5), np.arange(2), np.arange(9)], [3, 1, 4], plain)
    logits = []
    for step in range(7):
        rows = len(decoder.cache.rows)
        keep = np.arange(rows) % 2 == 0 if step == 4 else np.ones(rows, bool)
        decoder.advance((np.arange(rows) * 7 + step) % 40, keep)
        logits.append(decoder.logits())
    return np.concatenate(logits)


@needs_compiler
@pytest.mark.parametrize("head_dim", [6, 32, 48, 64, 128])
def test_it_is_as_near_to_float64_as_the_plain_step(head_dim):
    model = load(head_dim)
    exact = decode(load(head_dim, "float64"))
    own = np.abs(decode(model, plain=True) - exact).max()
    assert model.prefill([np.arange(3)], [1], 2).forward is fused.step
    # Clause 10.2's allowance, with the plain step as the one whose error is measured.
    allowed = 4 * max(own, 8 * np.finfo(np.float32).eps * np.abs(exact).max())
    assert np.abs(decode(model) - exact).max() <= allowed


@needs_compiler
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_it_serves_what_float32_is_no_coarser_than(dtype):
    """Models in 16 bits decode by it too, with float32 activations; in float64 none do."""
    forward = load(16, dtype).prefill([np.arange(3)], [1], 2).forward
    held = narrow.multiplies(torch.bfloat16) if dtype == "bfloat16" else False
    wide = dtype != "float64" and (held or narrow.can_hold_half())
    assert forward is (fused.step if wide else plain_step)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As on a machine where it was never compiled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(fused, "kernels", fused.kernels.__wrapped__)
    return tmp_path / "bridge"


@needs_compiler
def test_it_is_compiled_once(fresh):
    assert fused.kernels() is not None
    (made,) = fresh.iterdir()
    stamp = made.stat().st_mtime_ns
    assert fused.kernels() is not None
    assert [path.stat().st_mtime_ns for path in fresh.iterdir()] == [stamp]


@pytest.mark.parametrize(
    "variables",
    [{"BRIDGE_TORCH_FUSED": "0"}, {"CC": "no-such-compiler"}, {"CC": "false"}],
    ids=["switched off", "no compiler", "a compiler that fails"],
)
def test_without_it_the_plain_step_decodes(fresh, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    model = load(16)
    assert model.prefill([np.arange(3)], [1], 2).forward is plain_step
    assert np.isfinite(decode(model)).all()
    assert not fresh.exists() or not list(fresh.iterdir())


def test_a_cache_that_cannot_be_written_is_no_error(fresh, monkeypatch):
    fresh.parent.joinpath("bridge").write_text("in the way")
    assert fused.kernels() is None
