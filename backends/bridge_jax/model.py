"""A host decoder of the Llama family with Bridge blocks after its FFNs (chapters 3 and 5).

Parameters are a dict of arrays by checkpoint name, the layers' stacked under one name with `*` for
the layer's number, and one scan runs over all layers: compile time does not grow with depth. What
differs by layer (window, block or none) is data of the scan. Functions are pure, and are compiled
once a config and bucket of sizes; the teacher-forced forward also serves prefill and training.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import (
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)
from jaxtyping import Bool, Float, Int

from bridge.config import LoraConfig, ModelConfig
from bridge.rope import rotation_tables
from bridge_jax.attention import Attend, text_attention
from bridge_jax.block import Cells, block, norm_ratio, rms_norm, silu, take
from bridge_jax.cache import Cache, Caches
from bridge_jax.compiled import SMALL, bucket, compiled
from bridge_jax.linear import KEPT, LAYERS, WEIGHT, named, partition_specs
from bridge_jax.pieces import Pieces, planned
from bridge_jax.weights import Params, Weights, parameters

Array = jax.Array
NORM = "model.norm.weight"  # of what the head reads
CONTEXT = 4096  # positions that a table has if the model has as many


class Transformer:
    """The parameters of a model, and the sizes that its batches are padded to."""

    def __init__(
        self,
        config: ModelConfig,
        get: Callable[[str], np.ndarray],
        device: Any,
        dtype: np.dtype,
    ) -> None:
        """Read every tensor once, by its checkpoint name, through `get`, and put it on the
        device."""
        self.config, self.dtype = config, dtype
        self.home: Sharding = SingleDeviceSharding(device)  # where activations lie
        small, on_cpu = parameters(config) < SMALL, device.platform == "cpu"
        self.floor = 4 if small else 1  # of groups in a batch and of rows in a group
        self.quick = small and on_cpu
        self.by_layer = on_cpu and not small  # decodes so

        def own(name: str) -> np.ndarray:
            # Layers that are stored in different dtypes stack all the same.
            return get(name).astype(dtype, copy=False)

        self.weights = Weights(config, own, self.put, by_layer=self.by_layer)
        self.tables: dict[int, Array] = {}
        self.of_cache: NamedSharding | None = None  # how caches `[L, R, kv, T, d]` lie on a mesh

    @property
    def params(self) -> dict[str, Array]:
        """By checkpoint name, the layers' stacked under one name; to be written to."""
        return self.weights.stacked

    def put(self, array: np.ndarray) -> Array:
        """On the model's device, or on each of them."""
        return jax.device_put(array, self.home, may_alias=False)

    def shard(self, mesh: Mesh, axis: str = "model") -> None:
        """Spread the parameters over a mesh, as `partition_specs` says; all else follows them."""
        specs = partition_specs(self.config, mesh.shape[axis], axis)
        for key, spec in specs.items():
            self.params[key] = jax.device_put(self.params[key], NamedSharding(mesh, spec))
        keys = specs[f"{LAYERS}self_attn.k_proj.weight"]
        self.of_cache = NamedSharding(mesh, PartitionSpec(None, *keys[:2]))
        self.home, self.by_layer = NamedSharding(mesh, PartitionSpec()), False
        self.tables.clear()

    def rope(self, length: int) -> Float[Array, "two P d"]:
        """cos and sin of the positions below `length` or more, from float64 on the host (clause
        5.6). Of a whole context that is not long, so that nearly all share one size."""
        length = max(bucket(length), min(self.config.max_position_embeddings, CONTEXT))
        if length not in self.tables:
            table = rotation_tables(self.config.rope, self.config.head_dim, length)
            self.tables[length] = self.put(table.astype(np.float32))
        return self.tables[length]

    def zeros(self, *shape: int, dtype: Any = np.float32) -> Array:
        """On the model's device, or on each of them."""
        return jnp.zeros(shape, dtype, device=self.home)

    def cache(self, lines: int, slots: int) -> Caches:
        """An empty one of so many prompts or rows."""
        c = self.config
        shape = (c.num_hidden_layers, lines, c.num_key_value_heads, slots, c.head_dim)
        if self.by_layer:
            return tuple(
                Cache(*(self.zeros(*shape[1:], dtype=self.dtype) for _ in "kv"))
                for _ in range(shape[0])
            )
        where = self.of_cache or self.home
        return Cache(*(jnp.zeros(shape, self.dtype, device=where) for _ in "kv"))

    def batch(
        self, tokens: np.ndarray, groups: np.ndarray, active: np.ndarray, positions: np.ndarray
    ) -> tuple[Pieces, Int[np.ndarray, "B S"], Array]:
        """A teacher-forced batch in the sizes that are compiled, where each of its cells is among
        those that are computed, and the table for its positions."""
        batch, places, length = planned(tokens, groups, active, positions, self.floor)
        return batch, places, self.rope(length)


@compiled(static_argnames="config")
def logits(
    params: Params, batch: Pieces, table: Float[Array, "two P d"], *, config: ModelConfig
) -> Float[Array, "C V"]:
    """Teacher-forced logits in float32 (clause 5.2); finite where not active."""
    h, _ = forward(params, batch, table, config)
    return head(params, h, config)


@compiled(static_argnames="config")
def norm_ratios(
    params: Params, batch: Pieces, table: Float[Array, "two P d"], *, config: ModelConfig
) -> Float[Array, " L"]:
    """How much the block of each layer adds to what it reads (clause 3.9). Of a layer without one
    it says nothing."""
    return forward(params, batch, table, config, measure=True)[1]


def forward(
    params: Params,
    batch: Pieces,
    table: Float[Array, "two P d"],
    config: ModelConfig,
    *,
    keep: bool = False,
    checkpoint: bool = False,
    measure: bool = False,
) -> tuple[Float[Array, "C D"], Any]:
    """Hidden states after the last layer, and with `keep` every layer's keys and values of what is
    shared, each `[L, G, kv, P, d]`, or with `measure` its block's norm ratio `[L]`. `checkpoint`:
    the backward pass computes each layer again (clause 7.11)."""
    cells, rope = batch.cells, table[:, batch.positions]

    def layer(h: Array, scanned: tuple[Params, Array, Array]) -> tuple[Array, Any]:
        weights, window, has_block = scanned

        def measured(h: Array) -> Array:
            assert config.bridge is not None
            return norm_ratio(weights, h, cells, config.bridge)

        look = measured if measure else None
        attend = text_attention(batch, window, keep=keep)
        return decoder_layer(weights, h, rope, attend, cells, has_block, config, look)

    # Without `checkpoint` the products are kept alone: what lies between them is computed again in
    # less time than memory takes to hold it. A scan keeps XLA from merging the two passes.
    kept = None if checkpoint else jax.checkpoint_policies.save_only_these_names(KEPT)
    step = jax.checkpoint(layer, policy=kept, prevent_cse=False)
    return jax.lax.scan(step, embed(params, batch.tokens, cells.active), layers(params, config))


def windows(config: ModelConfig) -> list[int]:
    """How far back each layer reads."""
    each = config.sliding_windows or (None,) * config.num_hidden_layers
    return [np.iinfo(np.int32).max if window is None else window for window in each]


def layers(params: Params, config: ModelConfig) -> tuple[Params, Array, Array]:
    """What a scan over the layers reads: weights by name, window, and whether there is a block."""
    weights = {k.removeprefix(LAYERS): p for k, p in params.items() if k.startswith(LAYERS)}
    with_block = config.bridge.layers if config.bridge else ()
    has_block = [i in with_block for i in range(config.num_hidden_layers)]
    return weights, jnp.array(windows(config), jnp.int32), jnp.array(has_block)


def embed(
    params: Params, tokens: Int[Array, " C"], active: Bool[Array, " C"]
) -> Float[Array, "C D"]:
    """Embeddings, 0 at inactive cells."""
    return jnp.where(active[:, None], _lookup(params["model.embed_tokens.weight"], tokens), 0)


@jax.custom_vjp
def _lookup(weight: Float[Array, "V D"], tokens: Int[Array, " C"]) -> Float[Array, "C D"]:
    """Lines of a table. Their gradients add up in float32; to widen the table for that, as JAX's
    own would need, is to read all of it for a few lines."""
    return take(weight, tokens)


def _lookup_forward(weight: Array, tokens: Array) -> tuple[Array, tuple[Array, Array]]:
    return take(weight, tokens), (weight, tokens)


def _lookup_backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, None]:
    weight, tokens = kept
    total = jnp.zeros(weight.shape, jnp.float32).at[tokens].add(gradient.astype(jnp.float32))
    return total.astype(weight.dtype), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


def decoder_layer(
    weights: Params,
    h: Float[Array, "C D"],
    rope: Float[Array, "two C d"],
    attend: Attend,
    cells: Cells,
    has_block: Array | bool,
    config: ModelConfig,
    look: Callable[[Array], Array] | None = None,
) -> tuple[Float[Array, "C D"], Any]:
    """One layer, and the Bridge block that follows its FFN (clauses 3.7 and 5.3); and what `attend`
    kept, or what `look` finds in the stream before the block."""
    eps = config.rms_norm_eps
    x = rms_norm(h, weights["input_layernorm.weight"], eps)
    y, kept = attend(*project(weights, x, rope, config))
    h = h + named(weights, "self_attn.o_proj", y.reshape(len(h), -1), config.lora)
    x = rms_norm(h, weights["post_attention_layernorm.weight"], eps)
    h = h + feed_forward(weights, x, config.lora)
    kept = kept if look is None else look(h)
    bridge = config.bridge
    if bridge is None or not bridge.layers:
        return h, kept

    def with_block(h: Array) -> Array:
        return block(weights, h, cells, bridge)

    if len(bridge.layers) == config.num_hidden_layers:
        return with_block(h), kept
    if isinstance(has_block, bool):
        return (with_block(h) if has_block else h), kept
    return jax.lax.cond(has_block, with_block, lambda h: h, h), kept


def project(
    weights: Params,
    x: Float[Array, "C D"],
    rope: Float[Array, "two C d"],
    config: ModelConfig,
) -> tuple[Array, Array, Array]:
    """q `[C, kv, M, d]`, k and v `[C, kv, d]`, with norms and rope applied (clause 5.4)."""
    K, d = config.num_key_value_heads, config.head_dim
    q, k, v = (
        named(weights, f"self_attn.{part}_proj", x, config.lora).reshape(len(x), -1, d)
        for part in "qkv"
    )
    if config.qk_norm:
        q = rms_norm(q, weights["self_attn.q_norm.weight"], config.rms_norm_eps)
        k = rms_norm(k, weights["self_attn.k_norm.weight"], config.rms_norm_eps)
    q, k = rotate(q, rope), rotate(k, rope)
    return q.reshape(len(x), K, -1, d), k, v


def rotate(x: Float[Array, "C heads d"], rope: Float[Array, "two C d"]) -> Array:
    """Turn each head by its position, in Hugging Face's layout of halves (clause 5.6)."""
    cos, sin = rope[:, :, None]
    wide = x.astype(jnp.float32)
    return (wide * cos + jnp.roll(wide, x.shape[-1] // 2, -1) * sin).astype(x.dtype)


def feed_forward(
    weights: Params, x: Float[Array, "C D"], lora: LoraConfig | None
) -> Float[Array, "C D"]:
    """SwiGLU (clause 5.8)."""
    gate, up = (named(weights, f"mlp.{part}_proj", x, lora) for part in ("gate", "up"))
    return named(weights, "mlp.down_proj", silu(gate) * up, lora)


def head(params: Params, h: Float[Array, "... D"], config: ModelConfig) -> Float[Array, "... V"]:
    """Final norm and head (clause 5.2)."""
    return head_of(params, rms_norm(h, params[NORM], config.rms_norm_eps), config)


def head_of(params: Params, x: Float[Array, "... D"], config: ModelConfig) -> Float[Array, "... V"]:
    """The head alone: rounded to the model's dtype, given in float32. Not to be differentiated, but
    as `losses` does."""
    z = named(params, head_weight(config).removesuffix(WEIGHT), x)
    bits = jnp.finfo(z.dtype)
    # XLA may leave out a rounding that is undone at once, but not this.
    return jax.lax.reduce_precision(z.astype(jnp.float32), bits.nexp, bits.nmant)


def head_weight(config: ModelConfig) -> str:
    """The name of the head's matrix."""
    return "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
