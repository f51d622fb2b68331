"""Keys and values of a decoder: those of its prompts, and of each row's own timesteps.

A prompt's end with the last of P slots, and the rows of its group share them; a row's own begin
with the first of T, each row at its own step. The arrays are as large as what is in them needs, in
buckets: they grow as rows do, and shrink as rows leave. Whatever moves goes array by array, each
old one given up before the next is made.

Axes: L layers (which a model that decodes by layers does not have), A prompts or rows, K key heads,
T slots, d head width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from bridge_jax.block import LOWEST, Grid
from bridge_jax.compiled import compiled
from bridge_jax.linear import contract

Array = jax.Array


class Cache(NamedTuple):
    """Keys and values."""

    k: Float[Array, "*L A K T d"]
    v: Float[Array, "*L A K T d"]


# Of all layers: one stack of them, or each layer's own.
Caches = Cache | tuple[Cache, ...]


def slots_of(caches: Caches) -> int:
    """T, or P."""
    return jax.tree.leaves(caches)[0].shape[-2]


def moved(
    caches: Caches, source: Int[np.ndarray, " A"], slots: int, *, to_end: bool, quick: bool
) -> Caches:
    """Line i holds what line `source[i]` held, in so many slots. What is in them stays where it
    begins, or `to_end` where it ends. The old arrays are gone."""
    had = jax.tree.leaves(caches)[0].shape
    if slots == had[-2] and np.array_equal(source, np.arange(had[-4])):
        return caches

    def move(old: Array) -> Array:
        new = _moved(old, source, slots=slots, to_end=to_end, quick=quick)
        old.delete()
        return new

    return jax.tree.map(move, caches)


@compiled(static_argnames=("slots", "to_end"))
def _moved(old: Array, source: Int[Array, " A"], *, slots: int, to_end: bool) -> Array:
    had = old.shape[-2]
    first = max(had - slots, 0) if to_end else 0
    new = old[..., first : first + slots, :].at[..., source, :, :, :].get(mode="clip")
    more = max(slots - had, 0)
    return jnp.pad(new, [(0, 0)] * (new.ndim - 2) + [(more, 0) if to_end else (0, more), (0, 0)])


def installed(
    prefixes: Caches, new: Caches, lines: Int[np.ndarray, " A"], *, quick: bool
) -> Caches:
    """`prefixes`, with those of new prompts at `lines`; a line that is not there holds padding.
    The old arrays are given away, as below."""
    return jax.tree.map(
        lambda old, fresh: _installed(old, fresh, lines, quick=quick), prefixes, new
    )


@compiled(donate_argnums=0)
def _installed(old: Array, new: Array, lines: Int[Array, " A"]) -> Array:
    before = [(0, 0)] * (new.ndim - 2) + [(old.shape[-2] - new.shape[-2], 0), (0, 0)]
    return old.at[..., lines, :, :, :].set(jnp.pad(new, before), mode="drop")


def cleared(own: Caches, places: Int[np.ndarray, " A"], *, quick: bool) -> Caches:
    """`own`, where nothing is left of whoever had these places; one that is not there is padding.
    A mask alone would not do: 0 times infinity is not 0."""
    return jax.tree.map(lambda old: _cleared(old, places, quick=quick), own)


@compiled(donate_argnums=0)
def _cleared(old: Array, places: Int[Array, " A"]) -> Array:
    return old.at[..., places, :, :, :].set(0, mode="drop")


def written(
    cache: Cache, layer: Array | None, k: Array, v: Array, steps: Int[Array, " R"]
) -> Cache:
    """A row's own cache with a timestep `[R, K, d]` more, at each row's own step; of a stack at one
    `layer`. A row past its last slot has ended, and is not written."""
    rows = jnp.arange(len(steps))
    at = (rows,) if layer is None else (layer, rows)
    return Cache(
        *(
            old.at[(*at, slice(None), steps)].set(new, mode="drop")
            for old, new in zip(cache, (k, v), strict=True)
        )
    )


def attend(
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
