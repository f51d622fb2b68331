"""Losses over target tokens (clauses 7.1 to 7.5), some targets at a time (clause 7.15).

Hidden states of the cells with a target enter, and the loss, its metrics and its gradients leave.
Logits of one part of the targets are made and let go before those of the next, forward and
backward: they are never all there. All is in float32. Axes: n targets, of one part or of all.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int

from bridge.contract import SFT, Objective
from bridge.decoding.targets import TargetCells
from bridge_mlx.model import Head


def loss_in_parts(
    head: Head,
    leaves: Mapping[str, mx.array],
    h: Float[mx.array, "n D"],
    targets: TargetCells,
    objective: Objective,
    count: int,
    chunk: int,
) -> tuple[dict[str, mx.array], Float[mx.array, "n D"], dict[str, mx.array]]:
    """Metrics, `loss` among them, and the loss's gradients: at `h` in its dtype, and at the leaves,
    which stand in for the head's own tensors, in float32."""

    def part(h: mx.array, leaves: dict[str, mx.array], own: TargetCells) -> tuple[mx.array, Any]:
        return loss(head.substitute(leaves)(h), own, objective, count)

    differentiate = mx.value_and_grad(part, argnums=(0, 1))
    metrics: dict[str, mx.array] = {}
    grads = {name: mx.zeros(leaf.shape) for name, leaf in leaves.items()}
    at_h: list[mx.array] = []
    for some, own in parts(targets, chunk):
        # Of the part before, all that reads its logits comes first; then they are let go.
        before = [*at_h[-1:], *metrics.values(), *grads.values()]
        given = mx.depends([h[some]], before)[0] if at_h else h[some]
        (_, added), (of_h, of_leaves) = differentiate(given, dict(leaves), own)
        metrics = {name: metrics.get(name, 0) + x for name, x in added.items()}
        grads = {name: g + of_leaves[name].astype(mx.float32) for name, g in grads.items()}
        at_h.append(of_h)
    return metrics, mx.concatenate(at_h), grads


def parts(targets: TargetCells, chunk: int) -> Iterator[tuple[slice, TargetCells]]:
    """The targets, so many at a time."""
    for start in range(0, len(targets.rows), chunk):
        some = slice(start, start + chunk)
        yield some, TargetCells._make(None if x is None else x[some] for x in targets)


def log_probability(
    logits: Float[mx.array, "n V"], tokens: Int[np.ndarray, " n"], temperature: float
) -> tuple[Float[mx.array, "n V"], Float[mx.array, "n one"], Float[mx.array, " n"]]:
    """z and its log-sum-exp, of which `z - log_sum` is log p of every token, and log p of the one
    given (clauses 6.10 and 7.1)."""
    logits = logits if temperature == 1 else logits / temperature
    z = logits - mx.stop_gradient(mx.max(logits, axis=-1, keepdims=True))
    log_sum = mx.logsumexp(z, axis=-1, keepdims=True)
    ids = mx.array(tokens.astype(np.int32))[:, None]
    return z, log_sum, (mx.take_along_axis(z, ids, axis=-1) - log_sum)[:, 0]


def loss(
    logits: Float[mx.array, "n V"], targets: TargetCells, objective: Objective, count: int
) -> tuple[mx.array, dict[str, mx.array]]:
    """The loss over target tokens, and its metrics, `loss` and `tokens` among them.

    `logits` are those of the cells with a target. `count` is the number of targets that sums are
    divided by: of the whole update, of which these may be a part (clauses 7.10 and 7.15). SFT is
    clause 7.4: `loss = -sum(lp) / count` with lp = log p(target). GRPO is clause 7.5, with
    advantage A by row:

        rho  = exp(lp - old)
        gain = min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A)
        kl   = exp(ref - lp) - (ref - lp) - 1
        loss = -sum(gain - beta kl) / count
    """
    temperature = 1.0 if isinstance(objective, SFT) else objective.temperature
    z, log_sum, lp = log_probability(logits, targets.targets, temperature)
    tokens = mx.array(float(len(lp)))
    if isinstance(objective, SFT):
        value = -mx.sum(lp) / count
        return value, {"loss": value, "tokens": tokens}
    assert targets.advantages is not None
    A, old = _floats(targets.advantages), mx.stop_gradient(lp)
    if targets.old_logprobs is not None:
        old = _floats(targets.old_logprobs)
    rho = mx.exp(lp - old)
    clipped = mx.stop_gradient(mx.clip(rho, 1 - objective.eps_low, 1 + objective.eps_high))
    gain = mx.where(rho * A <= clipped * A, rho * A, clipped * A)
    logp = mx.stop_gradient(z - log_sum)
    metrics = {
        "tokens": tokens,
        "clip_fraction": mx.sum(rho * A > clipped * A) / count,
        "entropy": -mx.sum(mx.exp(logp) * logp) / count,
    }
    if targets.ref_logprobs is not None:
        difference = _floats(targets.ref_logprobs) - lp
        kl = mx.expm1(difference) - difference  # of a small difference, exp is 1 and no more
        gain = gain - objective.beta * kl
        metrics["kl"] = mx.sum(kl) / count
    value = -mx.sum(gain) / count
    return value, {"loss": value, **metrics}


def _floats(values: Float[np.ndarray, " n"]) -> Float[mx.array, " n"]:
    return mx.array(values.astype(np.float32))
