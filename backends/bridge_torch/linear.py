"""Linear layers as the backend stores them: checkpoint matrices stacked along their outputs.

One GEMM then reads q, k and v (or gate and up) at once, and `parts` splits the stack back byte for
byte. Knows the names of what it holds, and nothing of models.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


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
        return F.linear(x, self.weight, self.bias)

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """Each stacked tensor by its checkpoint name; views, so that writing to one updates it."""
        for kind, stacked in (("weight", self.weight), ("bias", self.bias)):
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
