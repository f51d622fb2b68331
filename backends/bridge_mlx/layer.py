"""One decoder layer of a host, and the Bridge block that follows its FFN (clauses 3.7 and 5.3).

Weights in a plain dataclass, in the order that data flows: read once by checkpoint name, given back
by it, and replaced by it where tensors are trained.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from jaxtyping import Float

from bridge.config import ModelConfig
from bridge_mlx.attention import rotate
from bridge_mlx.block import Block, fused, rms_norm, silu
from bridge_mlx.linear import Linear, Weight


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
    head_dim: int
    eps: float

    @classmethod
    def read(cls, config: ModelConfig, i: int, get: Callable[[str], Any]) -> "Layer":
        """The weights of layer i, through `get`."""
        prefix = f"model.layers.{i}"

        def linear(part: str, *names: str, bias: bool) -> Linear:
            stacked = tuple(f"{prefix}.{part}.{n}_proj" for n in names)
            lora = None if part == "bridge" else config.lora
            return Linear.stack(stacked, get, bias, lora)

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
        return cls(
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
            head_dim=config.head_dim,
            eps=config.rms_norm_eps,
        )

    def project(
        self, h: Float[mx.array, "... D"], rope: Float[mx.array, "two ... d"]
    ) -> tuple[mx.array, mx.array, mx.array]:
        """q `[..., heads, d]`, k and v `[..., kv_heads, d]` of the residual stream, with norms and
        rope applied."""
        x = self.qkv(rms_norm(h, self.input_norm, self.eps))
        heads = mx.unflatten(x, -1, (-1, self.head_dim))
        kv = self.qkv.sizes[1] // self.head_dim
        qk, v = mx.split(heads, [heads.shape[-2] - kv], axis=-2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = mx.split(qk, [-kv], axis=-2)
            q = rms_norm(q, self.q_norm, self.eps)
            k = rms_norm(k, self.k_norm, self.eps)
            return rotate(q, rope), rotate(k, rope), v
        q, k = mx.split(rotate(qk, rope), [-kv], axis=-2)
        return q, k, v

    def finish(
        self, h: Float[mx.array, "... D"], mixed: Float[mx.array, "... heads_d"]
    ) -> Float[mx.array, "... D"]:
        """The residual stream after what attention mixed, and after the FFN; before the block."""
        h = h + self.o(mixed)
        gate, up = mx.split(self.gate_up(rms_norm(h, self.post_norm, self.eps)), 2, axis=-1)
        return h + self.down(_gated(gate, up))  # SwiGLU (clause 5.8)

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

    def merged(self) -> "Layer":
        """This layer with its low-rank updates in its matrices (clause 5.10)."""
        linear = {name: getattr(self, name).merged() for name in ("qkv", "o", "gate_up", "down")}
        return replace(self, **linear)

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


@fused
def _gated(gate: mx.array, up: mx.array) -> mx.array:
    return silu(gate) * up
