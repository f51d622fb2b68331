"""A host decoder of the Llama family with Bridge blocks after its FFNs (chapters 3 and 5).

The teacher-forced forward over `[B, S]` cells, of which some may be inactive. Prefill is the same
forward with keys and values kept. Weights are in plain dataclasses, in the order that data flows.
Nothing here evaluates: graphs are built, and whoever asked evaluates what it needs.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Bool, Float, Int

from bridge.config import ModelConfig
from bridge.decoding.rows import causal_alone, only_active
from bridge.rope import rotation_tables
from bridge_mlx.block import Block, Grid, Sharing, fused, rms_norm, silu
from bridge_mlx.linear import Linear, Weight, embed, evaluate

Keep = Callable[[int, mx.array, mx.array], None]


class Rope:
    """Tables of cos and sin by position, from float64 on the host (clause 5.6).

    `mx.fast.rope` computes its angles in float32, which at position 30000 can be off by 1e-3;
    nor does it take a position a cell, or yarn's attention factor.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._grow(0)

    def _grow(self, length: int) -> None:
        tables = rotation_tables(self.config.rope, self.config.head_dim, length)
        self.tables = mx.array(tables.astype(np.float32))

    def reserve(self, length: int) -> None:
        """Make room for positions below `length`."""
        if length > self.tables.shape[1]:
            self._grow(-(-length // 256) * 256)

    def __call__(self, positions: Int[np.ndarray, "..."]) -> Float[mx.array, "two ... d"]:
        """cos and sin of positions below what was reserved."""
        return mx.take(self.tables, mx.array(positions.astype(np.int32)), axis=1)


def rotate(x: Float[mx.array, "... heads d"], rope: Float[mx.array, "two ... d"]) -> mx.array:
    """Turn each head by its position, in Hugging Face's layout of halves, in float32."""
    cos, sin = mx.expand_dims(rope, -2)
    left, right = mx.split(x, 2, axis=-1)
    return _turn(x, mx.concatenate([right, left], axis=-1), cos, sin)


@fused
def _turn(x: mx.array, swapped: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    return (x * cos + swapped * sin).astype(x.dtype)


@dataclass(frozen=True)
class Cells:
    """What the layers need to know of a batch beside its hidden states; made once a call."""

    sharing: Sharing
    rope: Float[mx.array, "two B S d"]
    masks: Mapping[int | None, Bool[mx.array, "B one S S"] | None]  # by window; None: causal


@dataclass(frozen=True)
class Layer:
    """One decoder layer, and the Bridge block that follows its FFN (clause 3.7)."""

    prefix: str
    input_norm: Float[mx.array, " D"]
    qkv: Linear
    q_norm: Float[mx.array, " d"] | None
    k_norm: Float[mx.array, " d"] | None
    o: Linear
    post_norm: Float[mx.array, " D"]
    gate_up: Linear
    down: Linear
    block: Block | None
    window: int | None

    def parts(self) -> Iterator[tuple[str, Weight]]:
        """Its tensors by checkpoint name."""
        yield from self.norms().items()
        for linear in (self.qkv, self.o, self.gate_up, self.down):
            yield from linear.parts()
        if self.block is not None:
            yield from self.block.parts()

    def norms(self) -> dict[str, mx.array]:
        """The norms' weights by checkpoint name."""
        named = {
            f"{self.prefix}.input_layernorm.weight": self.input_norm,
            f"{self.prefix}.self_attn.q_norm.weight": self.q_norm,
            f"{self.prefix}.self_attn.k_norm.weight": self.k_norm,
            f"{self.prefix}.post_attention_layernorm.weight": self.post_norm,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def substitute(self, tensors: Mapping[str, mx.array]) -> "Layer":
        """This layer with some tensors replaced, differentiably."""

        def norm(name: str, own: mx.array | None) -> mx.array | None:
            return tensors.get(f"{self.prefix}.{name}.weight", own)

        return replace(
            self,
            input_norm=norm("input_layernorm", self.input_norm),
            qkv=self.qkv.substitute(tensors),
            q_norm=norm("self_attn.q_norm", self.q_norm),
            k_norm=norm("self_attn.k_norm", self.k_norm),
            o=self.o.substitute(tensors),
            post_norm=norm("post_attention_layernorm", self.post_norm),
            gate_up=self.gate_up.substitute(tensors),
            down=self.down.substitute(tensors),
            block=self.block and self.block.substitute(tensors),
        )


class Transformer:
    """The weights of a model and its teacher-forced forward."""

    def __init__(self, config: ModelConfig, device: mx.Device, get: Callable[[str], Any]) -> None:
        """Read every tensor once, by its checkpoint name, through `get`: an array, or packed."""
        self.config, self.device = config, device
        self.embed: Weight = get("model.embed_tokens.weight")
        self.layers = []
        for i in range(config.num_hidden_layers):
            self.layers.append(_read_layer(config, i, get))
            evaluate(self.layers[i].parts())  # one by one: never two copies of the model
        self.norm = get("model.norm.weight")
        head = self.embed if config.tie_word_embeddings else get("lm_head.weight")
        self.head = Linear(("lm_head",), (len(head),), (head,))
        self.dtype = self.embed.dtype
        self.rope = Rope(config)

    def parts(self) -> Iterator[tuple[str, Weight]]:
        """Every tensor by checkpoint name."""
        yield "model.embed_tokens.weight", self.embed
        for layer in self.layers:
            yield from layer.parts()
        yield "model.norm.weight", self.norm
        if not self.config.tie_word_embeddings:
            yield from self.head.parts()

    def substitute(self, tensors: Mapping[str, mx.array]) -> "Transformer":
        """This model with some tensors replaced, differentiably; shares all others."""
        new = object.__new__(Transformer)
        new.__dict__.update(self.__dict__)
        new.embed = tensors.get("model.embed_tokens.weight", self.embed)
        new.layers = [layer.substitute(tensors) for layer in self.layers]
        new.norm = tensors.get("model.norm.weight", self.norm)
        new.head = self.head.substitute(tensors)
        if self.config.tie_word_embeddings:
            new.head = replace(self.head, weights=(new.embed,))
        return new

    def update(self, tensors: Mapping[str, mx.array]) -> None:
        """Take `tensors` as its own from now on."""
        self.__dict__.update(self.substitute(tensors).__dict__)
        evaluate(self.parts())

    def cells(self, groups: np.ndarray, active: np.ndarray, positions: np.ndarray) -> Cells:
        """Masks, rope and the grid of a batch `[B, S]`. Masks are `[B, 1, S, S]` where one is
        needed; a causal batch without padding, inside every window, needs none."""
        S = active.shape[1]
        positions = only_active(positions, active)
        self.rope.reserve(int(positions.max(initial=0)) + 1)
        place = mx.array(positions.astype(np.int32))
        on = None if active.all() else mx.array(active)
        masks: dict[int | None, mx.array | None] = {}
        for window in {layer.window for layer in self.layers}:
            if causal_alone(active, positions, window):
                masks[window] = None
                continue
            mask = mx.tri(S, dtype=mx.bool_)[None]
            if on is not None:
                mask = mask & on[:, None, :]
            if window is not None:
                mask = mask & (place[:, :, None] - place[:, None, :] < window)
            # Every cell may read itself, so that no softmax is empty; inactive ones give 0 below.
            masks[window] = mx.expand_dims(mask | mx.eye(S, dtype=mx.bool_), 1)
        return Cells(Sharing.of(Grid.of(groups), on, S), self.rope(positions), masks)

    def forward(
        self,
        tokens: Int[mx.array, "B S"],
        cells: Cells,
        keep: Keep | None = None,
        recompute: Mapping[str, mx.array] | None = None,
    ) -> Float[mx.array, "B S D"]:
        """Hidden states after the last layer; `keep` receives each layer's keys and values.

        `recompute`: the backward pass computes each layer again from its input (clause 7.11), and
        these tensors, which stand in for the model's, are what is differentiated.
        """
        h = embed(self.embed, tokens)
        for i, layer in enumerate(self.layers):
            if recompute is None:
                h = self._layer(i, layer, h, cells, keep)
                continue

            # A gradient reaches what a checkpoint is passed, and nothing that it closes over.
            def again(h, mine, i=i, layer=layer):
                return self._layer(i, layer.substitute(mine), h, cells, keep)

            mine = {n: x for n, x in recompute.items() if n.startswith(f"{layer.prefix}.")}
            h = mx.checkpoint(again)(h, mine)
        return h

    def norm_ratios(self, tokens: Int[mx.array, "B S"], cells: Cells) -> Float[mx.array, " blocks"]:
        """How much each block adds to what it reads, in order of layers (clause 3.9)."""
        h, ratios = embed(self.embed, tokens), []
        for i, layer in enumerate(self.layers):
            h = self._layer(i, replace(layer, block=None), h, cells, None)
            if layer.block is not None:
                ratios.append(layer.block.norm_ratio(h, cells.sharing))
                h = layer.block(h, cells.sharing)
        return mx.stack(ratios) if ratios else mx.zeros(0)

    def _layer(
        self,
        i: int,
        layer: Layer,
        h: Float[mx.array, "B S D"],
        cells: Cells,
        keep: Keep | None,
    ) -> Float[mx.array, "B S D"]:
        """Attention, FFN and block on the residual stream (clauses 5.3 and 3.7)."""
        x = rms_norm(h, layer.input_norm, self.config.rms_norm_eps)
        q, k, v = self.project(layer, x, cells.rope)
        if keep is not None:
            keep(i, k, v)
        h = h + layer.o(_attend(q, k, v, cells, layer.window))
        h = h + feed_forward(layer, rms_norm(h, layer.post_norm, self.config.rms_norm_eps))
        return h if layer.block is None else layer.block(h, cells.sharing)

    def project(
        self, layer: Layer, x: Float[mx.array, "... D"], rope: Float[mx.array, "two ... d"]
    ) -> tuple[mx.array, mx.array, mx.array]:
        """q `[..., heads, d]`, k and v `[..., kv_heads, d]`, with norms and rope applied."""
        c = self.config
        heads = mx.unflatten(layer.qkv(x), -1, (-1, c.head_dim))
        turning = c.num_attention_heads + c.num_key_value_heads
        qk, v = mx.split(heads, [turning], axis=-2)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = mx.split(qk, [c.num_attention_heads], axis=-2)
            q = rms_norm(q, layer.q_norm, c.rms_norm_eps)
            k = rms_norm(k, layer.k_norm, c.rms_norm_eps)
            return rotate(q, rope), rotate(k, rope), v
        q, k = mx.split(rotate(qk, rope), [c.num_attention_heads], axis=-2)
        return q, k, v

    def logits(self, h: Float[mx.array, "... D"]) -> Float[mx.array, "... V"]:
        """Final norm and head, then float32 (clause 5.2)."""
        h = rms_norm(h, self.norm, self.config.rms_norm_eps)
        return self.head(h).astype(mx.float32)


def feed_forward(layer: Layer, x: Float[mx.array, "... D"]) -> Float[mx.array, "... D"]:
    """SwiGLU (clause 5.8)."""
    gate, up = mx.split(layer.gate_up(x), 2, axis=-1)
    return layer.down(_gated(gate, up))


@fused
def _gated(gate: mx.array, up: mx.array) -> mx.array:
    return silu(gate) * up


def _attend(
    q: Float[mx.array, "B S heads d"],
    k: Float[mx.array, "B S kv_heads d"],
    v: Float[mx.array, "B S kv_heads d"],
    cells: Cells,
    window: int | None,
) -> Float[mx.array, "B S heads_d"]:
    """Causal attention over active cells inside the window (clauses 5.4 and 5.5)."""
    mask = cells.masks[window]
    q, k, v = q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2)
    out = mx.fast.scaled_dot_product_attention(
        q, k, v, scale=q.shape[-1] ** -0.5, mask="causal" if mask is None else mask
    )
    out = mx.flatten(out.swapaxes(1, 2), -2)
    active = cells.sharing.active
    return out if active is None else mx.where(active[..., None], out, 0)


def _read_layer(config: ModelConfig, i: int, get: Callable[[str], Any]) -> Layer:
    prefix = f"model.layers.{i}"

    def linear(part: str, *names: str, bias: bool) -> Linear:
        return Linear.stack(tuple(f"{prefix}.{part}.{n}_proj" for n in names), get, bias)

    def norm(name: str) -> mx.array:
        return get(f"{prefix}.{name}.weight")

    block = None
    bridge = config.bridge
    if bridge is not None and i in bridge.layers:
        attention = bridge.kind == "attention"
        block = Block(
            norm_name=f"{prefix}.bridge.norm.weight",
            norm=norm("bridge.norm"),
            inward=linear("bridge", *("qkv" if attention else ("up",)), bias=False),
            outward=linear("bridge", "o" if attention else "down", bias=False),
            num_heads=bridge.num_heads if attention else None,
            eps=bridge.norm_eps,
        )
    return Layer(
        prefix=prefix,
        input_norm=norm("input_layernorm"),
        qkv=linear("self_attn", *"qkv", bias=config.qkv_bias),
        q_norm=norm("self_attn.q_norm") if config.qk_norm else None,
        k_norm=norm("self_attn.k_norm") if config.qk_norm else None,
        o=linear("self_attn", "o", bias=config.o_bias),
        post_norm=norm("post_attention_layernorm"),
        gate_up=linear("mlp", "gate", "up", bias=config.mlp_bias),
        down=linear("mlp", "down", bias=config.mlp_bias),
        block=block,
        window=config.sliding_windows[i] if config.sliding_windows else None,
    )
