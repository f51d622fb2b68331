"""Losses of teacher-forced logits with their gradients, and advantages (clauses 7.1 to 7.6).

A loss takes logits `[B, S, V]` and a Batch, and gives the loss's gradient with respect to the
logits, and metrics. Only target cells count; what other cells hold is not read. Everything is
computed in the wide dtype of the logits.
"""

import numpy as np
from jaxtyping import Float, Int

from bridge.contract import GRPO, SFT, Batch, Objective
from bridge.errors import BridgeError
from bridge_ref.ops import log_softmax, log_softmax_backward

Metrics = dict[str, float]
EQUAL = 2.0**-46  # 64 times the distance from 1 to the next float64 (clauses 7.6 and 11.7)


def loss(
    objective: Objective,
    logits: Float[np.ndarray, "B S V"],
    batch: Batch,
    count: int | None = None,
) -> tuple[Metrics, Float[np.ndarray, "B S V"]]:
    """The objective's metrics, `loss` and `tokens` among them, and `dlogits`.

    `count` is the number of target tokens that sums are divided by: of the whole update, where the
    batch is one of several (clause 7.10); None: of this batch.
    """
    count = int(batch.target_mask.sum()) if count is None else count
    if isinstance(objective, SFT):
        return sft(logits, batch, count)
    return grpo(logits, batch, objective, count)


def sft(
    logits: Float[np.ndarray, "B S V"], batch: Batch, count: int
) -> tuple[Metrics, Float[np.ndarray, "B S V"]]:
    """Clause 7.4: `loss = -sum over target tokens of log p(target) / count`."""
    logp, cache = log_softmax(logits)
    dlogprob = np.where(batch.target_mask, -1 / count, 0.0)
    value = -np.sum(pick(logp, batch), where=batch.target_mask) / count
    dlogits = log_softmax_backward(pick_backward(dlogprob, logp, batch), cache)
    return {"loss": value.item(), "tokens": float(batch.target_mask.sum())}, dlogits


def grpo(
    logits: Float[np.ndarray, "B S V"], batch: Batch, objective: GRPO, count: int
) -> tuple[Metrics, Float[np.ndarray, "B S V"]]:
    """Clause 7.5, for target tokens with lp = log p(target), old and ref given, A by row:

        rho  = exp(lp - old)
        gain = min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A)
        kl   = exp(ref - lp) - (ref - lp) - 1
        loss = -sum(gain - beta kl) / count

    p is the softmax of the logits divided by the temperature (clause 7.1). Without `old_logprobs`
    old is lp itself, held constant: rho is 1 and has a gradient. Metrics also: `clip_fraction`,
    `entropy` of the policy at target cells, and `kl` where ref is given.
    """
    assert batch.advantages is not None
    mask, (logp, cache) = batch.target_mask, log_softmax(logits / objective.temperature)
    lp = pick(logp, batch)
    A = np.asarray(batch.advantages, lp.dtype)[:, None]
    old = lp if batch.old_logprobs is None else only(mask, batch.old_logprobs, lp.dtype)
    rho = np.exp(np.where(mask, lp - old, 0))
    clipped = np.clip(rho, 1 - objective.eps_low, 1 + objective.eps_high)
    gain = np.minimum(rho * A, clipped * A)
    # Where clipping lowers the gain, the gain no longer depends on rho.
    dlogprob = np.where(rho * A <= clipped * A, rho * A, 0)
    metrics = {
        "clip_fraction": np.sum(rho * A > clipped * A, where=mask).item() / count,
        "entropy": -np.sum(np.sum(np.exp(logp) * logp, axis=-1), where=mask).item() / count,
    }
    if batch.ref_logprobs is not None:
        difference = np.where(mask, only(mask, batch.ref_logprobs, lp.dtype) - lp, 0)
        kl = np.expm1(difference) - difference  # of a small difference, exp is 1 and no more
        gain = gain - objective.beta * kl
        dlogprob = dlogprob - objective.beta * -np.expm1(difference)
        metrics["kl"] = np.sum(kl, where=mask).item() / count
    dlogprob = np.where(mask, -dlogprob / count, 0)
    value = -np.sum(gain, where=mask) / count
    dscaled = log_softmax_backward(pick_backward(dlogprob, logp, batch), cache)
    metrics = {"loss": value.item(), "tokens": float(mask.sum()), **metrics}
    return metrics, dscaled / objective.temperature


def target_logprobs(
    logits: Float[np.ndarray, "B S V"], batch: Batch, temperature: float
) -> Float[np.ndarray, "B S"]:
    """Clauses 7.1 and 7.12: lp of each target, 0 at other cells."""
    logp, _ = log_softmax(logits / temperature)
    return np.where(batch.target_mask, pick(logp, batch), 0)


def pick(logp: Float[np.ndarray, "B S V"], batch: Batch) -> Float[np.ndarray, "B S"]:
    """The log-probability of each cell's target; at other cells that of token 0."""
    targets = np.where(batch.target_mask, batch.targets, 0)
    return np.take_along_axis(logp, targets[:, :, None], axis=-1)[:, :, 0]


def pick_backward(
    dlogprob: Float[np.ndarray, "B S"], logp: Float[np.ndarray, "B S V"], batch: Batch
) -> Float[np.ndarray, "B S V"]:
    """`dlogprob` put in the place of each target, zero elsewhere."""
    targets = np.where(batch.target_mask, batch.targets, 0)
    dlogp = np.zeros_like(logp)
    np.put_along_axis(dlogp, targets[:, :, None], dlogprob[:, :, None], axis=-1)
    return dlogp


def only(mask: np.ndarray, x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`x` at target cells, 0 elsewhere, whatever it held there."""
    return np.where(mask, x, 0).astype(dtype)


def group_advantages(
    rewards: Float[np.ndarray, " B"], groups: Int[np.ndarray, " B"], normalise_std: bool = True
) -> Float[np.ndarray, " B"]:
    """Clause 7.6: `A = (r - mean r) / std r` over each group, std of the population.

    A group of equal rewards, `max r - min r <= EQUAL max |r|`, gets exactly 0. No epsilon is added
    to std: a group's advantages do not depend on the scale of its rewards. `normalise_std=False`
    leaves the division out (Dr. GRPO). Rewards are taken to be near 1 by a power of two, which
    rounds nothing, and their differences to [0, 1] before any is squared: so rewards and spreads of
    any size have right advantages. Raises BridgeError for a reward that is not finite.
    """
    rewards = np.asarray(rewards, np.float64)
    for row in np.flatnonzero(~np.isfinite(rewards)):
        raise BridgeError(f"reward {rewards[row]} of row {row} is not finite (clause 7.6)")
    advantages = np.zeros_like(rewards)
    for group in np.unique(groups):
        rows = groups == group
        _, exponent = np.frexp(np.abs(rewards[rows]).max())
        r = np.ldexp(rewards[rows], -exponent)
        spread = r.max() - r.min()
        if spread <= EQUAL * np.abs(r).max():
            continue
        apart = (r - r.min()) / spread
        centred = apart - apart.mean()
        with np.errstate(over="ignore"):  # of rewards near its end
            unscaled = np.ldexp(centred * spread, exponent)
        advantages[rows] = centred / apart.std() if normalise_std else unscaled
    return advantages
