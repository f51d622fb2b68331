"""What `steps` computes, a layer at a time: how a CPU decodes.

The functions have the names and arguments of those in `steps`, with weights and caches of each
layer apart, and give the same. What is compiled is one layer, and it reads its weights where they
lie, which a loop over layers in one compiled function does not on a CPU: `weights` says why. There
is no `run`: a CPU gains nothing by not asking the host.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Bool, Float, Int

from bridge.config import ModelConfig
from bridge_jax.attention import over_cache, text_attention
from bridge_jax.block import Cells, Grid
from bridge_jax.cache import Cache, slots_of, written
from bridge_jax.compiled import compiled
from bridge_jax.model import Params, decoder_layer, embed, head, windows
from bridge_jax.pieces import Pieces
from bridge_jax.steps import Places, padded, readable
from bridge_jax.weights import Layers

Array = jax.Array


class Timestep(NamedTuple):
    """What all layers of a timestep share."""

    rope: Float[Array, "two R d"]
    alive: Bool[Array, " R"]
    steps: Int[Array, " R"]
    length: Int[Array, " R"]
    grid: Grid


def read(
    layers: Layers,
    batch: Pieces,
    table: Float[Array, "two positions d"],
    *,
    config: ModelConfig,
    sharding: NamedSharding | None = None,
    quick: bool,
) -> tuple[tuple[Cache, ...], Float[Array, "G V"]]:
    """See `steps.read`."""
    h, rope, batch = begin_read(layers.outer, batch, table, quick=quick)
    caches = []
    for weights, options in _kinds(layers, config):
        h, cache = read_layer(weights, h, rope, batch, config=config, quick=quick, **options)
        caches.append(cache)
    prompts = len(batch.shared.tokens)
    return tuple(caches), end_read(layers.outer, h, prompts=prompts, config=config, quick=quick)


@compiled()
def begin_read(outer: Params, batch: Pieces, table: Array) -> tuple[Array, Array, Pieces]:
    """Embeddings, the tables at the cells' positions, and the batch on the device."""
    batch = jax.tree.map(jnp.asarray, batch)
    return embed(outer, batch.tokens, batch.cells.active), table[:, batch.positions], batch


@compiled(static_argnames=("config", "window", "has_block"), donate_argnums=1)
def read_layer(
    weights: Params,
    h: Float[Array, "C D"],
    rope: Array,
    batch: Pieces,
    *,
    config: ModelConfig,
    window: int,
    has_block: bool,
) -> tuple[Float[Array, "C D"], Cache]:
    """One layer of prompts, and its keys and values."""
    attention = text_attention(batch, window, keep=True)
    h, kept = decoder_layer(weights, h, rope, attention, batch.cells, has_block, config)
    return h, Cache(*kept)


@compiled(static_argnames=("config", "prompts"))
def end_read(outer: Params, h: Float[Array, "C D"], *, prompts: int, config: ModelConfig) -> Array:
    """The logits after each prompt."""
    return padded(head(outer, h.reshape(prompts, -1, h.shape[-1])[:, -1], config))


def step(
    layers: Layers,
    own: tuple[Cache, ...],
    prefix: tuple[Cache, ...],
    table: Float[Array, "two positions d"],
    tokens: Int[Array, " R"],
    places: Places,
    *,
    config: ModelConfig,
    quick: bool,
) -> tuple[tuple[Cache, ...], Float[Array, "R V"]]:
    """See `steps.step`."""
    h, now = begin(layers.outer, table, tokens, places, quick=quick)
    caches = []
    for (weights, options), ours, kept in zip(_kinds(layers, config), own, prefix, strict=True):
        h, new = step_layer(weights, h, ours, kept, now, config=config, quick=quick, **options)
        caches.append(new)
    return tuple(caches), end(layers.outer, h, config=config, quick=quick)


@compiled()
def begin(
    outer: Params, table: Array, tokens: Array, places: Places
) -> tuple[Float[Array, "R D"], Timestep]:
    """Embeddings, and what the layers share."""
    places = jax.tree.map(jnp.asarray, places)
    steps, length, alive = places.steps, places.length, places.alive
    now = Timestep(table[:, length + steps], alive, steps, length, places.grid)
    return embed(outer, tokens, alive), now


@compiled(static_argnames=("config", "window", "has_block"), donate_argnums=(1, 2))
def step_layer(
    weights: Params,
    h: Float[Array, "R D"],
    own: Cache,
    prefix: Cache,
    now: Timestep,
    *,
    config: ModelConfig,
    window: int,
    has_block: bool,
) -> tuple[Float[Array, "R D"], Cache]:
    """One layer of a timestep, and its cache with it."""
    rope, alive, steps, length, grid = now
    mask = readable(length, steps, slots_of(prefix), slots_of(own), window)

    def attention(q: Array, k: Array, v: Array) -> tuple[Array, Cache]:
        new = written(own, None, k, v, steps)
        return over_cache(q, prefix, new, mask, grid), new

    cells = Cells.of_rows(alive[:, None], grid)
    return decoder_layer(weights, h, rope, attention, cells, has_block, config)


@compiled(static_argnames="config")
def end(outer: Params, h: Float[Array, "R D"], *, config: ModelConfig) -> Float[Array, "R V"]:
    """The next logits."""
    return padded(head(outer, h, config))


def _kinds(layers: Layers, config: ModelConfig) -> Any:
    """Each layer's weights, and what its function is compiled for."""
    with_block = config.bridge.layers if config.bridge else ()
    for i, (weights, window) in enumerate(zip(layers.each, windows(config), strict=True)):
        yield weights, {"window": window, "has_block": i in with_block}
