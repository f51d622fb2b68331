"""The host's attention (clauses 5.4 and 5.5): of whole texts, and of a timestep over a cache.

Axes: R rows, S timesteps, K or kv key heads, M query heads that share one, d head width; of a
cache G prompts with P slots, and T own timesteps.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Int

from bridge_jax.block import LOWEST, Grid
from bridge_jax.cache import Cache
from bridge_jax.linear import KEPT, contract

Array = jax.Array
# `attend(q, k, v) -> y, kept`: q `[R, S, kv, M, d]`, k and v `[R, S, kv, d]`, y as q.
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]

QUERIES = 256  # timesteps whose scores are in memory at once


def prompt_attention(
    active: Bool[Array, "R S"], place: Int[Array, "R S"], window: Array | int, *, keep: bool
) -> Attend:
    """Attention of whole texts; with `keep` it gives its keys and values too, `[R, kv, S, d]`."""

    def attend(q: Array, k: Array, v: Array) -> tuple[Array, Any]:
        y = checkpoint_name(_attend(q, k, v, active, place, window), KEPT)
        kept = (k.swapaxes(1, 2), v.swapaxes(1, 2)) if keep else None
        return jnp.where(active[..., None, None, None], y, 0), kept

    return attend


def _attend(
    q: Float[Array, "R S kv M d"],
    k: Float[Array, "R S kv d"],
    v: Float[Array, "R S kv d"],
    active: Bool[Array, "R S"],
    place: Int[Array, "R S"],
    window: Array | int,
) -> Float[Array, "R S kv M d"]:
    """Causal attention over active cells inside the window (clauses 5.4 and 5.5). Scores of a long
    batch are computed, and in the backward pass computed again, for some timesteps at a time."""
    R, S = active.shape
    some = S if S % QUERIES else QUERIES

    def attend(first: Array | int) -> Float[Array, "R some kv M d"]:
        def ours(x: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, first, some, 1)

        mask = (first + jnp.arange(some)[:, None] >= jnp.arange(S)) & active[:, None, :]
        mask = mask & (ours(place)[:, :, None] - place[:, None, :] < window)
        score = contract("rskmd,rtkd->rkmst", ours(q), k) * q.shape[-1] ** -0.5
        p = jax.nn.softmax(jnp.where(mask[:, None, None], score, LOWEST), -1)
        return contract("rkmst,rtkd->rskmd", p.astype(v.dtype), v).astype(v.dtype)

    if some == S:
        return attend(0)
    parts = jax.lax.map(jax.checkpoint(attend), jnp.arange(0, S, some))
    return parts.swapaxes(0, 1).reshape(R, *q.shape[1:])


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
