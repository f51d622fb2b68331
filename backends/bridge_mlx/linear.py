"""Linear layers as the backend stores them: checkpoint matrices stacked along their outputs.

One product then reads q, k and v (or gate and up) at once, and `parts` splits the stack back byte
for byte. A weight is an array, or packed integers that stay packed (clause 9.11): how it is stored,
multiplied and looked up is known here alone.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import mlx.core as mx
from jaxtyping import Float, Int, UInt

from bridge.config import LoraConfig
from bridge.errors import BridgeError

# MLX's wheels for Linux bring reference BLAS, twice as fast where no factor is transposed.
WEIGHT_FIRST = sys.platform != "darwin"


@dataclass(frozen=True)
class Quantised:
    """A matrix `[out, in]` of packed integers, a scale and a bias a group of them."""

    integers: UInt[mx.array, "out words"]
    scales: Float[mx.array, "out groups"]
    biases: Float[mx.array, "out groups"]
    bits: int
    group_size: int

    @property
    def arrays(self) -> tuple[mx.array, mx.array, mx.array]:
        """All that it holds."""
        return self.integers, self.scales, self.biases

    @property
    def dtype(self) -> mx.Dtype:
        """What it is multiplied in."""
        return self.scales.dtype

    @property
    def packing(self) -> dict[str, Any]:
        """As MLX's functions take it."""
        return {"group_size": self.group_size, "bits": self.bits}

    def __len__(self) -> int:
        return len(self.integers)

    def __getitem__(self, rows: Any) -> "Quantised":
        """Some rows: a slice, or an array of their numbers."""
        return self.holding(a[rows] for a in self.arrays)

    def holding(self, arrays: Iterable[mx.array]) -> "Quantised":
        """Other arrays, packed in the same way."""
        integers, scales, biases = arrays
        return Quantised(integers, scales, biases, self.bits, self.group_size)

    def floats(self) -> Float[mx.array, "out in"]:
        """The matrix itself, rounded once."""
        return mx.dequantize(*self._wide(mx.float32), **self.packing).astype(self.dtype)

    def product(self, x: Float[mx.array, "... in"], bias: mx.array | None) -> mx.array:
        """`x @ weight.T + bias`.

        MLX adds up in float32 on a GPU, but in the dtype of `x` on a CPU, where float32 throughout
        is nearer the truth, and faster.
        """
        dtype = mx.float32 if mx.default_device().type == mx.cpu else self.dtype
        y = mx.quantized_matmul(x.astype(dtype), *self._wide(dtype), **self.packing)
        return (y if bias is None else y + bias).astype(self.dtype)

    def _wide(self, dtype: mx.Dtype) -> tuple[mx.array, mx.array, mx.array]:
        return self.integers, self.scales.astype(dtype), self.biases.astype(dtype)


Weight = mx.array | Quantised  # [out, in]


@dataclass(frozen=True)
class Update:
    """A low-rank update of one matrix: `scale * up @ down` (clause 5.10)."""

    down: Float[mx.array, "r in"]  # lora_A
    up: Float[mx.array, "out r"]  # lora_B
    scale: float

    def added(self, weight: Float[mx.array, "out in"]) -> Float[mx.array, "out in"]:
        """The matrix with it, in float32, rounded once."""
        up, down = self.up.astype(mx.float32), self.down.astype(mx.float32)
        return (weight.astype(mx.float32) + self.scale * (up @ down)).astype(weight.dtype)


@dataclass(frozen=True)
class Linear:
    """`x @ weight.T + bias` (clause 2.1: weights are `[out, in]`), with low-rank updates."""

    names: tuple[str, ...]  # checkpoint names without `.weight` and `.bias`, in stacking order
    sizes: tuple[int, ...]  # outputs of each
    weights: tuple[Weight, ...]  # one; several where neighbours are not stored in the same way
    bias: Float[mx.array, " out"] | None = None
    updates: tuple[Update | None, ...] = ()  # one a name, or none at all

    @classmethod
    def stack(
        cls,
        names: tuple[str, ...],
        get: Callable[[str], Any],
        bias: bool,
        lora: LoraConfig | None = None,
    ) -> "Linear":
        """The matrices `names`, read through `get` and stacked along their outputs; those that are
        targets of `lora` have updates."""
        weights: list[Weight] = [get(f"{name}.weight") for name in names]
        biases = [get(f"{name}.bias") for name in names] if bias else []
        updates = []
        for name in names:
            if lora is None or name.rpartition(".")[2] not in lora.targets:
                updates.append(None)
                continue
            down, up = (get(f"{name}.lora_{matrix}.weight") for matrix in "AB")
            updates.append(Update(down, up, lora.scale))
        return cls(
            names,
            tuple(len(w) for w in weights),
            tuple(_concatenate(list(alike)) for _, alike in groupby(weights, _storage)),
            mx.concatenate(biases) if biases else None,
            tuple(updates) if any(updates) else (),
        )

    def __call__(self, x: Float[mx.array, "... in"], first: int = 0) -> mx.array:
        """`[..., out]`; without the first so many of the outputs, which are not computed (where
        there are no updates)."""
        outputs, start = [], 0
        for weight in self.weights:
            end, begin = start + len(weight), max(start, first)
            if begin < end:
                bias = None if self.bias is None else self.bias[begin:end]
                own = weight[begin - start :] if begin > start else weight
                outputs.append(_product(x, own, bias))
            start = end
        y = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=-1)
        return y + self._added(x) if self.updates else y

    def _added(self, x: Float[mx.array, "... in"]) -> Float[mx.array, "... out"]:
        """What the updates add, scale * up (down x); all of `down x` in one product."""
        updates = [update for update in self.updates if update is not None]
        low = _product(x, _concatenate([update.down for update in updates]), None)
        lows = iter(mx.split(low * updates[0].scale, len(updates), axis=-1))
        parts = [
            mx.zeros((*x.shape[:-1], size), x.dtype)
            if update is None
            else _product(next(lows), update.up, None)
            for update, size in zip(self.updates, self.sizes, strict=True)
        ]
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)

    def parts(self) -> Iterator[tuple[str, Weight]]:
        """Each stacked tensor by its checkpoint name, and those of updates."""
        for kind, stacks in (("weight", self.weights), ("bias", (self.bias,))):
            named = zip(self.names, self.sizes, strict=True)
            for stack in stacks:
                start = 0
                while stack is not None and start < len(stack):
                    name, size = next(named)
                    yield f"{name}.{kind}", stack[start : start + size]
                    start += size
        yield from self._of_updates().items()

    def _of_updates(self) -> dict[str, mx.array]:
        tensors = {}
        for name, update in zip(self.names, self.updates, strict=False):
            if update is not None:
                tensors[f"{name}.lora_A.weight"] = update.down
                tensors[f"{name}.lora_B.weight"] = update.up
        return tensors

    def substitute(self, tensors: Mapping[str, mx.array]) -> "Linear":
        """This layer with the tensors in `tensors` in place of its own, differentiably."""
        if self._of_updates().keys() & tensors.keys():
            updates = [
                update
                and replace(
                    update,
                    down=tensors.get(f"{name}.lora_A.weight", update.down),
                    up=tensors.get(f"{name}.lora_B.weight", update.up),
                )
                for name, update in zip(self.names, self.updates, strict=True)
            ]
            return replace(self, updates=tuple(updates)).substitute(
                {name: x for name, x in tensors.items() if ".lora_" not in name}
            )
        mine = dict(self.parts())
        if not mine.keys() & tensors.keys():
            return self
        stacked = Linear.stack(
            self.names, lambda name: tensors.get(name, mine[name]), self.bias is not None
        )
        return replace(stacked, updates=self.updates)

    def merged(self) -> "Linear":
        """This layer with its updates in the matrices; a packed one keeps its own beside it."""
        if not self.updates:
            return self
        matrices = {name: part for name, part in self.parts() if name.endswith("_proj.weight")}
        updates = list(self.updates)
        for i, (name, update) in enumerate(zip(matrices, self.updates, strict=True)):
            weight = matrices[name]
            if update is not None and not isinstance(weight, Quantised):
                matrices[name], updates[i] = update.added(weight), None
        if updates == list(self.updates):
            return self
        stacked = Linear.stack(self.names, matrices.__getitem__, False)
        return replace(stacked, bias=self.bias, updates=tuple(updates) if any(updates) else ())


def _storage(weight: Weight) -> tuple[int, ...]:
    """Weights of which this is equal can be one stack."""
    return (weight.bits, weight.group_size) if isinstance(weight, Quantised) else ()


def _concatenate(weights: list[Any]) -> Weight:
    """Weights of one storage, one after the other."""
    first: Weight = weights[0]
    if len(weights) == 1:
        return first
    if isinstance(first, Quantised):
        columns = zip(*(weight.arrays for weight in weights), strict=True)
        return first.holding(mx.concatenate(list(column)) for column in columns)
    return mx.concatenate(weights)


def _product(x: Float[mx.array, "... in"], weight: Weight, bias: mx.array | None) -> mx.array:
    """`x @ weight.T + bias`, rounded once."""
    if isinstance(weight, Quantised):
        return weight.product(x, bias)
    if WEIGHT_FIRST and mx.default_device().type == mx.cpu:
        cells = mx.contiguous(mx.flatten(x, 0, -2).T)
        column = None if bias is None else bias[:, None]
        return mx.contiguous(_dense(weight, cells, column).T).reshape(*x.shape[:-1], -1)
    return _dense(x, weight.T, bias)


def _dense(a: mx.array, b: mx.array, bias: mx.array | None) -> mx.array:
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


def embed(weight: Weight, tokens: Int[mx.array, "..."]) -> Float[mx.array, "... D"]:
    """`weight[tokens]` (clause 5.2). Its gradient adds up in float32: a common token has many
    cells, which MLX's own scatter would add in the dtype of the weight."""
    if isinstance(weight, Quantised):
        return weight[tokens].floats()
    rows: Any = _embed(weight, tokens)
    return rows


def evaluate(parts: Iterable[tuple[str, Weight]]) -> None:
    """Compute what is held of each named tensor; what is packed stays so."""
    mx.eval([part.arrays if isinstance(part, Quantised) else part for _, part in parts])


def floats(part: Weight) -> mx.array:
    """The numbers of a tensor."""
    return part.floats() if isinstance(part, Quantised) else part


def chosen(
    parts: Iterable[tuple[str, Weight]], names: Iterable[str], purpose: str
) -> dict[str, mx.array]:
    """The tensors `names`, for what they were named for. Raises BridgeError for one that is packed:
    it has no gradient, and no place for floats."""
    named, found = dict(parts), {}
    for name in names:
        part = named[name]
        if isinstance(part, Quantised):
            raise BridgeError(
                f"{purpose}: {name} is quantised, which cannot be trained; train the blocks alone, "
                "or convert the model without quantisation"
            )
        found[name] = part
    return found
