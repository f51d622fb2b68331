"""Losses over target tokens (clauses 7.1 to 7.5), and the head that they read, in parts.

Only cells with a target are read, some at a time: the logits of a part, its loss and its gradients
are made and dropped before the next one's (clause 7.15). Of the head the gradient adds up in
float32, as all else here. Axes: C cells, m parts, n targets of a part, V vocabulary.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from bridge.config import ModelConfig
from bridge.contract import SFT, Batch, Objective
from bridge.decoding.targets import TargetCells
from bridge_jax.block import rms_norm, take
from bridge_jax.linear import contract
from bridge_jax.model import NORM, Params, head_of, head_weight
from bridge_jax.pieces import Pieces

Array = jax.Array
TARGETS = 64  # there is room at least for so many


class Targets(NamedTuple):
    """What a loss reads at each target, in parts that are padded at the end."""

    cells: Int[Any, "*m n"]  # places among the cells that are computed
    targets: Int[Any, "*m n"]
    real: Bool[Any, "*m n"]
    advantages: Float[Any, "*m n"] | None
    old_logprobs: Float[Any, "*m n"] | None
    ref_logprobs: Float[Any, "*m n"] | None

    @classmethod
    def of(
        cls, batch: Batch, pieces: Pieces, places: Int[np.ndarray, "B S"], most: int
    ) -> "Targets":
        """Of a batch whose cells are computed at `places` of `pieces`, in parts of at most `most`.

        How much room there is follows from the sizes of its pieces, so that a function is not
        compiled for each number of targets: parts without a target are not computed.
        """
        given = TargetCells.of(batch)
        count, rows, alone = len(given.targets), *pieces.alone.tokens.shape
        room = max(rows * (alone + 1), TARGETS)  # a response, and the last cell of its prompt
        if count > room:
            room = rows * (alone + pieces.shared.tokens.shape[1])
        some = min(most, room)
        parts = -(-room // some)

        def padded(values: np.ndarray, dtype: type) -> np.ndarray:
            return np.pad(values.astype(dtype), (0, parts * some - count)).reshape(parts, some)

        def floats(values: np.ndarray | None) -> np.ndarray | None:
            return None if values is None else padded(values, np.float32)

        return cls(
            padded(places[given.rows, given.timesteps], np.int32),
            padded(given.targets, np.int32),
            padded(np.ones(count), bool),
            floats(given.advantages),
            floats(given.old_logprobs),
            floats(given.ref_logprobs),
        )

    @property
    def parts(self) -> Int[Array, ""]:
        """How many hold a target."""
        return jnp.asarray(self.real).any(-1).sum()

    def part(self, number: Array) -> "Targets":
        """One of them."""
        return jax.tree.map(lambda x: jnp.asarray(x)[number], self)


def in_parts(
    params: Params,
    h: Float[Array, "C D"],
    targets: Targets,
    objective: Objective,
    count: float,
    config: ModelConfig,
    trained: Collection[str],
) -> tuple[dict[str, Array], Float[Array, "C D"], dict[str, Array]]:
    """Metrics of the loss of hidden states, its gradient there, and at the weights of the head and
    of the norm before it, where they are among those `trained`; all in float32.

    With p = softmax(logits / temperature), the gradient at a target's logits is that at its lp,
    times (1 at the target - p) / temperature: so they are never differentiated as such.
    """
    name, temperature = head_weight(config), 1.0
    if not isinstance(objective, SFT):
        temperature = objective.temperature
    ends = {key for key in (name, NORM) if key in trained}

    def zeros(like: Array) -> Array:
        return jnp.zeros(like.shape, jnp.float32)

    def normed(h: Array, weight: Array) -> Array:
        return rms_norm(h, weight, config.rms_norm_eps)

    def add(number: Array, sums: Any) -> Any:
        metrics, of_h, of_ends = sums
        part = targets.part(number)
        x, back = jax.vjp(normed, take(h, part.cells), params[NORM].astype(jnp.float32))
        logp, lp = at_targets(head_of(params, x, config), part, temperature)
        pull, more = jax.grad(loss, has_aux=True)(lp, logp, part, objective, count)
        pull = jnp.where(part.real, pull, 0)
        scale = jnp.maximum(jnp.abs(pull).max(), np.finfo(np.float32).tiny)
        chosen = jnp.arange(logp.shape[-1]) == part.targets[:, None]
        # At most 1, so that a narrow dtype holds it.
        of_logits = ((pull / scale)[:, None] * (chosen - jnp.exp(logp))).astype(x.dtype)
        scale = scale / temperature
        of_x = contract("nv,vd->nd", of_logits, params[name]) * scale
        of_rows, of_norm = back(of_x.astype(x.dtype))
        new = {NORM: of_norm, name: contract("nv,nd->vd", of_logits, x) * scale}
        return (
            {key: metrics[key] + more[key] for key in metrics},
            of_h.at[part.cells].add(of_rows.astype(jnp.float32)),
            {key: total + new[key] for key, total in of_ends.items()},
        )

    metrics = dict.fromkeys(metric_names(targets, objective), jnp.float32(0))
    start = metrics, zeros(h), {key: zeros(params[key]) for key in ends}
    return jax.lax.fori_loop(0, targets.parts, add, start)


def logprobs_in_parts(
    params: Params,
    h: Float[Array, "C D"],
    targets: Targets,
    temperature: float,
    config: ModelConfig,
) -> Float[Array, "m n"]:
    """lp of each target (clause 7.12); 0 in parts without one."""

    def put(number: Array, found: Array) -> Array:
        part = targets.part(number)
        x = rms_norm(take(h, part.cells), params[NORM], config.rms_norm_eps)
        return found.at[number].set(at_targets(head_of(params, x, config), part, temperature)[1])

    found = jnp.zeros(targets.cells.shape, jnp.float32)
    return jax.lax.fori_loop(0, targets.parts, put, found)


def at_targets(
    logits: Float[Array, "n V"], targets: Targets, temperature: float
) -> tuple[Float[Array, "n V"], Float[Array, " n"]]:
    """log p of every token, and of the target (clause 7.1)."""
    logp = jax.nn.log_softmax(logits / temperature, -1)
    return logp, jnp.take_along_axis(logp, targets.targets[:, None], -1, mode="clip")[:, 0]


def metric_names(targets: Targets, objective: Objective) -> list[str]:
    """Those that `loss` gives."""
    if isinstance(objective, SFT):
        return ["loss"]
    kl = [] if targets.ref_logprobs is None else ["kl"]
    return ["loss", "clip_fraction", "entropy", *kl]


def loss(
    lp: Float[Array, " n"],
    logp: Float[Array, "n V"],
    targets: Targets,
    objective: Objective,
    count: float,
) -> tuple[Array, dict[str, Array]]:
    """The loss over target tokens, to be differentiated by their lp, and its metrics, `loss` among
    them.

    `count` is the number of targets that sums are divided by: of the whole update, of which these
    may be a part (clauses 7.10 and 7.15). SFT is clause 7.4: `loss = -sum(lp) / count` with lp =
    log p(target). GRPO is clause 7.5, with advantage A by row:

        rho  = exp(lp - old)
        gain = min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A)
        kl   = exp(ref - lp) - (ref - lp) - 1
        loss = -sum(gain - beta kl) / count
    """

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
