"""What a decoder computes: prompts read, and timesteps of its rows, alone or many ahead.

A timestep embeds, runs every layer with its cache, and gives the next logits. `run` is a loop of
them on the device, in which rows draw, are fed and end, as clause 4.6 says; how many there are,
settings and end ids are data, so one compiled function does for all runs.

Axes: L layers, G prompts, P prefix slots, R places for rows, K key heads, M query heads that share
one, T own timesteps, d head width, V vocabulary, padded.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Bool, Float, Int

from bridge.config import ModelConfig
from bridge_jax.attention import over_cache
from bridge_jax.block import Cells, Grid, take
from bridge_jax.cache import Cache, slots_of, written
from bridge_jax.compiled import compiled
from bridge_jax.model import Params, decoder_layer, embed, forward, head, layers
from bridge_jax.pieces import Pieces
from bridge_jax.sampling import LANES, Settings, draw

Array = jax.Array
AHEAD = 64  # columns that a run ahead has room for, and lines of a table of uniforms


class Places(NamedTuple):
    """What a step must know of its places beside their caches. Made on the host, once a call."""

    grid: Grid
    alive: Bool[Any, " R"]
    steps: Int[Any, " R"]  # own timesteps that the row was fed
    left: Int[Any, " R"]  # how many it may still be fed
    length: Int[Any, " R"]  # of the row's prompt


class Draws(NamedTuple):
    """How rows draw and end."""

    table: Float[Any, "steps R"]
    line: int  # of the table, that of the first draw of the run
    settings: Settings
    ends: Int[Any, " ids"]  # -1 where there are fewer


@compiled(static_argnames=("config", "sharding"))
def read(
    params: Params,
    batch: Pieces,
    table: Float[Array, "two positions d"],
    *,
    config: ModelConfig,
    sharding: NamedSharding | None = None,
) -> tuple[Cache, Float[Array, "G V"]]:
    """Prompts, shared cells `[G, P]` that end with the last slot: their cache, and the logits after
    each."""
    h, kept = forward(params, batch, table, config, keep=True)
    if sharding is not None:
        kept = [jax.lax.with_sharding_constraint(x, sharding) for x in kept]
    last = h.reshape(*batch.shared.tokens.shape, -1)[:, -1]
    return Cache(*kept), padded(head(params, last, config))


@compiled()
def first_logits(
    logits: Float[Array, "R V"], of_prompts: Float[Array, "G V"], prompt: Int[Array, " R"]
) -> Float[Array, "R V"]:
    """Rows that come have their prompt's; others, whose `prompt` is -1, what they had."""
    return jnp.where(prompt[:, None] < 0, logits, take(of_prompts, jnp.maximum(prompt, 0)))


@compiled()
def rows_of(logits: Float[Array, "R V"], source: Int[Array, " S"]) -> Float[Array, "S V"]:
    """Place i has what place `source[i]` had."""
    return take(logits, source)


@compiled()
def of_tokens(
    logits: Float[Array, "R V"], tokens: Int[Array, " R"], temperature: float
) -> Float[Array, " R"]:
    """The log-probability of a token for each row, as its next (clause 6.10)."""
    logp = jax.nn.log_softmax(logits / temperature, -1)
    return jnp.take_along_axis(logp, tokens[:, None], -1, mode="clip")[:, 0]


@compiled(static_argnames="config", donate_argnames="own")
def step(
    params: Params,
    own: Cache,
    prefix: Cache,
    table: Float[Array, "two positions d"],
    tokens: Int[Array, " R"],
    places: Places,
    *,
    config: ModelConfig,
) -> tuple[Cache, Float[Array, "R V"]]:
    """Feed each row its token: the cache, and the next logits."""
    return timestep(
        params, own, prefix, table, tokens, jnp.asarray(places.alive), places, 0, config
    )


@compiled(static_argnames="config", donate_argnames="own")
def run(
    params: Params,
    own: Cache,
    prefix: Cache,
    table: Float[Array, "two positions d"],
    logits: Float[Array, "R V"],
    tokens: Int[Array, " R"],
    places: Places,
    draws: Draws,
    count: int,
    *,
    config: ModelConfig,
) -> tuple[Cache, Float[Array, "R V"], Int[Array, "R ahead"], Int[Array, ""]]:
    """Feed each row what it drew, `tokens`, and draw the next, up to `count` times or until no row
    is left: the cache, the next logits, what was drawn (-1 after a row's end), and how many
    timesteps were fed."""
    columns = jnp.full((len(tokens), AHEAD), -1, jnp.int32)
    alive = goes_on(tokens, jnp.asarray(places.alive), places, draws, 0)

    def more(carry: tuple) -> Array:
        fed, alive = carry[0], carry[4]
        return (fed < count) & alive.any()

    def one(carry: tuple) -> tuple:
        fed, own, logits, tokens, alive, columns = carry
        own, new = timestep(params, own, prefix, table, tokens, alive, places, fed, config)
        logits = jnp.where(alive[:, None], new, logits)
        tokens = draw(logits, draws.table[draws.line + 1 + fed], draws.settings)
        columns = columns.at[:, fed].set(jnp.where(alive, tokens, -1))
        fed = fed + 1
        return fed, own, logits, tokens, goes_on(tokens, alive, places, draws, fed), columns

    carry = (jnp.int32(0), own, logits, tokens, alive, columns)
    fed, own, logits, _, _, columns = jax.lax.while_loop(more, one, carry)
    return own, logits, columns, fed


def goes_on(
    drawn: Int[Array, " R"], alive: Bool[Array, " R"], places: Places, draws: Draws, fed: Any
) -> Bool[Array, " R"]:
    """Which rows are fed what they drew (clause 4.6)."""
    ended = (drawn[:, None] == jnp.asarray(draws.ends)).any(-1)
    return alive & ~ended & (jnp.asarray(places.left) > fed)


def timestep(
    params: Params,
    own: Cache,
    prefix: Cache,
    table: Float[Array, "two positions d"],
    tokens: Int[Array, " R"],
    alive: Bool[Array, " R"],
    places: Places,
    fed: Any,
    config: ModelConfig,
) -> tuple[Cache, Float[Array, "R V"]]:
    """One timestep of every row, `fed` after that of `places`: the caches with it, and logits for
    the next."""
    steps = places.steps + fed
    rope = table[:, places.length + steps]
    cells = Cells.of_rows(alive[:, None], places.grid)

    def layer(carry: tuple[Array, Cache], scanned: tuple) -> tuple[tuple[Array, Cache], None]:
        h, own = carry
        i, kept, (weights, window, has_block) = scanned
        mask = readable(places.length, steps, slots_of(kept), slots_of(own), window)

        def attention(q: Array, k: Array, v: Array) -> tuple[Array, Cache]:
            new = written(own, i, k, v, steps)
            ours = Cache(*(jax.lax.dynamic_index_in_dim(x, i, keepdims=False) for x in new))
            return over_cache(q, kept, ours, mask, places.grid), new

        h, own = decoder_layer(weights, h, rope, attention, cells, has_block, config)
        return (h, own), None

    numbers = jnp.arange(config.num_hidden_layers)
    h = embed(params, tokens, alive)
    (h, own), _ = jax.lax.scan(layer, (h, own), (numbers, prefix, layers(params, config)))
    return own, padded(head(params, h, config))


def readable(
    length: Int[Array, " R"], steps: Int[Array, " R"], P: int, T: int, window: Any
) -> Bool[Array, "R P_T"]:
    """Which slots of its prompt and of its own a row reads at its step (clauses 5.4 and 5.5)."""
    slot, timestep, step = jnp.arange(P), jnp.arange(T), steps[:, None]
    in_prefix = (slot >= P - length[:, None]) & (P + step - slot < window)
    in_own = (timestep <= step) & (step - timestep < window)
    return jnp.concatenate([in_prefix, in_own], -1)


def padded(logits: Float[Array, "R V"]) -> Float[Array, "R V"]:
    """With ids of no weight up to a multiple of `LANES`, so that vocabularies share `sample`."""
    return jnp.pad(logits, ((0, 0), (0, -logits.shape[-1] % LANES)), constant_values=-jnp.inf)
