"""The gradient of whole losses through whole models, by the complex step and by differences.

Models and batches are drawn by the conformance strategies: every family, kind of block, tied and
untied embeddings, biases, q/k norm, windows, rope types, ragged activity, several groups, low-rank
updates.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from bridge.config import tensor_shapes
from bridge.contract import GRPO, SFT, Batch
from bridge_conformance import strategies
from bridge_ref.losses import loss
from bridge_ref.model import forward, head_backward, layer_backward
from bridge_ref.precision import DTYPES
from bridge_ref.train import loss_and_grads

OBJECTIVES = [SFT(), GRPO(0.2, 0.28, 0.05), GRPO(0.1, 0.3)]
CASES = strategies.rows_cases()
UPDATED = strategies.lora_cases().map(lambda case: case.rows)
SEEDS = st.integers(0, 2**32 - 1)


def batch_of(case, seed):
    """A batch to learn from, its ratios well away from the edges of the clip."""
    rng = np.random.default_rng(seed)
    V = case.model.config.vocab_size
    target_mask = case.active & (rng.random(case.active.shape) < 0.7)
    assume(target_mask.any())
    batch = Batch(
        case.tokens,
        case.groups,
        case.active,
        np.where(target_mask, rng.integers(0, V, case.tokens.shape), -100),
        target_mask,
        case.positions,
        rng.normal(size=len(case.groups)),
    )
    tensors = case.model.tensors("float64")
    logits, _ = forward(case.model.config, tensors, *case.arguments)
    z = logits - logits.max(-1, keepdims=True)
    logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
    lp = np.take_along_axis(logp, np.maximum(batch.targets, 0)[..., None], -1)[..., 0]
    shift = rng.choice([-0.7, -0.02, 0.02, 0.7], lp.shape)
    old, ref = lp + shift, lp + 0.3 * rng.normal(size=lp.shape)
    old, ref = (np.where(target_mask, x, np.nan) for x in (old, ref))
    return replace(batch, old_logprobs=old, ref_logprobs=ref)


def value(case, tensors, batch, objective):
    logits, _ = forward(case.model.config, tensors, *case.arguments)
    return loss(objective, logits, batch)[0]["loss"]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=["sft", "grpo with kl", "grpo"])
@given(case=CASES | UPDATED, seed=SEEDS)
def test_every_tensor_has_the_right_gradient(objective, case, seed):
    batch, tensors = batch_of(case, seed), case.model.tensors("float64")
    names = list(tensor_shapes(case.model.config))
    metrics, grads = loss_and_grads(case.model.config, tensors, batch, objective, names)
    assert list(grads) == names
    assert metrics["loss"] == value(case, tensors, batch, objective)
    rng = np.random.default_rng(seed)
    directions = {name: rng.normal(size=tensors[name].shape) for name in names}
    complexes = {name: tensors[name] + 0j for name in names}
    scale = max(np.abs(grad).max() for grad in grads.values())
    for name in names:
        direction, grad = directions[name], grads[name]
        moved = complexes | {name: tensors[name] + 1e-30j * direction}
        got = value(case, moved, batch, objective).imag / 1e-30
        assert grad.shape == direction.shape
        assert abs(got - np.sum(grad * direction)) <= 1e-9 * (scale + 1), name
    want = sum(np.sum(grads[n] * directions[n]) for n in names)
    size = sum(np.sum(np.abs(grads[n] * directions[n])) for n in names)
    e = 1e-6 / max(1.0, size) ** 0.5  # where a loss is steep it bends, too
    along = [
        value(case, {n: tensors[n] + step * directions[n] for n in names}, batch, objective)
        for step in (e, -e)
    ]
    assert abs((along[0] - along[1]) / (2 * e) - want) <= 1e-4 * size + 1e-6


@given(case=CASES, seed=SEEDS)
def test_without_old_logprobs_the_ratio_is_one(case, seed):
    batch, tensors = batch_of(case, seed), case.model.tensors("float64")
    names, config = list(tensors), case.model.config
    free = replace(batch, old_logprobs=None)
    metrics, grads = loss_and_grads(config, tensors, free, GRPO(), names)
    logits, _ = forward(config, tensors, *case.arguments)
    picked = np.take_along_axis(logits, np.maximum(batch.targets, 0)[..., None], -1)[..., 0]
    same = picked - np.log(np.exp(logits).sum(-1))
    fixed = replace(batch, old_logprobs=same)
    want_metrics, want = loss_and_grads(config, tensors, fixed, GRPO(), names)
    assert metrics["loss"] == pytest.approx(want_metrics["loss"], abs=1e-12)
    assert metrics["clip_fraction"] == 0
    for name in names:
        np.testing.assert_allclose(grads[name], want[name], rtol=1e-9, atol=1e-12)


@given(case=CASES, seed=SEEDS)
def test_no_gradient_reaches_other_groups_or_inactive_cells(case, seed):
    config = case.model.config
    _, (decoder_cache, head_cache) = forward(config, case.model.tensors("float64"), *case.arguments)
    mine = case.active & (case.groups == case.groups[0])[:, None]
    V = config.vocab_size
    dlogits = np.random.default_rng(seed).normal(size=(*mine.shape, V)) * mine[:, :, None]
    dh, _ = head_backward(config, dlogits, head_cache)
    for i in reversed(range(config.num_hidden_layers)):
        dh, _ = layer_backward(config, i, dh, decoder_cache[1][i])
        assert (dh[~mine] == 0).all(), f"below layer {i}"
    assert (dh[mine] != 0).any() or not mine.any()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@given(case=CASES, seed=SEEDS)
def test_low_precision_gradients_point_the_same_way(dtype, case, seed):
    batch, tensors = batch_of(case, seed), case.model.tensors(dtype)
    exact = {name: a.astype(np.float64) for name, a in tensors.items()}
    config, names = case.model.config, list(tensors)
    _, grads = loss_and_grads(config, tensors, batch, SFT(), names)
    _, wants = loss_and_grads(config, exact, batch, SFT(), names)
    assert {g.dtype for g in grads.values()} == {np.dtype(np.float32)}
    assert all((g == g.astype(DTYPES[dtype])).all() for g in grads.values())
    got, want = (np.concatenate([g[n].ravel() for n in names]) for g in (grads, wants))
    assert np.linalg.norm(got - want) <= 0.2 * np.linalg.norm(want)
