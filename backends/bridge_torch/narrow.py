"""Linear layers that hold fewer bits than they compute in, for decoding on CPUs.

What is held is a choice of whoever loads a model: bfloat16 and float16 weights as they are, or
8-bit and 4-bit integers made of them (clause 10.5). Activations are float32 in and out, so that all
of them serve the same step. A row's numbers do not depend on how many rows there are.
"""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from jaxtyping import BFloat16, Float, Int, Int8, UInt8
from torch import Tensor

from bridge.checkpoints.packing import Packed, quantise
from bridge.config.quantization import Quantization
from bridge_torch.block import wide
from bridge_torch.compiled import POINTER, SIZE, library
from bridge_torch.linear import Linear, Whole, blocked, can_block, stacked

SOURCE = Path(__file__).with_name("narrow.c")
# Exactly what torch's own operations do: no sum and product in one, nothing reordered.
OPTIONS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
SIGNATURES = {
    "round_rows": [POINTER] * 3 + [SIZE] * 2,
    "scale_back": [POINTER] * 6 + [SIZE] * 2,
}
NOTHING = 2.0**-100  # a row with no larger number counts as zeros
Hold = Callable[..., Linear]  # of matrices to be stacked, with `names`, `sizes` and `bias`
KINDS = ("int8", "int4")  # what weights may be asked for as
INT4 = Quantization(4, 32)  # what matrices are made that are not packed already
INT4_ROWS = 32  # in one call; more in turn are faster


@dataclass(eq=False)
class Half(Linear):
    """bfloat16 or float16 weights, held as float16 for FBGEMM, which adds up in float32.

    A matrix is held times a power of two, so that its large numbers are of float16's largest and
    its small ones exact down to 2^-31 of them. What is smaller yet counts as a rounded one, and is
    kept beside it.
    """

    held: Any  # FBGEMM's own
    factor: float  # what a held number counts
    lost: Int[Tensor, " lost"]  # places, in a flat matrix, of numbers that are not exact
    kept: Float[Tensor, " lost"]  # those numbers, in the model's dtype

    @classmethod
    def of(cls, weight: Float[Tensor, "out in"], **named: Any) -> "Half":
        top = float(weight.abs().max()) if weight.numel() else 0.0
        exponent = min(15 - int(np.frexp(top)[1]), 100) if top else 0
        scaled = weight.float() * 2.0**exponent  # exact: float32 has the room
        lost = (scaled.half().float() != scaled).flatten().nonzero()[:, 0]
        held = torch.ops.quantized.linear_prepack_fp16(scaled, None)
        return cls(
            **named, held=held, factor=2.0**-exponent, lost=lost, kept=weight.flatten()[lost]
        )

    def __call__(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        y = torch.ops.quantized.linear_dynamic_fp16(x, self.held).mul_(self.factor)
        return y if self.bias is None else y.add_(self.bias)

    def add_to(
        self, residual: Float[Tensor, "... out"], x: Float[Tensor, "... in"]
    ) -> Float[Tensor, "... out"]:
        y = torch.ops.quantized.linear_dynamic_fp16(x, self.held)
        y = torch.add(residual, y, alpha=self.factor)
        return y if self.bias is None else y.add_(self.bias)

    def floats(self) -> Float[Tensor, "out in"]:
        weight, _ = torch.ops.quantized.linear_unpack_fp16(self.held)
        weight = weight.mul_(self.factor).to(self.kept.dtype)
        weight.view(-1)[self.lost] = self.kept
        return weight


@dataclass(eq=False)
class Rounding(Linear):
    """Weights in a dtype that the processor multiplies in: activations are rounded to it."""

    inner: Whole  # without its bias

    def __call__(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        y = self.inner(x.to(self.inner.weight.dtype)).to(x.dtype)
        return y if self.bias is None else y.add_(self.bias)

    def floats(self) -> Float[Tensor, "out in"]:
        return self.inner.floats()


@dataclass(eq=False)
class Bits8(Linear):
    """8-bit integers and a scale an output; rows are rounded to 8 bits too (clause 10.5)."""

    integers: Int8[Tensor, "out in"]
    scales: Float[Tensor, " out"]
    dtype: torch.dtype  # of the weight that it was made of

    @classmethod
    def of(cls, weight: Float[Tensor, "out in"], **named: Any) -> "Bits8":
        values = weight.to(wide(weight.dtype))
        scales = values.abs().amax(1) / 127
        integers = (values / scales[:, None]).nan_to_num_(0).round_().to(torch.int8)
        return cls(**named, integers=integers, scales=scales, dtype=weight.dtype)

    def __call__(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        return self._product(x, None)

    def add_to(
        self, residual: Float[Tensor, "... out"], x: Float[Tensor, "... in"]
    ) -> Float[Tensor, "... out"]:
        return self._product(x, residual)

    def _product(self, x: Float[Tensor, "... in"], residual: Tensor | None) -> Tensor:
        rows, outputs = x.reshape(-1, x.shape[-1]), len(self.scales)
        if x.dtype == torch.float32 and x.device.type == "cpu" and _kernels() is not None:
            y = self._compiled(rows, None if residual is None else residual.contiguous())
            return y.view(*x.shape[:-1], outputs)
        integers, units = rounded_rows(rows)
        y = _exact_product(integers, self.integers).to(units.dtype).mul_(units).mul_(self.scales)
        y = (y if self.bias is None else y.add_(self.bias)).view(*x.shape[:-1], outputs)
        return (y if residual is None else y.add_(residual)).to(x.dtype)

    def _compiled(self, x: Float[Tensor, "R in"], residual: Tensor | None) -> Tensor:
        library, (R, K) = _kernels(), x.shape
        assert library is not None
        x, integers, units = x.contiguous(), x.new_empty(R, K, dtype=torch.int8), x.new_empty(R)
        library.round_rows(integers.data_ptr(), units.data_ptr(), x.data_ptr(), R, K)
        return self.scaled(_exact_product(integers, self.integers), units, residual)

    def scaled(
        self,
        sums: Int[Tensor, "R out"],
        units: Float[Tensor, " R"],
        residual: Float[Tensor, "R out"] | None = None,
    ) -> Float[Tensor, "R out"]:
        """What sums of products count, with the bias, and added to the residual if there is one."""
        library, (R, outputs) = _kernels(), sums.shape
        assert library is not None
        y = torch.empty(R, outputs)
        bias, other = (None if t is None else t.data_ptr() for t in (self.bias, residual))
        library.scale_back(
            *(y.data_ptr(), sums.data_ptr(), units.data_ptr(), self.scales.data_ptr()),
            *(bias, other, R, outputs),
        )
        return y

    def floats(self) -> Float[Tensor, "out in"]:
        return (self.integers * self.scales[:, None]).to(self.dtype)


@dataclass(eq=False)
class Bits4(Linear):
    """4-bit integers, a scale and a bias a group of them (clauses 9.11 and 10.5), in ATen's layout:
    `weight = (q - 8) * scale + zero`, multiplied and rounded as bfloat16."""

    integers: UInt8[Tensor, "outs in_2"]  # ATen's own order, of whole sixteens of outputs
    scales_and_zeros: BFloat16[Tensor, "groups outs two"]
    scales: Float[Tensor, "out groups"]  # as they are stored, float32
    biases: Float[Tensor, "out groups"]
    group_size: int
    dtype: torch.dtype  # of the weight

    @classmethod
    def of(cls, stored: Sequence[Packed], dtype: torch.dtype, **named: Any) -> "Bits4":
        """Of matrices that are packed alike, one after the other."""
        integers = np.concatenate([each.integers() for each in stored]).astype(np.int32)
        scales, biases = (
            torch.from_numpy(np.concatenate([side.astype(np.float32) for side in sides]))
            for sides in zip(*((each.scales, each.biases) for each in stored), strict=True)
        )
        more = -len(integers) % 16  # outputs that are nobody's
        integers = torch.nn.functional.pad(torch.from_numpy(integers), (0, 0, 0, more))
        pairs = torch.stack([scales, biases + 8 * scales], -1).transpose(0, 1)
        pairs = torch.nn.functional.pad(pairs, (0, 0, 0, more))
        return cls(
            **named,
            integers=torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 2),
            scales_and_zeros=pairs.to(torch.bfloat16).contiguous(),
            scales=scales,
            biases=biases,
            group_size=stored[0].group_size,
            dtype=dtype,
        )

    def __call__(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        pieces = [self._product(piece, self.scales_and_zeros) for piece in rows.split(INT4_ROWS)]
        y = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        y = y[:, : len(self.scales)].to(x.dtype)
        y = y if self.bias is None else y.add_(self.bias)
        return y.view(*x.shape[:-1], len(self.scales))

    def _product(self, x: Tensor, pairs: Tensor) -> Tensor:
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
        return product(x.contiguous(), self.integers, self.group_size, pairs)

    def floats(self) -> Float[Tensor, "out in"]:
        outputs, groups = self.scales.shape
        # The one way to ask for the integers: times 1, of a scale of 1, whose zero is 8.
        ask = torch.ones_like(self.scales_and_zeros)
        ask[..., 1] = 8
        ones = torch.eye(groups * self.group_size, dtype=torch.bfloat16)
        q = torch.cat([self._product(piece, ask) for piece in ones.split(INT4_ROWS)])
        q = q.t()[:outputs].float().reshape(outputs, groups, self.group_size)
        return (q * self.scales[..., None] + self.biases[..., None]).flatten(1).to(self.dtype)


def rounded_rows(
    x: Float[Tensor, "R in"],
) -> tuple[Int8[Tensor, "R in"], Float[Tensor, "R one"]]:
    """The integers of each row, and what they count: NaN in a row that holds NaN or infinity."""
    x = x.to(wide(x.dtype))
    top = x.abs().amax(1, keepdim=True)
    steps = torch.where(top > NOTHING, 127 / top, 0)
    units = top / 127 + (x * 0).sum(1, keepdim=True)
    return (x * steps).nan_to_num_(0).round_().to(torch.int8), units


def _exact_product(x: Int8[Tensor, "R in"], weight: Int8[Tensor, "out in"]) -> Int[Tensor, "R out"]:
    if x.device.type == "cpu":
        return torch.ops.aten._int_mm(x, weight.t())
    # CUDA's own asks for more than 16 rows, and sizes that 8 divides.
    (R, K), outputs = x.shape, len(weight)
    x = torch.nn.functional.pad(x, (0, -K % 8, 0, max(24 - R, -R % 8)))
    weight = torch.nn.functional.pad(weight, (0, -K % 8, 0, -outputs % 8))
    return torch.ops.aten._int_mm(x, weight.t())[:R, :outputs]


@cache
def _kernels() -> ctypes.CDLL | None:
    """What is around the product, compiled; None where that cannot be had."""
    return library(SOURCE, OPTIONS, SIGNATURES)


@cache
def can_hold_half() -> bool:
    """Whether FBGEMM is there, tried on a small matrix; some builds of torch lack it."""
    weight = torch.arange(15.0).reshape(3, 5).to(torch.bfloat16)
    try:
        layer = Half.of(weight, names=(), sizes=())
        return torch.equal(layer(torch.eye(5)).t(), weight.float()) and torch.equal(
            layer.floats(), weight
        )
    except (AttributeError, RuntimeError, TypeError):
        return False


@cache
def can_hold_int4() -> bool:
    """The same for ATen's 4-bit kernel."""
    weight = np.arange(64, dtype=np.float32).reshape(2, 32)
    try:
        layer = Bits4.of([quantise(weight, INT4)], torch.float32, names=(), sizes=())
        return bool(torch.isfinite(layer(torch.ones(1, 32))).all())
    except (AttributeError, RuntimeError, TypeError):
        return False


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this processor has instructions for products of bfloat16."""
    told = getattr(torch.cpu, "get_capabilities", dict)()
    return dtype == torch.bfloat16 and bool(told.get("avx512_bf16") or told.get("amx_bf16"))


def activations(dtype: torch.dtype, fused: bool) -> torch.dtype:
    """What a model of a dtype computes in while it decodes. `fused`: whether float32 has a step of
    its own here, which is worth more than computing in 16 bits, and no less exact."""
    short = dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if fused and short and (multiplies(dtype) or can_hold_half()) else dtype


def holding(
    dtype: torch.dtype, computes: torch.dtype, weights: str | None, stored: Mapping[str, Packed]
) -> Hold | None:
    """How to hold the host's matrices of a model of a dtype that `computes` in one; None: as they
    are. `weights`: as they were asked for. `stored`: those that a checkpoint has as 4-bit integers,
    which stay so."""
    if weights is None and not stored and computes == dtype:
        return None

    def hold(parts: Sequence[Tensor], *, names: Sequence[str], **named: Any) -> Linear:
        weight, named = stacked(parts), {"names": names, **named}
        if weights == "int8":
            return Bits8.of(weight, **named)
        packed = [stored.get(f"{name}.weight") for name in names]
        if weights == "int4" and weight.shape[1] % INT4.group_size == 0:
            packed = [p or quantised(part) for p, part in zip(packed, parts, strict=True)]
        found = [p for p in packed if p is not None]
        if len(found) == len(parts) and len({p.group_size for p in found}) == 1:
            return Bits4.of(found, dtype, **named)
        return _as_it_is(weight, computes, named)

    return hold


def _as_it_is(
    weight: Float[Tensor, "out in"], computes: torch.dtype, named: dict[str, Any]
) -> Linear:
    """A matrix in its own dtype."""
    if weight.dtype != computes and not multiplies(weight.dtype):
        return Half.of(weight, **named)
    held = blocked(weight) if can_block("cpu", weight.dtype) else weight
    if weight.dtype == computes:
        return Whole(**named, weight=held)
    return Rounding(**named, inner=Whole((), (), held))


def quantised(weight: Float[Tensor, "out in"]) -> Packed:
    """A matrix in 4 bits, as `bridge convert --quantize 4` makes it."""
    array = weight.to(torch.float32).numpy()
    if weight.dtype == torch.bfloat16:
        array = array.astype(ml_dtypes.bfloat16)
    return quantise(array, INT4)
