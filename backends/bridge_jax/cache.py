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
from jaxtyping import Float, Int

from bridge_jax.compiled import compiled

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
