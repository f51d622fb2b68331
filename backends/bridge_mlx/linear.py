"""Linear layers as the backend stores them: checkpoint matrices stacked along their outputs.

One GEMM then reads q, k and v (or gate and up) at once, and `parts` splits the stack back byte for
byte. How a weight is stored and multiplied is known here alone.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from jaxtyping import Float, Int

# MLX's wheels for Linux bring reference BLAS, twice as fast where no factor is transposed.
WEIGHT_FIRST = sys.platform != "darwin"


@dataclass(frozen=True)
class Linear:
    """`x @ weight.T + bias` (clause 2.1: weights are `[out, in]`)."""

    names: tuple[str, ...]  # checkpoint names without `.weight` and `.bias`, in stacking order
    sizes: tuple[int, ...]  # outputs of each
    weight: Float[mx.array, "out in"]
    bias: Float[mx.array, " out"] | None = None

    @classmethod
    def stack(cls, names: tuple[str, ...], get: Callable[[str], mx.array], bias: bool) -> "Linear":
        """The matrices `names`, read through `get` and stacked along their outputs."""
        weights = [get(f"{name}.weight") for name in names]
        biases = [get(f"{name}.bias") for name in names] if bias else []
        return cls(
            names,
            tuple(len(w) for w in weights),
            weights[0] if len(weights) == 1 else mx.concatenate(weights),
            mx.concatenate(biases) if biases else None,
        )

    def __call__(self, x: Float[mx.array, "... in"]) -> Float[mx.array, "... out"]:
        if WEIGHT_FIRST and mx.default_device().type == mx.cpu:
            cells = mx.contiguous(mx.flatten(x, 0, -2).T)
            bias = None if self.bias is None else self.bias[:, None]
            return mx.contiguous(_product(self.weight, cells, bias).T).reshape(*x.shape[:-1], -1)
        return _product(x, self.weight.T, self.bias)

    def parts(self) -> Iterator[tuple[str, mx.array]]:
        """Each stacked tensor by its checkpoint name."""
        ends = [sum(self.sizes[: i + 1]) for i in range(len(self.sizes))]
        for kind, stacked in (("weight", self.weight), ("bias", self.bias)):
            if stacked is not None:
                for name, size, end in zip(self.names, self.sizes, ends, strict=True):
                    yield f"{name}.{kind}", stacked[end - size : end]

    def substitute(self, tensors: Mapping[str, mx.array]) -> "Linear":
        """This layer with the tensors in `tensors` in place of its own, differentiably."""
        mine = dict(self.parts())
        if not mine.keys() & tensors.keys():
            return self
        return Linear.stack(
            self.names, lambda name: tensors.get(name, mine[name]), self.bias is not None
        )


def _product(a: mx.array, b: mx.array, bias: mx.array | None) -> mx.array:
    """`a @ b + bias`, rounded once."""
    return a @ b if bias is None else mx.addmm(bias, a, b)


@mx.custom_function
def _embed(weight: mx.array, tokens: mx.array) -> mx.array:
    return weight[tokens]


@_embed.vjp
def _(primals, cotangent, _output):
    weight, tokens = primals
    zeros = mx.zeros(weight.shape, mx.float32)
    grad = zeros.at[tokens].add(cotangent.astype(mx.float32))
    return grad.astype(weight.dtype), mx.zeros_like(tokens)


def embed(weight: Float[mx.array, "V D"], tokens: Int[mx.array, "..."]) -> mx.array:
    """`weight[tokens]` (clause 5.2). Its gradient adds up in float32: a common token has many
    cells, which MLX's own scatter would add in the dtype of the weight."""
    rows: Any = _embed(weight, tokens)
    return rows
