"""A host decoder of the Llama family with Bridge blocks after its FFNs (chapters 3 and 5).

One layer serves teacher forcing, prefill and decoding: they differ only in how a query finds the
keys and values that it may read, so that is passed in. Weights are a dictionary by checkpoint name,
in canonical order; trained ones take the place of others by being put into a copy of it.

Axes: B rows, S timesteps, D model width, V vocabulary, K key heads, M query heads that share one,
d head width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from bridge.config import ModelConfig
from bridge.rope import inverse_frequencies

from bridge_example.block import Grid, Weights, added, block, norm_ratio
from bridge_example.tape import Array, Var, linear, recompute, rms_norm, silu, softmax

# Layer number, q [B, S, K, M, d], k and v [B, S, K, d]; gives y [B, S, K, M, d].
Attend = Callable[[int, Var, Var, Var], Var]


@dataclass(frozen=True)
class Cells:
    """What the layers need to know of a batch beside its residual stream."""

    grid: Grid
    active: Array  # [B, S] bool
    rope: tuple[Array, Array]  # cos and sin, [B, S, 1, d]


class Transformer:
    """The weights of a model, and what is computed with them."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config, self.weights = config, weights
        self.frequencies, self.factor = inverse_frequencies(config.rope, config.head_dim)

    def cells(self, groups: Array, active: Array, positions: Array) -> Cells:
        """Of a batch `[B, S]`; rope's angles are float64 until cos and sin are taken."""
        angles = positions[..., None] * np.concatenate([self.frequencies] * 2)
        # The sign of the rotation stands in the table: x * cos + (halves of x swapped) * sin.
        sign = np.repeat([-1.0, 1.0], len(self.frequencies))
        cos, sin = np.cos(angles) * self.factor, np.sin(angles) * sign * self.factor
        rope = tuple(table.astype(np.float32)[..., None, :] for table in (cos, sin))
        return Cells(Grid(groups), active, (rope[0], rope[1]))

    def teacher_forced(
        self,
        tokens: Array,
        groups: Array,
        active: Array,
        positions: Array,
        checkpoint_activations: bool = False,
    ) -> Var:
        """`tokens [B, S]` to the residual stream after the last layer, `[B, S, D]`."""
        attend = causal(active, positions, self.config.sliding_windows)
        tokens = np.where(active, tokens, 0)  # what padding holds may be no token at all
        cells = self.cells(groups, active, positions)
        return self.layers(tokens, cells, attend, checkpoint_activations)

    def layers(
        self, tokens: Array, cells: Cells, attend: Attend, checkpoint_activations: bool = False
    ) -> Var:
        """Embedding and every layer: `[B, S, D]`."""
        h = self.weights["model.embed_tokens.weight"][tokens]
        for i in range(self.config.num_hidden_layers):
            layer = partial(self.layer, i, cells=cells, attend=attend)
            h = recompute(layer, h) if checkpoint_activations else layer(h)
        return h

    def norm_ratios(self, tokens: Array, groups: Array, active: Array, positions: Array) -> Array:
        """How much each block adds to what it reads, in order of layers (clause 3.9)."""
        attend = causal(active, positions, self.config.sliding_windows)
        cells, bridge = self.cells(groups, active, positions), self.config.bridge
        h = self.weights["model.embed_tokens.weight"][np.where(active, tokens, 0)]
        ratios = []
        for i in range(self.config.num_hidden_layers):
            h = self.host_layer(i, h, cells, attend)
            if bridge is not None and i in bridge.layers:
                prefix = f"model.layers.{i}.bridge"
                y = added(h, self.weights, prefix, bridge, cells.grid, active)
                ratios.append(norm_ratio(h, y, active))
                h = h + y
        return np.array(ratios, np.float32)

    def layer(self, i: int, h: Var, cells: Cells, attend: Attend) -> Var:
        """The host's layer, and the block that follows its FFN (clause 3.7)."""
        h, bridge = self.host_layer(i, h, cells, attend), self.config.bridge
        if bridge is None or i not in bridge.layers:
            return h
        prefix = f"model.layers.{i}.bridge"
        return block(h, self.weights, prefix, bridge, cells.grid, cells.active)

    def host_layer(self, i: int, h: Var, cells: Cells, attend: Attend) -> Var:
        """Attention and FFN on the residual stream (clause 5.3)."""
        name = f"model.layers.{i}"
        q, k, v = self.project(name, self.norm(h, f"{name}.input_layernorm"), cells)
        y = attend(i, q, k, v)
        h = h + self.linear(y.reshape(*h.shape[:2], -1), f"{name}.self_attn.o_proj")
        x = self.norm(h, f"{name}.post_attention_layernorm")
        gate, up = (self.linear(x, f"{name}.mlp.{part}_proj") for part in ("gate", "up"))
        return h + self.linear(silu(gate) * up, f"{name}.mlp.down_proj")

    def project(self, name: str, x: Var, cells: Cells) -> tuple[Var, Var, Var]:
        """q `[B, S, K, M, d]`, k and v `[B, S, K, d]`: normed (qwen3) and turned (clause 5.4)."""
        c, (B, S) = self.config, x.shape[:2]
        q, k, v = (
            self.linear(x, f"{name}.self_attn.{part}_proj").reshape(B, S, -1, c.head_dim)
            for part in "qkv"
        )
        if c.qk_norm:
            q = self.norm(q, f"{name}.self_attn.q_norm")
            k = self.norm(k, f"{name}.self_attn.k_norm")
        q, k = rotate(q, cells.rope), rotate(k, cells.rope)
        return q.reshape(B, S, c.num_key_value_heads, -1, c.head_dim), k, v

    def logits(self, h: Var) -> Var:
        """Final norm and head: `[..., D]` to `[..., V]` (clause 5.2)."""
        tied = self.config.tie_word_embeddings
        head = "model.embed_tokens" if tied else "lm_head"
        return self.linear(self.norm(h, "model.norm"), head)

    def norm(self, x: Var, name: str) -> Var:
        """A norm of the host, by the name of its tensor."""
        return rms_norm(x, self.weights[f"{name}.weight"], self.config.rms_norm_eps)

    def linear(self, x: Var, name: str) -> Var:
        """A linear map, with the bias and the low-rank update (clause 5.10) that it has or not."""
        y = linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))
        lora = self.config.lora
        if lora is None or name.rpartition(".")[2] not in lora.targets:
            return y
        a, b = (self.weights[f"{name}.lora_{part}.weight"] for part in "AB")
        return y + linear(linear(x, a), b) * lora.scale


def rotate(x: Var, rope: tuple[Array, Array]) -> Var:
    """Turn each head `[..., d]` by its position, in Hugging Face's layout of halves (5.6)."""
    cos, sin = rope
    return x * cos + x.roll(x.shape[-1] // 2) * sin


def causal(active: Array, positions: Array, windows: tuple[int | None, ...]) -> Attend:
    """Every active cell reads the active cells up to it, inside its layer's window (5.4, 5.5)."""
    S = active.shape[1]
    seen = active[:, :, None] & active[:, None, :] & np.tri(S, dtype=bool)  # [B, S, S]
    behind = positions[:, :, None] - positions[:, None, :]
    allowed = {w: seen if w is None else seen & (behind < w) for w in {None, *windows}}

    def attend(i: int, q: Var, k: Var, v: Var) -> Var:
        here = allowed[windows[i] if windows else None]
        return read(q, k, v, here[:, None, None])

    return attend


def read(q: Var, k: Var, v: Var, allowed: Array) -> Var:
    """Attention of `q [B, S, K, M, d]` over `k, v [B, T, K, d]`, where `allowed` broadcasts to
    `[B, K, M, S, T]`; 0 where nothing is."""
    B, T, K, d = k.shape
    q = q.transpose(0, 2, 3, 1, 4)  # [B, K, M, S, d]
    k = k.transpose(0, 2, 3, 1).reshape(B, K, 1, d, T)
    v = v.transpose(0, 2, 1, 3).reshape(B, K, 1, T, d)
    p = softmax(q @ k * d**-0.5, allowed)
    return (p @ v).transpose(0, 3, 1, 2, 4)
