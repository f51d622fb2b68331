"""Linear layers as the backend stores them: checkpoint matrices stacked along their outputs.

One GEMM then reads q, k and v (or gate and up) at once, and `parts` splits the stack back byte for
byte. On CPUs a weight is kept in oneDNN's blocked layout, and only there: a decoding step reads
every weight once, and for a few rows that layout is two to three times as fast as a plain GEMM.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

ROWS = 16  # what the blocked layout is tuned for; it serves any number


@dataclass
class Linear:
    """`x @ weight.T + bias` (clause 2.1: weights are `[out, in]`)."""

    names: tuple[str, ...]  # checkpoint names without `.weight` and `.bias`, in stacking order
    sizes: tuple[int, ...]  # outputs of each
    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, " out"] | None = None

    @classmethod
    def stack(cls, names: tuple[str, ...], get: Callable[[str], Tensor], bias: bool) -> "Linear":
        """The matrices `names`, read through `get` and stacked along their outputs."""
        weights = [get(f"{name}.weight") for name in names]
        biases = [get(f"{name}.bias") for name in names] if bias else []
        return cls(
            names,
            tuple(len(w) for w in weights),
            weights[0] if len(weights) == 1 else torch.cat(weights),
            torch.cat(biases) if biases else None,
        )

    def __call__(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        if self.weight.is_mkldnn:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)

    def add_to(
        self, residual: Float[Tensor, "... out"], x: Float[Tensor, "... in"]
    ) -> Float[Tensor, "... out"]:
        """`residual + self(x)`; packed, in one kernel that rounds once."""
        if self.weight.is_mkldnn:
            linear = torch.ops.mkldnn._linear_pointwise.binary
            return linear(x, residual, self.weight, self.bias, "add")
        return residual + self(x)

    def pack(self) -> "Linear":
        """Move the weight to the blocked layout where this machine has it; no gradients then."""
        if can_pack(self.weight.device.type, self.weight.dtype):
            self.weight = packed(self.weight)
        return self

    def unpack(self) -> "Linear":
        """Back to the plain layout: the same bytes."""
        self.weight = plain(self.weight)
        return self

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """Each stacked tensor by its checkpoint name; unless packed, views of what is computed
        with, so that writing to one updates the layer."""
        for kind, stacked in (("weight", plain(self.weight)), ("bias", self.bias)):
            if stacked is not None:
                for name, part in zip(self.names, stacked.split(self.sizes), strict=True):
                    yield f"{name}.{kind}", part

    def substitute(self, tensors: Mapping[str, Tensor]) -> "Linear":
        """This layer with the tensors in `tensors` in place of its own, differentiably."""
        mine = dict(self.parts())
        if not mine.keys() & tensors.keys():
            return self
        return Linear.stack(
            self.names, lambda name: tensors.get(name, mine[name]), self.bias is not None
        )


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.outputs = len(weight)
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,), (tokens,) = gradients, ctx.saved_tensors
        add_up = torch.ops.aten.embedding_dense_backward
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        return add_up(wide, tokens, ctx.outputs, -1, False).to(gradient.dtype), None


def embed(weight: Float[Tensor, "V D"], tokens: Int[Tensor, "..."]) -> Float[Tensor, "... D"]:
    """`weight[tokens]` (clause 5.2). Its gradient adds up in float32: a common token has many
    cells, which torch's own backward would add in the dtype of the weight."""
    return _Embed.apply(weight, tokens)


def packed(weight: Float[Tensor, "out in"]) -> Tensor:
    """A weight in oneDNN's blocked layout."""
    return weight if weight.is_mkldnn else torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)


def plain(weight: Tensor) -> Float[Tensor, "out in"]:
    """A weight in the plain layout."""
    return weight.to_dense() if weight.is_mkldnn else weight


@cache
def can_pack(device: str, dtype: torch.dtype) -> bool:
    """Whether the blocked layout works here, tried on a small matrix.

    What it needs is internal to torch and absent from some builds; without it all is the same,
    only slower.
    """
    if device != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    weight = torch.arange(15, dtype=dtype).reshape(3, 5)
    x = torch.ones(2, 5, dtype=dtype)
    try:
        got = Linear((), (), packed(weight))(x)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.equal(got, F.linear(x, weight)) and torch.equal(plain(packed(weight)), weight)
