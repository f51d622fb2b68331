"""From a model that learns to one that decodes, and back.

With oneDNN's blocked layout, packing copies; without it a packed form shares the memory of
parameters that lie in a stack already, and holds no second copy. It reads weights alone: a model
whose parts are no longer what they were made as is refused, and hooks on them are not run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from bridge.config import ModelConfig
from bridge.errors import BridgeError
from bridge_torch.block import Block, Norm, PackedBlock
from bridge_torch.linear import Embedding, Linear, Whole, blocked, can_block, stacked
from bridge_torch.model import Attention, FeedForward, Layer, LoraLinear, Transformer
from bridge_torch.narrow import Hold
from bridge_torch.packed import Packed, PackedLayer, Part

M = TypeVar("M", bound=nn.Module)
P = TypeVar("P", PackedLayer, Linear)


@torch.inference_mode(False)  # or no parameters could be made of it again
@torch.no_grad()
def pack(
    model: Transformer,
    *,
    dtype: torch.dtype,
    fused: bool,
    consume: bool,
    hold: Hold | None = None,
    kept: Mapping[tuple[str, ...], Linear] = MappingProxyType({}),
    embed: Tensor | None = None,
) -> Packed:
    """Pack a model. `dtype`: of activations, the model's or float32. `fused`: for the fused step,
    which reads the weights of a block as they are. `consume`: leave its layers and an untied head
    empty, one by one, on the device `meta`, so that there are never two of the model; otherwise
    what is in the blocked layout has all its memory to itself. `hold`: how to hold the host's
    matrices; None: as they are. `kept`, `embed`: of the host's, those that were packed before and
    have not changed since. Raises BridgeError, naming it, for a part that is no longer what it
    was made as."""
    config, body = model.config, model.model
    weight = body.embed_tokens.weight
    blocks = can_block(weight.device.type, dtype)
    packing = _Packing(dtype, blocks, blocks and not consume, hold, kept)
    taken: list[Part] = []

    def take(part: P, module: nn.Module) -> P:
        taken.append(part)
        if consume:
            module.to("meta")
        return part

    if embed is None:
        embed, _ = _parameters("model.embed_tokens", body.embed_tokens, Embedding, nn.Embedding)
        embed = embed.clone() if packing.own else embed.contiguous()
    norm = packing.tensor("model.norm", body.norm, Norm)
    try:
        if model.lm_head is None:
            head = packing.held(("model.embed_tokens",), [embed], None)
        else:
            head = take(packing.linear("", {"lm_head": model.lm_head}), model.lm_head)
        layers = [take(packing.layer(config, i, m, fused), m) for i, m in enumerate(body.layers)]
    except BaseException:  # whatever it is, a Ctrl-C too, leaves the model as it was
        if consume:
            fill(model, taken)
        raise
    like = torch.empty(0, dtype=dtype, device=weight.device)
    return Packed(config, model.rope, like, embed, tuple(layers), norm, head)


def fill(model: Transformer, parts: list[Part], *, copy: bool = False) -> None:
    """Put parts back that packing took out of a model, one by one, each out of the list when it is
    back. `copy`: into memory of its own."""
    dtype = model.model.embed_tokens.weight.dtype
    while parts:
        for name, tensor in parts[-1].parts():
            model.put(name, tensor.to(dtype, copy=copy))
        parts.pop()


@dataclass(frozen=True)
class _Packing:
    """Reads modules as weights, for activations of a `dtype`. `blocks`: into the blocked layout.
    `own`: into memory that is not the module's, whatever the layout. `hold`: see `pack`."""

    dtype: torch.dtype
    blocks: bool
    own: bool
    hold: Hold | None
    kept: Mapping[tuple[str, ...], Linear]

    def tensor(self, name: str, module: nn.Module, *kinds: type[nn.Module]) -> Tensor:
        """The weight of a norm."""
        weight, _ = _parameters(name, module, *kinds)
        return weight.to(self.dtype, copy=self.own).contiguous()

    def linear(self, prefix: str, modules: dict[str, nn.Linear]) -> Linear:
        """Linear layers stacked, held as `hold` has it."""
        names = tuple(f"{prefix}{name}" for name in modules)
        if names in self.kept:
            return self.kept[names]
        return self.held(*self._read(prefix, modules))

    def held(self, names: tuple[str, ...], weights: list[Tensor], bias: Tensor | None) -> Linear:
        """Matrices stacked, held as `hold` has it."""
        sizes = tuple(map(len, weights))
        if names in self.kept:
            return self.kept[names]
        if self.hold is not None:
            return self.hold(weights, names=names, sizes=sizes, bias=bias)
        if self.blocks:
            return Whole(names, sizes, blocked(stacked(weights)), bias=bias)
        return Whole(names, sizes, self._join(weights), bias=bias)

    def whole(self, prefix: str, modules: dict[str, nn.Linear], plain: bool) -> Whole:
        """Linear layers stacked, in the dtype of activations; `plain`: in the plain layout at any
        rate."""
        names, weights, bias = self._read(prefix, modules)
        weight = self._join([weight.to(self.dtype) for weight in weights])
        blocks = self.blocks and not plain
        return Whole(
            names, tuple(map(len, weights)), blocked(weight) if blocks else weight, bias=bias
        )

    def _read(
        self, prefix: str, modules: dict[str, nn.Linear]
    ) -> tuple[tuple[str, ...], list[Tensor], Tensor | None]:
        names = tuple(f"{prefix}{name}" for name in modules)
        read = [_linear(n, m) for n, m in zip(names, modules.values(), strict=True)]
        weights = [weight for weight, _ in read]
        if all(bias is None for _, bias in read):
            return names, weights, None
        biases = [w.new_zeros(len(w)) if b is None else b for w, b in read]
        return names, weights, self._join([bias.to(self.dtype) for bias in biases])

    def _join(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts) if self.own else stacked(parts)

    def layer(self, config: ModelConfig, i: int, layer: nn.Module, fused: bool) -> PackedLayer:
        """One decoder layer."""
        prefix = f"model.layers.{i}"
        layer = _known(prefix, layer, Layer)
        attention = _known(f"{prefix}.self_attn", layer.self_attn, Attention)
        ffn = _known(f"{prefix}.mlp", layer.mlp, FeedForward)
        attending, feeding = f"{prefix}.self_attn.", f"{prefix}.mlp."

        def norm(name: str, module: nn.Module | None) -> Tensor | None:
            return None if module is None else self.tensor(f"{prefix}.{name}", module, Norm)

        return PackedLayer(
            config=config,
            prefix=prefix,
            window=attention.window,
            input_norm=self.tensor(f"{prefix}.input_layernorm", layer.input_layernorm, Norm),
            qkv=self.linear(attending, attention.inward()),
            o=self.linear(attending, {"o_proj": attention.o_proj}),
            q_norm=norm("self_attn.q_norm", attention.q_norm),
            k_norm=norm("self_attn.k_norm", attention.k_norm),
            post_norm=self.tensor(
                f"{prefix}.post_attention_layernorm", layer.post_attention_layernorm, Norm
            ),
            gate_up=self.linear(feeding, ffn.inward()),
            down=self.linear(feeding, {"down_proj": ffn.down_proj}),
            block=None if layer.bridge is None else self.block(prefix, layer.bridge, fused),
        )

    def block(self, prefix: str, module: nn.Module, fused: bool) -> PackedBlock:
        """The block of a layer."""
        block = _known(f"{prefix}.bridge", module, Block)
        return PackedBlock(
            norm=self.tensor(f"{prefix}.bridge.norm", block.norm, Norm),
            inward=self.whole(f"{prefix}.bridge.", block.inward(), plain=fused),
            outward=self.whole(f"{prefix}.bridge.", block.outward(), plain=fused),
            num_heads=block.num_heads,
            eps=block.norm.eps,
        )


def _known(name: str, module: nn.Module, *kinds: type[M]) -> M:
    """The module, if it computes what one of these kinds does: decoding computes it anew."""
    if not any(type(module).forward is kind.forward for kind in kinds):
        raise BridgeError(
            f"{name} is a {type(module).__name__}, and decoding reads the weights of a "
            f"{kinds[0].__name__} alone; merge it into one first"
        )
    return cast(M, module)


def _linear(name: str, module: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear layer, with its low-rank update if it has one (clause 5.10)."""
    if not isinstance(module, LoraLinear):
        return _parameters(name, module, nn.Linear)
    _, bias = _parameters(name, module, LoraLinear)
    for part in ("lora_A", "lora_B"):
        _parameters(f"{name}.{part}", getattr(module, part), nn.Linear)
    return module.merged(), bias


def _parameters(name: str, module: nn.Module, *kinds: type[nn.Module]) -> tuple[Tensor, Any]:
    """Weight and bias, if it has one, as plain tensors."""
    found: Any = _known(name, module, *kinds)
    weight, bias = found.weight, getattr(found, "bias", None)
    if type(weight) not in (Tensor, nn.Parameter):
        raise BridgeError(
            f"{name}.weight is a {type(weight).__name__}, and decoding reads plain tensors; "
            "gather it first"
        )
    return weight.detach(), None if bias is None else bias.detach()
