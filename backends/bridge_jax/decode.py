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
from bridge.errors import BridgeError
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
from bridge_jax.sampling import LANES, Settings, Uniforms, sample

Array = jax.Array
REACH = 64  # own timesteps that a step reads at least


class Cache(NamedTuple):
    """Keys and values of every layer."""

    k: Float[Array, "L A K T d"]
    v: Float[Array, "L A K T d"]


class Rows(NamedTuple):
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
        self.lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        self.group = np.repeat(np.arange(len(prompts), dtype=np.int32), widths)
        self.layout = Layout.of(self.group, model.floor, model.floor)
        numbers = range(len(prompts)) if prompt_ids is None else prompt_ids
        rows = np.concatenate([np.arange(width) for width in widths])
        prompt_of_row = np.repeat(np.asarray(numbers, np.int64), widths)
        self.uniforms = Uniforms(self.layout.put(rows), self.layout.put(prompt_of_row), model.put)
        self.drawn: Array | None = None
        self._prefill(prompts)
        self._settle(self.layout)

    def _prefill(self, prompts: Sequence[np.ndarray]) -> None:
        """Read each prompt once, at width 1. Shorter ones are padded on the left, so that a slot's
        distance from the end is the same for all."""
        model = self.model
        self.slots = bucket(int(self.lengths.max()), STEPS)
        timesteps = bucket(max(self.limit, 1), STEPS)
        self.table = model.rope(self.slots + timesteps)
        alone = Layout.of(np.arange(len(prompts)), model.floor)
        tokens = np.zeros((alone.size, self.slots), np.int32)
        active = np.zeros(tokens.shape, bool)
        for place, prompt in zip(alone.places, prompts, strict=True):
            tokens[place, self.slots - len(prompt) :] = prompt
            active[place, self.slots - len(prompt) :] = True
        positions = np.maximum(np.cumsum(active, 1, dtype=np.int32) - 1, 0)
        self.prefix, self.own, self.next_logits = prefill(
            model.params,
            Batch(tokens, positions, active, alone.grid),
            self.table,
            self.layout.put(self.group),
            config=model.config,
            timesteps=timesteps,
            sharding=model.of_cache,
            quick=model.quick,
        )

    def _settle(self, layout: Layout) -> None:
        """Rows lie as in `layout` from now on."""
        self.layout = layout
        padding = np.full(layout.grid.filled.shape[0], self.slots, np.int32)
        padding[: len(self.lengths)] -= self.lengths
        alive = layout.put(np.ones(len(self.group), bool))
        self.rows = Rows(layout.grid, alive, layout.put(self.lengths[self.group]), padding)

    def logits(self) -> Float[np.ndarray, "R V"]:
        """Next-token logits of the rows left, float32."""
        return jax.device_get(self.next_logits)[self.layout.places, : self.model.config.vocab_size]

    def sample(self, sampling: Sampling) -> Int[np.ndarray, " R"]:
        """Draw the next token of each row left: int64. Does not advance."""
        table, line = self.uniforms.at(self.step, sampling.seed)
        self.drawn = sample(
            self.next_logits, table, line, Settings.of(sampling), quick=self.model.quick
        )
        return jax.device_get(self.drawn)[self.layout.places].astype(np.int64)

    def advance(self, tokens: np.ndarray | None = None, keep: np.ndarray | None = None) -> None:
        """Feed the rows where `keep [R]` one token each, and drop the others (clause 4.3)."""
        left, V = self.limit - self.step, self.model.config.vocab_size
        check_advance(V, len(self.group), left, tokens, keep)
        if tokens is not None:
            # On the device, as drawn ones are: or a step would be compiled once for either.
            fed = self.model.put(self.layout.put(np.asarray(tokens, np.int32)))
        elif self.drawn is not None:
            fed = self.drawn
        else:
            raise BridgeError("advance: no tokens given and none drawn; call sample first")
        if keep is not None and not np.all(keep):
            fed = self._leave(np.flatnonzero(keep), fed)
        if len(self.group):
            self.own, self.next_logits = advance(
                self.model.params,
                self.own,
                self.prefix,
                self.table,
                fed,
                self.step,
                self.rows,
                config=self.model.config,
                reach=min(bucket(self.step + 1, REACH), self.own.k.shape[3]),
                quick=self.model.quick,
            )
        self.step, self.drawn = self.step + 1, None

    def _leave(self, rows: np.ndarray, fed: Array) -> Array:
        """Only the rows at these numbers, ascending, stay; prompts without rows go too. Gives
        `fed` by the places that are then computed."""
        now = self.layout._replace(places=self.layout.places[rows])
        self.layout, self.group = now, self.group[rows]
        prompts, group = np.unique(self.group, return_inverse=True)
        then = Layout.of(group, self.model.floor, self.model.floor)
        if not len(rows) or (then.size, then.grid.filled.size) >= (now.size, now.grid.filled.size):
            self.rows = self.rows._replace(alive=now.put(np.ones(len(rows), bool)))
            return fed
        source = then.put(now.places.astype(np.int32))
        kept = np.zeros(then.grid.filled.shape[0], np.int32)
        kept[: len(prompts)] = prompts
        self.own, self.prefix, fed = move(
            self.own, self.prefix, fed, source, kept, quick=self.model.quick
        )
        self.lengths, self.group = self.lengths[prompts], group.astype(np.int32)
        self.uniforms.move(source)
        self._settle(then)
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
    rows: Rows,
    *,
    config: ModelConfig,
    reach: int,
) -> tuple[Cache, Float[Array, "R V"]]:
    """One timestep of every row: the caches with it, and logits for the next. Of a row's own
    timesteps the first `reach` are read, of which those up to `step` count."""
    grid, P = rows.grid, prefix.k.shape[3]
    active = jnp.asarray(rows.alive)[:, None]
    rope = table[:, rows.length[:, None] + step]
    slot, timestep = jnp.arange(P), jnp.arange(reach)

    def layer(carry: tuple[Array, Cache], scanned: tuple) -> tuple[tuple[Array, Cache], None]:
        h, own = carry
        i, kept, (weights, window, has_block) = scanned
        # A window leaves out the same slots and timesteps for every row: it is counted back from
        # the present one, and the prefixes end at the same slot.
        in_prefix = (slot >= rows.padding[:, None]) & (P + step - slot < window)
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
