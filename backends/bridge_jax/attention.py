"""The host's attention (clauses 5.4 and 5.5): of whole texts, and of a timestep over a cache.

Of a batch in two pieces (clause 7.14), what rows have alone reads their group's shared keys, which
are never copied a row, and then its own: one softmax over both. Lines of a grid `[G, N]` are
computed together.

Axes: G groups, N rows of a group, S timesteps, K or kv key heads, M query heads that share one, d
head width, P timesteps that groups share; of a cache P slots of prompts and T own timesteps; C
cells.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Int

from bridge_jax.block import LOWEST, Grid, joined
from bridge_jax.cache import Cache
from bridge_jax.linear import KEPT, contract
from bridge_jax.pieces import Pieces

Array = jax.Array
# `attend(q, k, v) -> y, kept`: q `[C, kv, M, d]`, k and v `[C, kv, d]`, y as q.
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]

QUERIES = 2048  # cells whose scores are in memory at once


class Keys(NamedTuple):
    """What is read: of each row of a grid, or of each group without the axis N."""

    k: Float[Array, "G *N S kv d"]
    v: Float[Array, "G *N S kv d"]
    active: Bool[Array, "G *N S"]
    place: Int[Array, "G *N S"]


def text_attention(batch: Pieces, window: Array | int, *, keep: bool) -> Attend:
    """Attention of whole texts; with `keep` it gives the shared keys and values too, `[G, kv, P,
    d]`, those of the prompts that a decoder begins with."""
    shared, alone, grid = batch

    def attend(q: Array, k: Array, v: Array) -> tuple[Array, Any]:
        first = shared.active.size

        def of_shared(x: Array) -> Array:
            return x[:first].reshape(*shared.active.shape, *x.shape[1:])

        def of_alone(x: Array) -> Array:
            return grid.spread(x[first:].reshape(*alone.active.shape, *x.shape[1:]))

        of_groups = of_rows = jnp.zeros((0, 0, *q.shape[1:]), q.dtype)
        before = None
        if shared.active.size:
            active, place = map(jnp.asarray, (shared.active, shared.positions))
            before = Keys(of_shared(k), of_shared(v), active, place)
            by_row = Keys(*(x[:, None] for x in before))
            of_groups = _attend(of_shared(q)[:, None], by_row, None, window)[:, 0]
        if alone.active.size:
            active, place = (grid.spread(jnp.asarray(x)) for x in (alone.active, alone.positions))
            own = Keys(of_alone(k), of_alone(v), active, place)
            of_rows = grid.collect(_attend(of_alone(q), own, before, window))
        y = checkpoint_name(joined(of_groups, of_rows), KEPT)
        kept = tuple(x.swapaxes(1, 2) for x in before[:2]) if keep and before else None
        return jnp.where(batch.cells.active[:, None, None, None], y, 0), kept

    return attend


def _attend(
    q: Float[Array, "G N S kv M d"],
    own: Keys,
    before: Keys | None,
    window: Array | int,
) -> Float[Array, "G N S kv M d"]:
    """Causal attention over own active cells inside the window, after all those `before` them
    (clauses 5.4 and 5.5). Scores of a large batch are computed, and in the backward pass computed
    again, for some timesteps at a time."""
    G, N, S, *_, d = q.shape
    some = _at_once(G * N, S)
    q = q.transpose(0, 3, 1, 4, 2, 5)
    k, v = (x.transpose(0, 3, 1, 2, 4) for x in own[:2])

    def score(spec: str, q: Array, k: Array, mask: Bool[Array, "G N some read"]) -> Array:
        return jnp.where(mask[:, None, :, None], contract(spec, q, k) * d**-0.5, LOWEST)

    def attend(first: Array | int) -> Float[Array, "G kv N M some d"]:
        def ours(x: Array, axis: int) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, first, some, axis)

        asks, place = ours(q, 4), ours(own.place, 2)[..., None]
        mask = (first + jnp.arange(some)[:, None] >= jnp.arange(S)) & own.active[:, :, None]
        mask = mask & (place - own.place[:, :, None] < window)
        scores = [score("gknmsd,gkntd->gknmst", asks, k, mask)]
        if before is not None:
            mask = before.active[:, None, None] & (place - before.place[:, None, None] < window)
            scores.append(score("gknmsd,gtkd->gknmst", asks, before.k, mask))
        p = [x.astype(v.dtype) for x in _softmax(scores)]
        y = contract("gknmst,gkntd->gknmsd", p[0], v)
        if before is not None:
            y = y + contract("gknmst,gtkd->gknmsd", p[1], before.v)
        return y.astype(v.dtype)

    if some == S:
        y = attend(0)
    else:
        parts = jax.lax.map(jax.checkpoint(attend), jnp.arange(0, S, some))
        y = jnp.moveaxis(parts, 0, 4).reshape(q.shape)
    return y.transpose(0, 2, 4, 1, 3, 5)


def _at_once(rows: int, timesteps: int) -> int:
    """How many timesteps of all rows: as many as divide them evenly and keep to `QUERIES`."""
    parts = -(-rows * timesteps // QUERIES)
    while timesteps % parts:
        parts += 1
    return timesteps // parts


def _softmax(scores: list[Float[Array, "... _"]]) -> list[Float[Array, "... _"]]:
    """Over the last axes of all of them together."""
    tops = [jax.lax.stop_gradient(x.max(-1, keepdims=True)) for x in scores]
    top = tops[0] if len(tops) == 1 else jnp.maximum(*tops)
    powers = [jnp.exp(x - top) for x in scores]
    total = sum(x.sum(-1, keepdims=True) for x in powers)
    return [x / total for x in powers]


def over_cache(
    q: Float[Array, "R K M d"],
    prefix: Cache,
    own: Cache,
    mask: Bool[Array, "R P_T"],
    grid: Grid,
) -> Float[Array, "R K M d"]:
    """Each row's queries read its prompt's slots and then its own, where `mask` (clause 5.4). All
    rows of a prompt read it at once."""
    _, K, M, d = q.shape
    G, N = grid.filled.shape
    P = prefix.k.shape[2]

    def by_line(x: Float[Array, "R K M e"]) -> Float[Array, "G K N_M e"]:
        return grid.spread(x).swapaxes(1, 2).reshape(G, K, N * M, -1)

    def by_row(x: Float[Array, "G K N_M e"]) -> Float[Array, "R K M e"]:
        return grid.collect(x.reshape(G, K, N, M, -1).swapaxes(1, 2))

    first = by_row(contract("gkqd,gkpd->gkqp", by_line(q), prefix.k))
    second = contract("rkmd,rktd->rkmt", q, own.k)
    score = jnp.concatenate([first, second], -1) * d**-0.5
    p = jax.nn.softmax(jnp.where(mask[:, None, None], score, LOWEST), -1).astype(q.dtype)
    y = by_row(contract("gkqp,gkpd->gkqd", by_line(p[..., :P]), prefix.v))
    return (y + contract("rkmt,rktd->rkmd", p[..., P:], own.v)).astype(q.dtype)
