"""Affine quantisation as MLX packs it (clause 9.11): small integers, a scale and a bias a group.

`weight[o, i] = scales[o, i // group_size] * q[o, i] + biases[o, i // group_size]`. The q of a row
follow each other from the lowest bit of its first uint32 on, `bits` bits each, and may straddle two
words. NumPy alone: packing gives MLX's own bytes, and unpacking needs no MLX.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from jaxtyping import Float, UInt

from bridge.checkpoints.tensor_specs import TensorSpec
from bridge.config.quantization import Quantization
from bridge.errors import BridgeError
from bridge.numbers.rounding import rounded

SCALES = ("float32", "bfloat16", "float16")
PIECE = 1 << 20  # numbers unpacked at a time: memory stays that of the result


@dataclass(frozen=True)
class Packed:
    """A quantised matrix `[out, in]` as it is stored."""

    weight: UInt[np.ndarray, "out words"]  # uint32, in * bits / 32 words a row
    scales: Float[np.ndarray, "out groups"]  # in / group_size groups a row
    biases: Float[np.ndarray, "out groups"]
    bits: int
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """`[out, in]`."""
        return self.weight.shape[0], self.scales.shape[1] * self.group_size

    def integers(self) -> UInt[np.ndarray, "out in"]:
        """The q of each number, uint32."""
        return _unpack(self.weight, self.bits)

    def dequantise(
        self, rows: slice = slice(None), dtype: Any = None
    ) -> Float[np.ndarray, "rows in"]:
        """The matrix, or some of its rows, in `dtype` (None: that of the scales).

        Computed in float32, in float64 if `dtype` is that, and rounded once to `dtype`.
        """
        parts = (self.weight[rows], self.scales[rows], self.biases[rows])
        packed = Packed(*parts, self.bits, self.group_size)
        dtype = np.dtype(self.scales.dtype if dtype is None else dtype)
        wide = np.result_type(dtype, np.float32) if dtype.kind == "f" else np.dtype(np.float32)
        out = np.empty(packed.shape, dtype)
        for piece in _pieces(*packed.shape):
            q = _unpack(packed.weight[piece], self.bits).astype(wide)
            q = q.reshape(*packed.scales[piece].shape, self.group_size)
            with np.errstate(over="ignore", invalid="ignore"):  # who reads weights checks them
                q *= packed.scales[piece].astype(wide)[..., None]
                q += packed.biases[piece].astype(wide)[..., None]
                out[piece] = q.reshape(len(q), -1)
        return out


def quantise(weight: Float[np.ndarray, "out in"], how: Quantization) -> Packed:
    """Pack a matrix as `mx.quantize` does, to the byte; scales and biases in the weight's dtype.

    Raises BridgeError for bits or a group size that MLX lacks, for rows that are no whole number of
    groups, and for a dtype that MLX does not quantise.
    """
    how.check("quantize")
    (outputs, inputs), steps = weight.shape, np.float32((1 << how.bits) - 1)
    if inputs % how.group_size:
        raise BridgeError(
            f"quantize: rows of {inputs} numbers are not whole groups of {how.group_size}; "
            "choose another group size"
        )
    if weight.dtype.name not in SCALES:
        raise BridgeError(f"quantize: {weight.dtype.name} weights; convert to one of {SCALES}")
    packed = Packed(
        np.empty((outputs, inputs * how.bits // 32), np.uint32),
        np.empty((outputs, inputs // how.group_size), weight.dtype),
        np.empty((outputs, inputs // how.group_size), weight.dtype),
        how.bits,
        how.group_size,
    )
    for piece in _pieces(outputs, inputs):
        w = weight[piece].astype(np.float32).reshape(*packed.scales[piece].shape, how.group_size)
        low, high = w.min(-1), w.max(-1)
        # From the end that is further from 0, so that this end and, nearly, 0 are kept.
        downward = np.abs(low) <= np.abs(high)
        scale = np.maximum((high - low) / steps, np.float32(1e-7))
        scale = np.where(downward, -scale, scale)
        edge = np.where(downward, high, low)
        count = np.rint(edge / scale)
        scale = np.where(count != 0, edge / np.where(count != 0, count, 1), scale)
        bias = np.where(count != 0, edge, np.float32(0))
        q = np.clip(np.rint((w - bias[..., None]) / scale[..., None]), 0, steps)
        packed.weight[piece] = _pack(q.astype(np.uint32).reshape(len(w), inputs), how.bits)
        packed.scales[piece], packed.biases[piece] = scale, bias
    return packed


def packing(
    name: str, shape: tuple[int, ...], specs: Mapping[str, TensorSpec], source: str
) -> Quantization:
    """How `name`, a weight of logical `shape`, is packed, told from the headers alone.

    `specs` are those of the file, with `name`, and `.scales` and `.biases` beside it. Raises
    BridgeError, naming `source` and tensor, where one is missing or has a dtype or shape that no
    packing of `shape` gives. Quantised tensors of a checkpoint may differ in bits and group size.
    """
    where = f"{source}: tensor {name!r}"
    scales_name, biases_name = side_names(name)
    for side in (scales_name, biases_name):
        if side not in specs:
            raise BridgeError(f"{where} is quantised, but {side} is missing; copy it again")
    weight, scales, biases = specs[name], specs[scales_name], specs[biases_name]
    if len(shape) != 2:
        raise BridgeError(f"{where} is quantised, but only matrices can be")
    outputs, inputs = shape
    if weight.dtype != np.uint32:
        raise BridgeError(f"{where} has scales, but is {weight.dtype} where uint32 is needed")
    for side, spec in ((scales_name, scales), (biases_name, biases)):
        if spec.dtype.name not in SCALES:
            raise BridgeError(
                f"{source}: tensor {side!r} is {spec.dtype}; scales and biases of affine "
                f"quantisation are one of {', '.join(SCALES)}"
            )
    if scales != biases:
        raise BridgeError(f"{source}: {scales_name} and {biases_name} differ in dtype or shape")
    rows = {len(spec.shape) == 2 and spec.shape[0] for spec in (weight, scales)}
    if rows != {outputs} or not scales.shape[1] or inputs % scales.shape[1]:
        raise BridgeError(
            f"{where} is packed as {list(weight.shape)} with scales {list(scales.shape)}, but "
            f"config.json calls for {list(shape)}"
        )
    bits, rest = divmod(weight.shape[1] * 32, inputs)
    how = Quantization(bits, inputs // scales.shape[1])
    if rest:
        raise BridgeError(
            f"{where}: {weight.shape[1]} words a row are no packing of {inputs} numbers, which "
            "config.json calls for"
        )
    how.check(where)
    return how


@runtime_checkable
class HoldsPacked(Protocol):
    """A mapping of float tensors that also gives those that it holds packed, as they are."""

    def packed(self, name: str) -> Packed | None:
        """The tensor `name`; None where it is stored as it is read."""
        ...


def take_packed(
    tensors: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...], dtype: str
) -> Packed | None:
    """One tensor of a model being loaded to compute in `dtype`, where it is held packed; else None.

    Raises BridgeError for one of another logical shape, and for a scale, a bias or a number
    that is too large for `dtype`."""
    packed = tensors.packed(name) if isinstance(tensors, HoldsPacked) else None
    if packed is not None and packed.shape != shape:
        raise BridgeError(f"tensor {name} is {list(packed.shape)}, need {list(shape)}")
    if packed is not None:
        _check_range(packed, np.dtype(dtype), name)
    return packed


def _check_range(packed: Packed, dtype: np.dtype, name: str) -> None:
    for side, array in zip(side_names(name), (packed.scales, packed.biases), strict=True):
        rounded(array, dtype, side)
    scale, bias = (float(np.abs(a).max(initial=0)) for a in (packed.scales, packed.biases))
    if ((1 << packed.bits) - 1) * scale + bias < float(ml_dtypes.finfo(dtype).max):
        return  # whatever the integers are
    for piece in _pieces(*packed.shape):
        rounded(packed.dequantise(piece, np.float32), dtype, name)


def side_names(name: str) -> tuple[str, str]:
    """Of `NAME.weight`: `NAME.scales` and `NAME.biases`."""
    stem = name.removesuffix(".weight")
    return f"{stem}.scales", f"{stem}.biases"


def _pieces(rows: int, columns: int) -> Iterator[slice]:
    """The rows of a matrix, some at a time."""
    step = max(1, PIECE // max(columns, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _unpack(words: UInt[np.ndarray, "out words"], bits: int) -> UInt[np.ndarray, "out in"]:
    """The integers of each row: 32 of them in `bits` words, over and over."""
    groups = words.reshape(len(words), -1, bits)
    out = np.empty((*groups.shape[:2], 32), np.uint32)
    mask = np.uint32((1 << bits) - 1)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        out[..., i] = groups[..., word] >> np.uint32(shift)
        if shift + bits > 32:
            out[..., i] |= groups[..., word + 1] << np.uint32(32 - shift)
    out &= mask
    return out.reshape(len(words), -1)


def _pack(q: UInt[np.ndarray, "out in"], bits: int) -> UInt[np.ndarray, "out words"]:
    """What `_unpack` takes apart."""
    numbers = q.reshape(len(q), -1, 32)
    groups = np.zeros((*numbers.shape[:2], bits), np.uint32)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        groups[..., word] |= numbers[..., i] << np.uint32(shift)
        if shift + bits > 32:
            groups[..., word + 1] |= numbers[..., i] >> np.uint32(32 - shift)
    return groups.reshape(len(q), -1)
