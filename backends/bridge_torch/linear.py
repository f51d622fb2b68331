"""Linear layers: a model's as decoding reads them, stacked, and the embedding that it learns with.

A stack is checkpoint matrices one after the other along their outputs: one GEMM reads q, k and v
(or gate and up) at once, and `parts` splits them again, byte for byte. A module's parameters may be
views into such a stack, which is then nobody's copy. On CPUs a stack is kept in oneDNN's blocked
layout: a decoding step reads every weight once, and for 3 to 16 rows that layout is two to three
times as fast as a plain GEMM. For fewer it is slower, so there weights are laid out by `suit`.
`narrow.py` has the kinds that hold fewer bits than they compute in.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

ROWS = 16  # what the blocked layout is tuned for; it serves any number
FEW = 2  # rows, up to which the plain layout is faster, by 1.2 to 1.6 times


@dataclass(eq=False)
class Linear:
    """`x @ weight.T + bias` (clause 2.1: weights are `[out, in]`), without gradients, from and to
    the dtype of `x`. How its numbers are held is what kinds differ in: here and in `narrow.py`."""

    names: tuple[str, ...]  # checkpoint names without `.weight` and `.bias`, in stacking order
    sizes: tuple[int, ...]  # outputs of each
    bias: Float[Tensor, " out"] | None = field(default=None, kw_only=True)

    def __call__(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        raise NotImplementedError

    def add_to(
        self, residual: Float[Tensor, "... out"], x: Float[Tensor, "... in"]
    ) -> Float[Tensor, "... out"]:
        """`residual + self(x)`."""
        return residual + self(x)

    def suit(self, rows: int) -> None:
        """Be laid out for products with so many rows; most kinds have one layout."""

    def floats(self) -> Float[Tensor, "out in"]:
        """The weight, in the plain layout; itself, where it is held so."""
        raise NotImplementedError

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """Each stacked tensor by its checkpoint name, in canonical order; views of what is computed
        with, where that is plain."""
        weights = self.floats().split(self.sizes)
        biases = (None,) * len(weights) if self.bias is None else self.bias.split(self.sizes)
        for name, weight, bias in zip(self.names, weights, biases, strict=True):
            yield f"{name}.weight", weight
            if bias is not None:
                yield f"{name}.bias", bias


@dataclass(eq=False)
class Whole(Linear):
    """In the dtype that it computes in."""

    weight: Float[Tensor, "out in"]  # plain or blocked

    def __call__(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        weight = self.weight  # once: `suit` may come between
        if weight.is_mkldnn:
            return torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, "none", [], "")
        return F.linear(x, weight, self.bias)

    def add_to(
        self, residual: Float[Tensor, "... out"], x: Float[Tensor, "... in"]
    ) -> Float[Tensor, "... out"]:
        """`residual + self(x)`; blocked, in one kernel that rounds once."""
        weight = self.weight
        if weight.is_mkldnn:
            linear = torch.ops.mkldnn._linear_pointwise.binary
            return linear(x, residual, weight, self.bias, "add")
        return F.linear(x, weight, self.bias).add_(residual)

    def suit(self, rows: int) -> None:
        """Lay the weight out for products with so many rows, if it is float32 on a CPU."""
        if self.weight.dtype != torch.float32 or not can_block(
            self.weight.device.type, self.weight.dtype
        ):
            return
        if rows > FEW and not self.weight.is_mkldnn:
            self.weight = blocked(self.weight)
        elif rows <= FEW and self.weight.is_mkldnn:
            self.weight = plain(self.weight)

    def floats(self) -> Float[Tensor, "out in"]:
        return plain(self.weight)


def stacked(parts: Sequence[Float[Tensor, "..."]]) -> Float[Tensor, "..."]:
    """The parts along their first axis: their own memory where they lie in it one after the other,
    contiguous, as the views of a stack do, and otherwise a copy."""
    first = parts[0]
    storage, end = first.untyped_storage().data_ptr(), first.storage_offset()
    for part in parts:
        there = part.untyped_storage().data_ptr() == storage and part.storage_offset() == end
        if not (there and part.is_contiguous()):
            return torch.cat(list(parts))
        end += part.numel()
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())


def stack_parameters(linears: Sequence[nn.Linear]) -> None:
    """Move their weights, and their biases, into stacks of which they are views from then on."""
    for kind in ("weight", "bias"):
        parts = [p.detach() for linear in linears if (p := getattr(linear, kind)) is not None]
        if len(parts) > 1:
            views = torch.cat(parts).split([len(part) for part in parts])
            for linear, view in zip(linears, views, strict=True):
                setattr(linear, kind, nn.Parameter(view))


class Embedding(nn.Embedding):
    """`weight[tokens]` (clause 5.2). Its gradient adds up in float32: a common token has many
    cells, which torch's own backward would add in the dtype of the weight."""

    def forward(self, input: Int[Tensor, "..."]) -> Float[Tensor, "... D"]:
        return _Embed.apply(self.weight, input)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(weight: Tensor, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        weight, tokens = inputs
        ctx.save_for_backward(tokens)
        ctx.outputs = len(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,), (tokens,) = gradients, ctx.saved_tensors
        add_up = torch.ops.aten.embedding_dense_backward
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        return add_up(wide, tokens, ctx.outputs, -1, False).to(gradient.dtype), None


def blocked(weight: Float[Tensor, "out in"]) -> Tensor:
    """A copy of a weight in oneDNN's blocked layout."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)


def plain(weight: Tensor) -> Float[Tensor, "out in"]:
    """A weight in the plain layout: the same bytes."""
    return weight.to_dense() if weight.is_mkldnn else weight


@cache
def can_block(device: str, dtype: torch.dtype) -> bool:
    """Whether the blocked layout works here, tried on a small matrix.

    What it needs is internal to torch and absent from some builds; without it all is the same,
    only slower.
    """
    if device != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    weight = torch.arange(15, dtype=dtype).reshape(3, 5)
    x = torch.ones(2, 5, dtype=dtype)
    try:
        got = Whole((), (), blocked(weight))(x)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.equal(got, F.linear(x, weight)) and torch.equal(plain(blocked(weight)), weight)
