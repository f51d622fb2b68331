"""A real model: SmolLM2-135M in the JAX backend is SmolLM2-135M in torch, with blocks that mix."""

import numpy as np
import pytest

import bridge
from bridge.checkpoints.initialise import init
from bridge.checkpoints.reading import open_checkpoint
from bridge_jax.backend import JaxBackend
from bridge_torch.backend import TorchBackend

QUESTION = "There are 5 bags with 8 marbles in each bag. How many marbles are there in total?"


@pytest.fixture(scope="module")
def checkpoint(smollm2, tmp_path_factory):
    out = tmp_path_factory.mktemp("jax") / "bridge"
    init(smollm2, out, heads=4, head_dim=32)
    return out


@pytest.fixture(scope="module")
def stirred(checkpoint):
    """The config, and the tensors with output projections that are not zero."""
    opened, rng = open_checkpoint(checkpoint), np.random.default_rng(0)
    tensors = dict(opened.tensors)
    for name, array in tensors.items():
        if name.endswith("bridge.o_proj.weight"):
            tensors[name] = rng.normal(0, 0.02, array.shape).astype(np.float32)
    return opened.config, tensors


def in_backend(backend, stirred, dtype="float32"):
    config, tensors = stirred
    return bridge.Model(backend.load(config, tensors, device="cpu", dtype=dtype), backend.name)


def test_logits_are_torchs_within_float32_rounding(stirred):
    """Our error against torch in float64 is no more than torch's in float32, up to a factor."""
    rng = np.random.default_rng(0)
    tokens, groups = rng.integers(0, 49152, size=(3, 24)), [0, 0, 1]
    exact, theirs, ours = (
        in_backend(backend, stirred, dtype).logits(tokens, groups=groups)
        for backend, dtype in (
            (TorchBackend(), "float64"),
            (TorchBackend(), "float32"),
            (JaxBackend(), "float32"),
        )
    )
    their_error = np.abs(theirs - exact).max()
    assert np.abs(ours - exact).max() <= 4 * their_error
    assert their_error < 1e-3 * np.abs(exact).max()


@pytest.mark.slow  # draws of the real model are compared in test_agreement
def test_a_greedy_continuation_is_torchs(checkpoint, stirred):
    ids = bridge.load(checkpoint, backend="torch").tokenizer.encode_chat(
        [{"role": "user", "content": QUESTION}]
    )
    answers = [
        in_backend(backend, stirred).generate(
            [ids, ids[:-3]], width=[3, 2], max_new_tokens=48, temperature=0
        )
        for backend in (TorchBackend(), JaxBackend())
    ]
    theirs, ours = ([r.tokens for s in sets for r in s.responses] for sets in answers)
    assert ours == theirs and len(ours) == 5 and len(ours[0]) >= 8
