"""Clipping and AdamW against torch's, and the reference trainer as a whole (clauses 7.7 to 7.9)."""

import math
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bridge.config import bridge_shapes, parse_config, tensor_shapes
from bridge.contract import GRPO, SFT, AdamW, Batch
from bridge.errors import BridgeError
from bridge_ref.backend import Reference
from bridge_ref.optim import AdamWState, clip_by_global_norm

SEEDS = st.integers(0, 2**32 - 1)
SHAPES = {"a": (3, 4), "b": (5,), "c": (1, 2)}


def random_tensors(rng, scale=1.0):
    return {name: scale * rng.normal(size=shape) for name, shape in SHAPES.items()}


@given(SEEDS, st.sampled_from([0.01, 1.0, 100.0, None]))
def test_clipping_is_torchs(seed, max_norm):
    grads = random_tensors(np.random.default_rng(seed))
    parameters = [torch.nn.Parameter(torch.tensor(g)) for g in grads.values()]
    for parameter, g in zip(parameters, grads.values(), strict=True):
        parameter.grad = torch.tensor(g)
    limit = math.inf if max_norm is None else max_norm
    want_norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    got, norm = clip_by_global_norm(grads, max_norm)
    assert norm == pytest.approx(want_norm.item(), rel=1e-13)
    for parameter, g in zip(parameters, got.values(), strict=True):
        np.testing.assert_allclose(g, parameter.grad, rtol=1e-13)


@given(
    SEEDS,
    st.sampled_from([1e-4, 0.1]),
    st.sampled_from([(0.9, 0.999), (0.0, 0.5), (0.5, 0.95)]),
    st.sampled_from([1e-8, 1e-2]),
    st.sampled_from([0.0, 0.1]),
)
def test_adamw_is_torchs(seed, lr, betas, eps, weight_decay):
    rng = np.random.default_rng(seed)
    weights, options = random_tensors(rng), AdamW(lr, betas, eps, weight_decay)
    parameters = [torch.nn.Parameter(torch.tensor(w)) for w in weights.values()]
    reference = torch.optim.AdamW(parameters, lr, betas, eps, weight_decay)
    state = AdamWState(weights)
    for _ in range(5):
        grads = random_tensors(rng, 10.0 ** rng.integers(-6, 3))
        for parameter, g in zip(parameters, grads.values(), strict=True):
            parameter.grad = torch.tensor(g)
        reference.step()
        state.update(grads, options)
    for parameter, w in zip(parameters, state.master.values(), strict=True):
        np.testing.assert_allclose(w, parameter.detach(), rtol=1e-12, atol=1e-14)


CONFIG = parse_config(
    {
        "model_type": "llama",
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
        "tie_word_embeddings": True,
        "bridge": {
            "spec_version": "1.0",
            "kind": "attention",
            "num_heads": 2,
            "head_dim": 3,
            "layers": [0, 1],
            "norm_eps": 1e-6,
        },
    }
)
BRIDGE = [name for i in range(2) for name in bridge_shapes(CONFIG, i)]


def model(dtype="float64"):
    rng = np.random.default_rng(0)
    tensors = {name: 0.4 * rng.normal(size=shape) for name, shape in tensor_shapes(CONFIG).items()}
    return Reference().load(CONFIG, tensors, device="cpu", dtype=dtype)


def batch():
    """Four rows of two groups, of different lengths; each cell's target is the next token."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 11, (4, 7))
    active = np.arange(6) < np.array([6, 4, 5, 6])[:, None]
    return Batch(
        tokens=tokens[:, :-1],
        groups=np.array([0, 0, 1, 1]),
        active=active,
        targets=tokens[:, 1:],
        target_mask=active & (np.arange(6) >= 2),
        advantages=np.array([1.0, -1.0, 0.5, -0.5]),
    )


def target_logprobs(model, batch):
    positions = np.maximum(np.cumsum(batch.active, axis=1) - 1, 0)
    logits = model.logits(batch.tokens, batch.groups, batch.active, positions)
    picked = np.take_along_axis(logits, batch.targets[:, :, None], axis=-1)[:, :, 0]
    return picked - np.log(np.exp(logits).sum(axis=-1))


@pytest.mark.parametrize("objective", [SFT(), GRPO(0.9, 9.0)], ids=["sft", "grpo"])
def test_training_lowers_the_loss_and_touches_only_what_is_trainable(objective):
    trained = model()
    before = dict(trained.tensors())
    trainer = trained.trainer(objective, AdamW(lr=0.02), BRIDGE)
    at_start = replace(batch(), old_logprobs=target_logprobs(trained, batch()))
    losses = [trainer.step(at_start)["loss"] for _ in range(30)]
    assert losses[-1] < losses[0] - 0.3
    for name, array in trained.tensors():
        assert np.array_equal(array, before[name]) == (name not in BRIDGE), name


def test_grad_norm_is_that_before_clipping():
    trained = model()
    _, grads = trained.loss_and_grads(batch(), SFT(), BRIDGE)
    metrics = trained.trainer(SFT(), AdamW(max_grad_norm=1e-3), BRIDGE).step(batch())
    want = math.sqrt(sum((g**2).sum() for g in grads.values()))
    assert metrics["grad_norm"] == pytest.approx(want, rel=1e-13)
    assert metrics["tokens"] == batch().target_mask.sum()


def test_a_restored_trainer_goes_on_bit_for_bit():
    straight, first, second = model("bfloat16"), model("bfloat16"), model("bfloat16")
    options = AdamW(lr=0.01, weight_decay=0.1)
    through = straight.trainer(SFT(), options, BRIDGE)
    for _ in range(6):
        through.step(batch())
    early = first.trainer(SFT(), options, BRIDGE)
    for _ in range(3):
        early.step(batch())
    late = second.trainer(SFT(), options, BRIDGE)
    late.restore(early.state())
    for _ in range(3):
        late.step(batch())
    for (name, want), (_, got) in zip(straight.tensors(), second.tensors(), strict=True):
        assert want.tobytes() == got.tobytes(), name
    for name, want in through.state().items():
        np.testing.assert_array_equal(late.state()[name], want)


def test_masters_keep_what_bfloat16_rounds_away():
    trained = model("bfloat16")
    name = "model.layers.0.bridge.norm.weight"
    trainer = trained.trainer(SFT(), AdamW(lr=1e-5), [name])
    start = dict(trained.tensors())[name]
    trainer.step(batch())
    once = trainer.state()[f"master.{name}"]
    assert once.dtype == np.float32 and (once != start.astype(np.float32)).all()
    assert dict(trained.tensors())[name].dtype == ml_dtypes.bfloat16
    for _ in range(400):
        trainer.step(batch())
    assert (dict(trained.tensors())[name] != start).any()


def test_what_cannot_be_restored_is_refused_and_changes_nothing():
    trainer = model().trainer(SFT(), AdamW(), BRIDGE)
    trainer.step(batch())
    good = trainer.state()
    lacking = {name: a for name, a in good.items() if not name.startswith("exp_avg_sq")}
    misshapen = good | {f"master.{BRIDGE[-1]}": np.zeros(3)}
    for bad in (lacking, misshapen, good | {"master.lm_head.weight": np.zeros(3)}):
        with pytest.raises(BridgeError, match="trainer state: "):
            trainer.restore(bad)
    for name, array in trainer.state().items():
        np.testing.assert_array_equal(array, good[name])


def test_an_unknown_tensor_cannot_be_trained():
    with pytest.raises(BridgeError, match=r"no tensor is named 'lm_head\.weight'"):
        model().trainer(SFT(), AdamW(), ["lm_head.weight"])
    with pytest.raises(BridgeError, match=r"no tensor is named 'lm_head\.weight'"):
        model().loss_and_grads(batch(), SFT(), ["lm_head.weight"])
