"""Cached decoding of interdependent rows (chapter 4).

A prompt is read once and its keys and values are shared by the rows of its group; each row's own
timesteps are in a preallocated cache that a step updates in place. Rows that end stay as blocked
places until what is left fits a smaller bucket; then they leave every array. Nothing goes to the
host but drawn tokens.

Axes: L layers, G prompts, P prefix slots, R places for rows, N rows of the widest group, T own
timesteps, K key heads, M query heads that share one, d head width, V vocabulary, padded.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Bool, Float, Int

from bridge.config import ModelConfig
from bridge.contract import Sampling
from bridge.decoding.inputs import check_advance, check_prompts
from bridge.decoding.rows import Rows, left_padded
from bridge.decoding.uniforms import Uniforms, seeds_of
from bridge_jax.block import LOWEST, Grid, Layout, take
from bridge_jax.compiled import bucket, compiled
from bridge_jax.linear import contract
from bridge_jax.model import (
    STEPS,
    Batch,
    Params,
    Transformer,
    decoder_layer,
    embed,
    forward,
    head,
    layers,
)
from bridge_jax.sampling import LANES, Settings, sample

Array = jax.Array
REACH = 64  # own timesteps that a step reads at least


class Cache(NamedTuple):
    """Keys and values of every layer."""

    k: Float[Array, "L A K T d"]
    v: Float[Array, "L A K T d"]


class Places(NamedTuple):
    """What a step must know of its places beside their caches. Made on the host as rows leave."""

    grid: Grid
    alive: Bool[Any, " R"]
    length: Int[Any, " R"]  # of the row's prompt
    padding: Int[Any, " G"]  # slots before the prompt's first


class Decoder:
    """The rows left, in the order of their prompts; see `bridge.contract.Decoder`."""

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[np.ndarray],
        widths: Sequence[int],
        max_new_tokens: int,
        prompt_ids: Sequence[int] | None = None,
    ) -> None:
        """Prefill (clause 4.2). Raises BridgeError for a prompt that is empty or, with
        `max_new_tokens`, goes past the context (clause 4.4), and for a width below 1."""
        check_prompts(model.config, prompts, widths, max_new_tokens)
        self.model, self.step = model, 0
        # The last token is never fed back, so one timestep fewer than there may be tokens.
        self.limit = max_new_tokens - 1
        self.drawn: Array | None = None
        rows = Rows.of(prompts, widths, max_new_tokens, prompt_ids)
        self.slots = bucket(int(rows.lengths.max()), STEPS)
        self._settle(rows, Layout.of(rows.group, model.floor, model.floor))
        self._prefill(prompts)

    def _prefill(self, prompts: Sequence[np.ndarray]) -> None:
        """Read each prompt once, at width 1."""
        model = self.model
        timesteps = bucket(max(self.limit, 1), STEPS)
        self.table = model.rope(self.slots + timesteps)
        alone = Layout.of(np.arange(len(prompts)), model.floor)
        tokens, active, positions = map(alone.put, left_padded(prompts, self.slots))
        batch = Batch(tokens.astype(np.int32), positions.astype(np.int32), active, alone.grid)
        self.prefix, self.own, self.next_logits = prefill(
            model.params,
            batch,
            self.table,
            self.layout.put(self.rows.group.astype(np.int32)),
            config=model.config,
            timesteps=timesteps,
            sharding=model.of_cache,
            quick=model.quick,
        )

    def _settle(self, rows: Rows, layout: Layout) -> None:
        """These rows are left, and lie as in `layout` from now on."""
        self.rows, self.layout = rows, layout
        ids = layout.put(rows.row_ids), layout.put(rows.prompt_ids)
        self.uniforms = Uniforms(*ids, self.model.put)
        padding = np.full(layout.grid.filled.shape[0], self.slots, np.int32)
        padding[: len(rows.lengths)] -= rows.lengths
        alive = layout.put(np.ones(len(rows), bool))
        length = layout.put(rows.lengths[rows.group].astype(np.int32))
        self.places = Places(layout.grid, alive, length, padding)

    def logits(self) -> Float[np.ndarray, "R V"]:
        """Next-token logits of the rows left, float32."""
        return jax.device_get(self.next_logits)[self.layout.places, : self.model.config.vocab_size]

    def sample(self, sampling: Sampling) -> Int[np.ndarray, " R"]:
        """Draw the next token of each row left: int64. Does not advance."""
        size = self.layout.size
        steps = np.full(size, self.step)
        table, line = self.uniforms.at(steps, seeds_of(sampling, size))
        self.drawn = sample(
            self.next_logits, table, line, Settings.of(sampling), quick=self.model.quick
        )
        return jax.device_get(self.drawn)[self.layout.places].astype(np.int64)

    def advance(self, tokens: np.ndarray | None = None, keep: np.ndarray | None = None) -> None:
        """Feed the rows where `keep [R]` one token each, and drop the others (clause 4.3)."""
        rows, V = self.rows, self.model.config.vocab_size
        drawn = None
        if self.drawn is not None:
            drawn = jax.device_get(self.drawn)[self.layout.places, None]
        check_advance(V, rows.group, rows.left, drawn, tokens, keep, None)
        if tokens is not None:
            # On the device, as drawn ones are: or a step would be compiled once for either.
            fed = self.model.put(self.layout.put(np.asarray(tokens, np.int32)))
        else:
            assert self.drawn is not None
            fed = self.drawn
        if keep is not None and not np.all(keep):
            fed = self._leave(np.flatnonzero(keep), fed)
        if len(self.rows):
            self.own, self.next_logits = advance(
                self.model.params,
                self.own,
                self.prefix,
                self.table,
                fed,
                self.step,
                self.places,
                config=self.model.config,
                reach=min(bucket(self.step + 1, REACH), self.own.k.shape[3]),
                quick=self.model.quick,
            )
        self.rows, self.step, self.drawn = self.rows.fed(1), self.step + 1, None

    def _leave(self, kept: np.ndarray, fed: Array) -> Array:
        """Only the rows at these numbers, ascending, stay; prompts without rows go too. Gives
        `fed` by the places that are then computed."""
        now = self.layout._replace(places=self.layout.places[kept])
        self.layout, self.rows = now, self.rows.keep(kept)
        rows, prompts = self.rows.compact()
        then = Layout.of(rows.group, self.model.floor, self.model.floor)
        if not len(rows) or (then.size, then.grid.filled.size) >= (now.size, now.grid.filled.size):
            self.places = self.places._replace(alive=now.put(np.ones(len(rows), bool)))
            return fed
        source = then.put(now.places.astype(np.int32))
        still = np.zeros(then.grid.filled.shape[0], np.int32)
        still[: len(prompts)] = prompts
        self.own, self.prefix, fed = move(
            self.own, self.prefix, fed, source, still, quick=self.model.quick
        )
        self._settle(rows, then)
        return fed


@compiled(static_argnames=("config", "timesteps", "sharding"))
def prefill(
    params: Params,
    batch: Batch,
    table: Float[Array, "two positions d"],
    prompt: Int[Array, " R"],
    *,
    config: ModelConfig,
    timesteps: int,
    sharding: NamedSharding | None = None,
) -> tuple[Cache, Cache, Float[Array, "R V"]]:
    """Prompts `[G, P]` that end with the last slot: their cache, an empty one for the R rows that
    answer `prompt`, and the rows' first logits."""
    h, kept = forward(params, batch, table, config, keep=True)
    shape = (config.num_hidden_layers, len(prompt), config.num_key_value_heads, timesteps)
    own = jnp.zeros((*shape, config.head_dim), h.dtype)
    if sharding is not None:
        own, *kept = (jax.lax.with_sharding_constraint(x, sharding) for x in (own, *kept))
    return Cache(*kept), Cache(own, own), take(_padded(head(params, h[:, -1], config)), prompt)


@compiled(static_argnames=("config", "reach"), donate_argnames="own")
def advance(
    params: Params,
    own: Cache,
    prefix: Cache,
    table: Float[Array, "two positions d"],
    tokens: Int[Array, " R"],
    step: int,
    places: Places,
    *,
    config: ModelConfig,
    reach: int,
) -> tuple[Cache, Float[Array, "R V"]]:
    """One timestep of every row: the caches with it, and logits for the next. Of a row's own
    timesteps the first `reach` are read, of which those up to `step` count."""
    grid, P = places.grid, prefix.k.shape[3]
    active = jnp.asarray(places.alive)[:, None]
    rope = table[:, places.length[:, None] + step]
    slot, timestep = jnp.arange(P), jnp.arange(reach)

    def layer(carry: tuple[Array, Cache], scanned: tuple) -> tuple[tuple[Array, Cache], None]:
        h, own = carry
        i, kept, (weights, window, has_block) = scanned
        # A window leaves out the same slots and timesteps for every row: it is counted back from
        # the present one, and the prefixes end at the same slot.
        in_prefix = (slot >= places.padding[:, None]) & (P + step - slot < window)
        in_own = (timestep <= step) & (step - timestep < window)

        def attend(q: Array, k: Array, v: Array) -> tuple[Array, Cache]:
            new = [
                jax.lax.dynamic_update_slice(all_, x[None, :, 0, :, None], (i, 0, 0, step, 0))
                for all_, x in zip(own, (k, v), strict=True)
            ]
            shape = (1, *own.k.shape[1:3], reach, q.shape[-1])
            ours = Cache(*(jax.lax.dynamic_slice(x, (i, 0, 0, 0, 0), shape)[0] for x in new))
            first = _read(grid.spread(q[:, 0]), kept, in_prefix)
            second = _read(q, ours, in_own[None])
            y = _joined([grid.collect(x) for x in first], [x[:, 0] for x in second])
            return y.astype(q.dtype)[:, None], Cache(*new)

        h, own = decoder_layer(weights, h, rope, attend, grid, active, has_block, config)
        return (h, own), None

    numbers = jnp.arange(config.num_hidden_layers)
    h = embed(params, tokens[:, None], active)
    (h, own), _ = jax.lax.scan(layer, (h, own), (numbers, prefix, layers(params, config)))
    return own, _padded(head(params, h[:, 0], config))


def _read(
    q: Float[Array, "A N K M d"], cache: Cache, mask: Bool[Array, "A T"]
) -> tuple[Array, Array, Array]:
    """What queries find in `cache`, `[A, K, T, d]` each, where `mask`: the largest score, the sum
    of e^(score - largest), and the values' sum by it. All rows of a prompt read it at once."""
    score = contract("ankmd,aktd->ankmt", q, cache.k) * q.shape[-1] ** -0.5
    mask = mask[:, None, None, None]
    score = jnp.where(mask, score, LOWEST)
    largest = score.max(-1, keepdims=True)
    p = jnp.where(mask, jnp.exp(score - largest), 0)
    y = contract("ankmt,aktd->ankmd", p.astype(q.dtype), cache.v)
    return largest, p.sum(-1, keepdims=True), y


def _joined(first: Sequence[Array], second: Sequence[Array]) -> Float[Array, "R K M d"]:
    """The softmax over two parts that were read apart, float32."""
    largest = jnp.maximum(first[0], second[0])
    a, b = jnp.exp(first[0] - largest), jnp.exp(second[0] - largest)
    return (a * first[2] + b * second[2]) / (a * first[1] + b * second[1])


def _padded(logits: Float[Array, "R V"]) -> Float[Array, "R V"]:
    """With ids of no weight up to a multiple of `LANES`, so that vocabularies share `sample`."""
    return jnp.pad(logits, ((0, 0), (0, -logits.shape[-1] % LANES)), constant_values=-jnp.inf)


@compiled()
def move(
    own: Cache, prefix: Cache, fed: Int[Array, " R"], source: Array, prompts: Array
) -> tuple[Cache, Cache, Int[Array, " R"]]:
    """Place i holds what `source[i]` held, and prompt g what `prompts[g]` was."""
    own, prefix = (
        Cache(*(x.at[:, places].get(mode="clip") for x in cache))
        for cache, places in ((own, source), (prefix, prompts))
    )
    return own, prefix, take(fed, source)
