"""Losses and advantages against torch's own functions and autograd, and hand-worked cases."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bridge.contract import GRPO, SFT, Batch
from bridge.decoding.inputs import check_batch
from bridge.errors import BridgeError
from bridge_ref.losses import group_advantages, loss, target_logprobs

SEEDS = st.integers(0, 2**32 - 1)
B, S, V = 3, 4, 6


def case(seed):
    """Logits, and a batch with -100 and NaN wherever nothing should be read."""
    rng = np.random.default_rng(seed)
    mask = rng.random((B, S)) < 0.6
    mask[0, 0] = True
    batch = Batch(
        tokens=rng.integers(0, V, (B, S)),
        groups=np.zeros(B, np.int64),
        active=np.ones((B, S), bool),
        targets=np.where(mask, rng.integers(0, V, (B, S)), -100),
        target_mask=mask,
        advantages=rng.normal(size=B),
        old_logprobs=np.where(mask, rng.normal(-1.8, 0.5, (B, S)), np.nan),
        ref_logprobs=np.where(mask, rng.normal(-1.8, 0.5, (B, S)), np.nan),
    )
    return 0.5 * rng.normal(size=(B, S, V)), batch


@given(SEEDS)
def test_sft_is_torchs_cross_entropy(seed):
    logits, batch = case(seed)
    z = torch.tensor(logits, requires_grad=True)
    want = torch.nn.functional.cross_entropy(
        z.flatten(0, 1), torch.tensor(batch.targets).flatten(), ignore_index=-100
    )
    want.backward()
    metrics, dlogits = loss(SFT(), logits, batch)
    assert metrics == {
        "loss": pytest.approx(want.item(), rel=1e-13),
        "tokens": pytest.approx(batch.target_mask.sum()),
    }
    np.testing.assert_allclose(dlogits, z.grad, rtol=1e-12, atol=1e-15)


@given(SEEDS, st.sampled_from([GRPO(), GRPO(0.1, 0.4), GRPO(0.2, 0.28, 0.3, 0.7)]))
def test_grpo_is_torchs_autograd_of_the_formula(seed, objective):
    logits, batch = case(seed)
    at = torch.tensor(batch.target_mask)
    z = torch.tensor(logits, requires_grad=True)
    policy = torch.distributions.Categorical(logits=z[at] / objective.temperature)
    lp = policy.log_prob(torch.tensor(batch.targets)[at])
    old, ref = (torch.tensor(x)[at] for x in (batch.old_logprobs, batch.ref_logprobs))
    A = torch.tensor(batch.advantages)[:, None].expand(B, S)[at]
    rho = (lp - old).exp()
    clipped = rho.clamp(1 - objective.eps_low, 1 + objective.eps_high)
    kl = (ref - lp).exp() - (ref - lp) - 1
    want = -(torch.minimum(rho * A, clipped * A) - objective.beta * kl).sum() / at.sum()
    want.backward()
    metrics, dlogits = loss(objective, logits, batch)
    np.testing.assert_allclose(dlogits, z.grad, rtol=1e-11, atol=1e-14)
    entropy = policy.entropy().mean()
    beyond = ((rho > 1 + objective.eps_high) & (A > 0)) | ((rho < 1 - objective.eps_low) & (A < 0))
    assert metrics == pytest.approx(
        {
            "loss": want.item(),
            "tokens": at.sum().item(),
            "clip_fraction": beyond.double().mean().item(),
            "entropy": entropy.item(),
            "kl": kl.mean().item(),
        },
        rel=1e-11,
        abs=1e-13,
    )


@given(SEEDS, st.floats(0.2, 3))
def test_log_probabilities_are_torchs_at_the_temperature(seed, temperature):
    logits, batch = case(seed)
    policy = torch.distributions.Categorical(logits=torch.tensor(logits) / temperature)
    want = policy.log_prob(torch.tensor(np.where(batch.target_mask, batch.targets, 0)))
    got = target_logprobs(logits, batch, temperature)
    np.testing.assert_allclose(got, np.where(batch.target_mask, want, 0), rtol=1e-12, atol=1e-14)


def test_without_a_temperature_there_is_nothing_to_train():
    with pytest.raises(BridgeError, match="temperature must be above 0 to train, not 0"):
        check_batch(case(0)[1], GRPO(temperature=0.0), V)


def test_grpo_on_policy_worked_by_hand():
    # One target a row, uniform over 2 tokens: loss = -(1 + -3) / 2; dlp = -A / 2.
    batch = Batch(
        tokens=np.zeros((2, 1), np.int64),
        groups=np.zeros(2, np.int64),
        active=np.ones((2, 1), bool),
        targets=np.array([[0], [1]]),
        target_mask=np.ones((2, 1), bool),
        advantages=np.array([1.0, -3.0]),
    )
    metrics, dlogits = loss(GRPO(), np.zeros((2, 1, 2)), batch)
    assert metrics["loss"] == 1 and metrics["clip_fraction"] == 0
    assert metrics["entropy"] == pytest.approx(np.log(2))
    np.testing.assert_allclose(dlogits[:, 0], [[-0.25, 0.25], [-0.75, 0.75]])


def test_advantages_worked_by_hand():
    rewards = np.array([1.0, 5.0, 0.0, 5.0, 3.0, 5.0])
    groups = np.array([7, 2, 7, 2, 9, 2])
    # Group 7: mean 1/2, population std 1/2. Group 2: equal rewards. Group 9: one row.
    assert group_advantages(rewards, groups).tolist() == [1, 0, -1, 0, 0, 0]
    assert group_advantages(rewards, groups, False).tolist() == [0.5, 0, -0.5, 0, 0, 0]


@given(SEEDS, st.integers(2, 9), st.sampled_from([0.1, 1e-6, 1e6]))
def test_advantages_are_standard_scores_of_any_scale(seed, n, scale):
    rewards = np.random.default_rng(seed).normal(size=n)
    groups = np.zeros(n, np.int64)
    a = group_advantages(rewards, groups)
    np.testing.assert_allclose([a.mean(), a.std()], [0, 1], atol=1e-12)
    np.testing.assert_allclose(group_advantages(scale * rewards + 3, groups), a, rtol=1e-6)
    assert (group_advantages(np.full(n, 0.1), groups) == 0).all()  # no rounding of the mean shows


WRONG = {
    "batch.targets is": {"targets": np.zeros((B, S + 1), int)},
    "batch.old_logprobs is": {"old_logprobs": np.zeros(B)},
    "batch.groups is": {"groups": np.zeros(B + 1, int)},
    "batch.advantages is [4]": {"advantages": np.zeros(4)},
    "batch.active must be bool": {"active": np.ones((B, S), int)},
    "no target token": {"target_mask": np.zeros((B, S), bool)},
    "active is false": {"active": np.zeros((B, S), bool)},
    "batch.tokens has an id outside 0..5": {"tokens": np.full((B, S), V)},
    "batch.targets has an id outside 0..5": {"targets": np.full((B, S), -100)},
    "batch.advantages is missing": {"advantages": None},
    "batch.ref_logprobs is missing": {"ref_logprobs": None},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_batch_that_cannot_be_learned_from_is_refused(message):
    _, batch = case(0)
    check_batch(batch, GRPO(beta=0.1), V)
    with pytest.raises(BridgeError) as error:
        check_batch(replace(batch, **WRONG[message]), GRPO(beta=0.1), V)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_sft_asks_for_no_advantages():
    check_batch(replace(case(0)[1], advantages=None, ref_logprobs=None), SFT(), V)
