"""A whole decoder with Bridge blocks: llama, qwen2, qwen3 and mistral are one text (chapter 5).

Parameters are a dict of tensors by Hugging Face name (`bridge.config.tensor_shapes` lists them);
the config says which are there. How queries meet keys is a function that the caller gives: within
the batch under teacher forcing, against a cache in `decode`. Conventions as in `ops`.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int

from bridge.config import ModelConfig, bridge_shapes
from bridge.rope import inverse_frequencies
from bridge_ref import ops
from bridge_ref.attention import (
    causal_allowed,
    join_heads,
    self_attention,
    self_attention_backward,
    split_heads,
)
from bridge_ref.block import bridge_block, bridge_block_backward, norm_ratio
from bridge_ref.linear import Grads, Tensors, named_linear, named_linear_backward
from bridge_ref.ops import Cache
from bridge_ref.precision import rounded, wide, wide_dtype

# `attend(layer, q, k, v) -> y, cache`, with q, k, v as `project` gives them and y `[B, S, H * d]`.
Attend = Callable[[int, np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, Cache]]
# `attend_backward(dy, cache) -> dq, dk, dv`.
AttendBackward = Callable[[np.ndarray, Cache], tuple[np.ndarray, np.ndarray, np.ndarray]]


def forward(
    config: ModelConfig,
    tensors: Tensors,
    tokens: Int[np.ndarray, "B S"],
    groups: Int[np.ndarray, " B"],
    active: Bool[np.ndarray, "B S"],
    positions: Int[np.ndarray, "B S"],
) -> tuple[Float[np.ndarray, "B S V"], Cache]:
    """Teacher-forced logits, wide (clauses 2.1 to 2.4 and 5.2), and what `backward` needs.

    Cells that are not active influence no others; their own logits are finite and unspecified.
    """
    h, decoder_cache = hidden_states(config, tensors, tokens, groups, active, positions)
    logits, head_cache = head(config, tensors, h)
    return logits, (decoder_cache, head_cache)


def hidden_states(
    config: ModelConfig,
    tensors: Tensors,
    tokens: Int[np.ndarray, "B S"],
    groups: Int[np.ndarray, " B"],
    active: Bool[np.ndarray, "B S"],
    positions: Int[np.ndarray, "B S"],
) -> tuple[Float[np.ndarray, "B S D"], Cache]:
    """`forward` without the head: the residual stream after the last layer."""
    # What an inactive cell holds is not read; it need not even be a token.
    tokens = np.where(active, tokens, 0)
    attend = teacher_forced(config, active, positions)
    return decoder(config, tensors, tokens, groups, active, positions, attend)


def teacher_forced(
    config: ModelConfig, active: Bool[np.ndarray, "B S"], positions: Int[np.ndarray, "B S"]
) -> Attend:
    """Self-attention among the cells of a batch, each inside its layer's window (clause 5.5)."""
    windows = {window_of(config, i) for i in range(config.num_hidden_layers)}
    allowed = {window: causal_allowed(active, positions, window) for window in windows}

    def attend(i: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, Cache]:
        return self_attention(q, k, v, allowed[window_of(config, i)])

    return attend


def norm_ratios(
    config: ModelConfig,
    tensors: Tensors,
    tokens: Int[np.ndarray, "B S"],
    groups: Int[np.ndarray, " B"],
    active: Bool[np.ndarray, "B S"],
    positions: Int[np.ndarray, "B S"],
) -> Float[np.ndarray, " blocks"]:
    """Clause 3.9: the norm ratio of each layer with a block, in order of layers, wide."""
    h, (_, caches) = hidden_states(config, tensors, tokens, groups, active, positions)
    blocks = [cache[-1] for cache in caches if cache[-1] is not None]
    return np.array([norm_ratio(block) for block in blocks], wide_dtype(h.dtype))


def backward(config: ModelConfig, dlogits: Float[np.ndarray, "B S V"], cache: Cache) -> Grads:
    """The gradient of every tensor, given that of the logits. A tied embedding gets the sum of
    what comes through the head and through the input (clause 5.2)."""
    decoder_cache, head_cache = cache
    dh, grads = head_backward(config, dlogits, head_cache)
    return add_grads(grads, decoder_backward(config, dh, decoder_cache))


def add_grads(grads: Grads, more: Grads) -> Grads:
    """Both, summed where a tensor has two."""
    return grads | {n: grads[n] + grad if n in grads else grad for n, grad in more.items()}


def window_of(config: ModelConfig, i: int) -> int | None:
    """The sliding window of layer i; None sees everything before it (clause 5.5)."""
    return config.sliding_windows[i] if config.sliding_windows else None


def decoder(
    config: ModelConfig,
    tensors: Tensors,
    tokens: Int[np.ndarray, "B S"],
    groups: Int[np.ndarray, " B"],
    active: Bool[np.ndarray, "B S"],
    positions: Int[np.ndarray, "B S"],
    attend: Attend,
) -> tuple[Float[np.ndarray, "B S D"], Cache]:
    """Embedding and layers: the residual stream after the last layer."""
    h, embedding_cache = ops.embedding(tokens, tensors["model.embed_tokens.weight"])
    rope = rope_tables(config, positions, h.dtype)
    caches = []
    for i in range(config.num_hidden_layers):
        h, cache = layer(config, tensors, i, h, groups, active, rope, attend)
        caches.append(cache)
    return h, (embedding_cache, caches)


def decoder_backward(
    config: ModelConfig,
    dh: Float[np.ndarray, "B S D"],
    cache: Cache,
    attend_backward: AttendBackward = self_attention_backward,
) -> Grads:
    """Layers last to first, then the embedding; `attend_backward` is that of `decoder`'s `attend`,
    whose cache it is given."""
    embedding_cache, caches = cache
    grads: Grads = {}
    for i in reversed(range(config.num_hidden_layers)):
        dh, layer_grads = layer_backward(config, i, dh, caches[i], attend_backward)
        grads |= layer_grads
    grads["model.embed_tokens.weight"] = ops.embedding_backward(dh, embedding_cache)
    return grads


def layer(
    config: ModelConfig,
    tensors: Tensors,
    i: int,
    h: Float[np.ndarray, "B S D"],
    groups: Int[np.ndarray, " B"],
    active: Bool[np.ndarray, "B S"],
    rope: tuple[np.ndarray, np.ndarray],
    attend: Attend,
) -> tuple[Float[np.ndarray, "B S D"], Cache]:
    """`h += self_attn(norm(h))`, `h += mlp(norm(h))`, then the block (clauses 3.7, 5.4, 5.8)."""
    prefix, eps = f"model.layers.{i}", config.rms_norm_eps
    x, norm1 = ops.rms_norm(h, tensors[f"{prefix}.input_layernorm.weight"], eps)
    q, k, v, projected = project(config, tensors, f"{prefix}.self_attn", x, rope)
    y, attended = attend(i, q, k, v)
    y, out = named_linear(config, tensors, f"{prefix}.self_attn.o_proj", y)
    h = h + y
    x, norm2 = ops.rms_norm(h, tensors[f"{prefix}.post_attention_layernorm.weight"], eps)
    y, fed = feed_forward(config, tensors, f"{prefix}.mlp", x)
    h = h + y
    block = None
    if config.bridge is not None and i in config.bridge.layers:
        h, block = bridge_block(h, groups, active, block_weights(config, tensors, i), config.bridge)
    return h, (norm1, projected, attended, out, norm2, fed, block)


def layer_backward(
    config: ModelConfig,
    i: int,
    dh: Float[np.ndarray, "B S D"],
    cache: Cache,
    attend_backward: AttendBackward = self_attention_backward,
) -> tuple[Float[np.ndarray, "B S D"], Grads]:
    """The steps of `layer`, last to first."""
    norm1, projected, attended, out, norm2, fed, block = cache
    prefix, grads = f"model.layers.{i}", {}
    if block is not None:
        dh, block_grads = bridge_block_backward(dh, block)
        grads |= {f"{prefix}.bridge.{name}": grad for name, grad in block_grads.items()}
    dx, fed_grads = feed_forward_backward(dh, fed)
    dx, grads[f"{prefix}.post_attention_layernorm.weight"] = ops.rms_norm_backward(dx, norm2)
    dh = dh + dx
    dy, out_grads = named_linear_backward(dh, out)
    dx, projected_grads = project_backward(*attend_backward(dy, attended), projected)
    dx, grads[f"{prefix}.input_layernorm.weight"] = ops.rms_norm_backward(dx, norm1)
    return dh + dx, grads | fed_grads | out_grads | projected_grads


def block_weights(config: ModelConfig, tensors: Tensors, i: int) -> dict[str, np.ndarray]:
    """The tensors of layer i's block by their names after `bridge.` (clauses 3.1 and 8.1)."""
    prefix = f"model.layers.{i}.bridge."
    return {name.removeprefix(prefix): tensors[name] for name in bridge_shapes(config, i)}


def head(
    config: ModelConfig, tensors: Tensors, h: Float[np.ndarray, "B S D"]
) -> tuple[Float[np.ndarray, "B S V"], Cache]:
    """Clause 5.2: final norm, then `lm_head`, or the embedding where they are tied. Wide logits."""
    x, norm = ops.rms_norm(h, tensors["model.norm.weight"], config.rms_norm_eps)
    logits, projected = named_linear(config, tensors, head_name(config), x)
    return wide(logits), (h.dtype, norm, projected)


def head_backward(
    config: ModelConfig, dlogits: Float[np.ndarray, "B S V"], cache: Cache
) -> tuple[Float[np.ndarray, "B S D"], Grads]:
    """The steps of `head`, last to first."""
    dtype, norm, projected = cache
    dx, grads = named_linear_backward(rounded(dlogits, dtype), projected)
    dh, grads["model.norm.weight"] = ops.rms_norm_backward(dx, norm)
    return dh, grads


def head_name(config: ModelConfig) -> str:
    """The linear map that gives logits."""
    return "model.embed_tokens" if config.tie_word_embeddings else "lm_head"


def rope_tables(
    config: ModelConfig, positions: Int[np.ndarray, "B S"], dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Clause 5.6: cos and sin `[B, S, d / 2]` of `position * inverse frequency`, times the
    attention factor; computed in float64 and rounded to the wide dtype."""
    frequencies, factor = inverse_frequencies(config.rope, config.head_dim)
    angles = positions[:, :, None] * frequencies
    T = np.dtype(np.float64) if wide_dtype(dtype).itemsize >= 8 else np.dtype(np.float32)
    return rounded(np.cos(angles) * factor, T), rounded(np.sin(angles) * factor, T)


def project(
    config: ModelConfig,
    tensors: Tensors,
    prefix: str,
    x: Float[np.ndarray, "B S D"],
    rope: tuple[np.ndarray, np.ndarray],
) -> tuple[
    Float[np.ndarray, "B S H d"],
    Float[np.ndarray, "B S kv d"],
    Float[np.ndarray, "B S kv d"],
    Cache,
]:
    """Clause 5.4: q, k and v by head; q and k normed (qwen3), then rotated."""
    turned, caches = [], []
    for part in "qk":
        z, linear_cache = named_linear(config, tensors, f"{prefix}.{part}_proj", x)
        z, norm_cache = split_heads(z, config.head_dim), None
        if config.qk_norm:
            weight = tensors[f"{prefix}.{part}_norm.weight"]
            z, norm_cache = ops.rms_norm(z, weight, config.rms_norm_eps)
        turned.append(ops.rotate(z, *rope))
        caches.append((f"{prefix}.{part}_norm.weight", norm_cache, linear_cache))
    v, v_cache = named_linear(config, tensors, f"{prefix}.v_proj", x)
    return *turned, split_heads(v, config.head_dim), (caches, v_cache, rope)


def project_backward(
    dq: Float[np.ndarray, "B S H d"],
    dk: Float[np.ndarray, "B S kv d"],
    dv: Float[np.ndarray, "B S kv d"],
    cache: Cache,
) -> tuple[Float[np.ndarray, "B S D"], Grads]:
    """The steps of `project`, last to first."""
    caches, v_cache, rope = cache
    dx, grads = named_linear_backward(join_heads(dv), v_cache)
    for dz, (norm_name, norm_cache, linear_cache) in zip((dq, dk), caches, strict=True):
        dz = ops.rotate_backward(dz, *rope)
        if norm_cache is not None:
            dz, grads[norm_name] = ops.rms_norm_backward(dz, norm_cache)
        dx_part, part_grads = named_linear_backward(join_heads(dz), linear_cache)
        dx, grads = dx + dx_part, grads | part_grads
    return dx, grads


def feed_forward(
    config: ModelConfig, tensors: Tensors, prefix: str, x: Float[np.ndarray, "B S D"]
) -> tuple[Float[np.ndarray, "B S D"], Cache]:
    """Clause 5.8: `down(silu(gate(x)) * up(x))`."""
    gate, gate_cache = named_linear(config, tensors, f"{prefix}.gate_proj", x)
    up, up_cache = named_linear(config, tensors, f"{prefix}.up_proj", x)
    z, swiglu_cache = ops.swiglu(gate, up)
    y, down_cache = named_linear(config, tensors, f"{prefix}.down_proj", z)
    return y, (gate_cache, up_cache, swiglu_cache, down_cache)


def feed_forward_backward(
    dy: Float[np.ndarray, "B S D"], cache: Cache
) -> tuple[Float[np.ndarray, "B S D"], Grads]:
    """The steps of `feed_forward`, last to first."""
    gate_cache, up_cache, swiglu_cache, down_cache = cache
    dz, down_grads = named_linear_backward(dy, down_cache)
    dgate, dup = ops.swiglu_backward(dz, swiglu_cache)
    dx_gate, gate_grads = named_linear_backward(dgate, gate_cache)
    dx_up, up_grads = named_linear_backward(dup, up_cache)
    return dx_gate + dx_up, down_grads | gate_grads | up_grads
