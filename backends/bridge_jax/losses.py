"""Losses over target tokens (clauses 7.1 to 7.5), and what they read of a batch.

Only cells with a target are read: hidden states are gathered there before the head, so that no
logits are computed elsewhere. All is in float32. Axes: B rows, n targets, padded, V vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from bridge.contract import SFT, Batch, Objective
from bridge.decoding.targets import TargetCells
from bridge_jax.compiled import bucket

Array = jax.Array
TARGETS = 64  # targets are padded at least to it


class Targets(NamedTuple):
    """What a loss reads at each target, padded."""

    cells: Int[Any, " n"]  # place in the flat batch
    targets: Int[Any, " n"]
    real: Bool[Any, " n"]
    advantages: Float[Any, " n"] | None
    old_logprobs: Float[Any, " n"] | None
    ref_logprobs: Float[Any, " n"] | None

    @classmethod
    def of(cls, batch: Batch, places: Int[np.ndarray, " B"], width: int) -> "Targets":
        """Of rows that lie at `places` of a batch with `width` timesteps."""
        given = TargetCells.of(batch)
        n = len(given.targets)
        short = bucket(n, TARGETS) - n

        def padded(values: np.ndarray, dtype: type) -> np.ndarray:
            return np.pad(values.astype(dtype), (0, short))

        def floats(values: np.ndarray | None) -> np.ndarray | None:
            return None if values is None else padded(values, np.float32)

        return cls(
            padded(places[given.rows] * width + given.timesteps, np.int32),
            padded(given.targets, np.int32),
            padded(np.ones(n), bool),
            floats(given.advantages),
            floats(given.old_logprobs),
            floats(given.ref_logprobs),
        )


def at_targets(
    logits: Float[Array, "n V"], targets: Targets, temperature: float
) -> tuple[Float[Array, "n V"], Float[Array, " n"]]:
    """log p of every token, and of the target (clause 7.1)."""
    logp = jax.nn.log_softmax(logits / temperature, -1)
    return logp, jnp.take_along_axis(logp, targets.targets[:, None], -1, mode="clip")[:, 0]


def loss(
    logits: Float[Array, "n V"], targets: Targets, objective: Objective, count: float
) -> tuple[Array, dict[str, Array]]:
    """The loss over target tokens, and its metrics, `loss` among them.

    `count` is the number of targets that sums are divided by: of the whole update, where the batch
    is one of several (clause 7.10). SFT is clause 7.4: `loss = -sum(lp) / count` with lp =
    log p(target). GRPO is clause 7.5, with advantage A by row:

        rho  = exp(lp - old)
        gain = min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A)
        kl   = exp(ref - lp) - (ref - lp) - 1
        loss = -sum(gain - beta kl) / count
    """
    temperature = 1.0 if isinstance(objective, SFT) else objective.temperature
    logp, lp = at_targets(logits, targets, temperature)

    def mean(values: Array) -> Array:
        return jnp.where(targets.real, values, 0).sum() / count

    if isinstance(objective, SFT):
        value = -mean(lp)
        return value, {"loss": value}
    assert targets.advantages is not None
    A = jnp.asarray(targets.advantages)
    old = jax.lax.stop_gradient(lp) if targets.old_logprobs is None else targets.old_logprobs
    rho = jnp.exp(lp - old)
    clipped = jax.lax.stop_gradient(rho).clip(1 - objective.eps_low, 1 + objective.eps_high)
    gain = jnp.where(rho * A <= clipped * A, rho * A, clipped * A)
    metrics = {
        "clip_fraction": mean((rho * A > clipped * A).astype(jnp.float32)),
        "entropy": -mean((jnp.exp(logp) * logp).sum(-1)),
    }
    if targets.ref_logprobs is not None:
        difference = targets.ref_logprobs - lp
        kl = jnp.expm1(difference) - difference  # of a small difference, exp is 1 and no more
        gain = gain - objective.beta * kl
        metrics["kl"] = mean(kl)
    value = -mean(gain)
    return value, {"loss": value, **metrics}
