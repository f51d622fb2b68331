"""Fused kernels for a decoding step on CPUs, compiled from fused.c (`compiled.py`).

A step at a few rows reads each weight once, which no code can save, and otherwise does little: most
of what is left is the dispatch of tiny operations. Four fused ones stand in for them in float32,
one of them the whole Bridge block, whose weights are too small for a GEMM to be worth its call.
Where matrices are 8-bit integers, what stands around their products (clause 10.5) is in them too.
Where there is no library of them the step is the plain one of step.py: the same but slower.
"""

import ctypes
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridge.decoding.rows import Rows
from bridge_torch import narrow
from bridge_torch.cache import RaggedCache
from bridge_torch.compiled import FLOAT, POINTER, SIZE, library
from bridge_torch.linear import Linear
from bridge_torch.narrow import Bits8
from bridge_torch.packed import Packed, PackedLayer

SOURCE = Path(__file__).with_name("fused.c")
# Sums in any order, and no errno or signals: what -ffast-math has that leaves NaN and infinity be.
MATHS = ("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno")
OPTIONS = ("-O3", "-march=native", *MATHS, "-fPIC")
PRODUCTS = ("qkv", "o", "gate_up", "down")  # of a layer with the host's matrices, in turn
# Each takes the step, the number of a layer, what it writes and what it reads.
NAMES = ("attend", "post_norm", "swiglu", "go_on")
SIGNATURES = {name: [POINTER, SIZE, POINTER, POINTER] for name in NAMES}


class _Integers(ctypes.Structure):
    """`Integers` of fused.c."""

    _fields_ = [("scales", POINTER), ("bias", POINTER)]

    @classmethod
    def of(cls, linear: Linear) -> "_Integers":
        if not isinstance(linear, Bits8):
            return cls()
        return cls(
            linear.scales.data_ptr(), None if linear.bias is None else linear.bias.data_ptr()
        )


class _Layer(ctypes.Structure):
    """`Layer` of fused.c."""

    _fields_ = [
        *((name, POINTER) for name in ("input_norm", "q_norm", "k_norm", "post_norm")),
        *((name, POINTER) for name in ("block_norm", "inward", "outward")),
        *((name, _Integers) for name in PRODUCTS),
        ("window", SIZE),
    ]


class _Step(ctypes.Structure):
    """`Step` of fused.c."""

    _fields_ = [
        *((name, POINTER) for name in ("layers", "last_norm")),
        ("head", _Integers),
        *((name, POINTER) for name in ("sums", "rounded", "units", "own", "prefixes", "rooms")),
        *((name, POINTER) for name in ("lengths", "steps", "first", "last", "rope", "scratch")),
        *((name, SIZE) for name in ("L", "R", "D", "I", "H", "K", "d", "E")),
        *((name, SIZE) for name in ("heads", "read", "alone")),
        *((name, FLOAT) for name in ("eps", "block_eps")),
    ]


def serves(device: str, dtype: torch.dtype) -> bool:
    """Whether models on such a device, in this dtype, decode by the fused step."""
    return device == "cpu" and dtype == torch.float32 and kernels() is not None


@cache
def kernels() -> ctypes.CDLL | None:
    """The compiled kernels; None where they are switched off or cannot be had."""
    return library(SOURCE, OPTIONS, SIGNATURES, [narrow.SOURCE])


class Prepared:
    """What the kernels are told of a model, and of rows for as long as the same ones are left."""

    def __init__(self, weights: Packed, cache: RaggedCache) -> None:
        c, rows, group = weights.config, cache.rows, cache.rows.group
        bridge, attends = c.bridge, c.bridge is not None and c.bridge.kind == "attention"
        self.layers = (_Layer * len(weights.layers))(*map(_layer, weights.layers))
        self.arrays = {
            "own": np.array([tensor.data_ptr() for tensor in cache.own], np.uintp),
            "prefixes": np.array([tensor.data_ptr() for tensor in cache.prefixes], np.uintp),
            "rooms": np.array([tensor.shape[3] for tensor in cache.own], np.int64),
            "lengths": rows.lengths[group],
            # Rows of a prompt lie together, and stay so as rows leave.
            "first": np.searchsorted(group, group, "left"),
            "last": np.searchsorted(group, group, "right"),
        }
        self.told = _Step(
            layers=ctypes.addressof(self.layers),
            last_norm=weights.norm.data_ptr(),
            head=_Integers.of(weights.head),
            L=len(weights.layers),
            R=len(rows),
            D=c.hidden_size,
            I=c.intermediate_size,
            H=c.num_attention_heads,
            K=c.num_key_value_heads,
            d=c.head_dim,
            E=0 if bridge is None else bridge.inner if attends else 2 * bridge.inner,
            heads=bridge.num_heads if bridge is not None and attends else 0,
            alone=len(rows) == len(rows.lengths),
            eps=c.rms_norm_eps,
            block_eps=0 if bridge is None else bridge.norm_eps,
            **{name: array.ctypes.data for name, array in self.arrays.items()},
        )
        self.x, self.y, self.inner = (
            torch.empty(len(rows), width)
            for width in (c.hidden_size, self.told.H * self.told.d, c.intermediate_size)
        )
        # Each product of a step, where all are of integers.
        self.products: list[Callable[[], Tensor]] = []
        matrices = list(_matrices(weights))
        if all(isinstance(matrix, Bits8) for matrix in matrices):
            self._prepare_integers([m for m in matrices if isinstance(m, Bits8)])

    def _prepare_integers(self, matrices: list[Bits8]) -> None:
        """Room for products of integers, and each with its operands."""
        R = len(self.x)
        sums = torch.empty(R * max(len(m.integers) for m in matrices), dtype=torch.int32)
        rounded = torch.empty(R * max(m.integers.shape[1] for m in matrices), dtype=torch.int8)
        self.sums, self.rounded, self.units = sums, rounded, torch.empty(R)
        self.given = torch.empty(R, max(len(m.integers) for m in matrices[:4]))
        told = self.told
        told.sums, told.rounded = sums.data_ptr(), rounded.data_ptr()
        told.units = self.units.data_ptr()
        for matrix in matrices:
            outputs, inputs = matrix.integers.shape
            q, y = rounded[: R * inputs].view(R, inputs), sums[: R * outputs].view(R, outputs)
            product = torch.ops.aten._int_mm.out
            self.products.append(partial(product, q, matrix.integers.t(), out=y))

    def timestep(self, rows: Rows, rope: Float[Tensor, "two R d"]) -> None:
        """It is that of these rows, at these positions."""
        told = self.told
        told.read = int(rows.positions.max()) + 1
        block = told.D + 4 * told.E + told.heads * told.R
        self.scratch = torch.empty(told.R * max(told.H * told.read, block))
        self.steps, self.rope = rows.steps, rope
        told.scratch, told.rope = self.scratch.data_ptr(), rope.data_ptr()
        told.steps = self.steps.ctypes.data


def _matrices(weights: Packed) -> Iterator[Linear]:
    """The host's, in the order of a step."""
    for layer in weights.layers:
        yield from (getattr(layer, name) for name in PRODUCTS)
    yield weights.head


def _layer(layer: PackedLayer) -> _Layer:
    block = layer.block
    pointers = {
        "input_norm": layer.input_norm,
        "q_norm": layer.q_norm,
        "k_norm": layer.k_norm,
        "post_norm": layer.post_norm,
        "block_norm": block and block.norm,
        "inward": block and block.inward.weight,
        "outward": block and block.outward.weight,
    }
    there = {name: tensor.data_ptr() for name, tensor in pointers.items() if tensor is not None}
    products = {name: _Integers.of(getattr(layer, name)) for name in PRODUCTS}
    return _Layer(window=layer.window or 0, **there, **products)


def step(weights: Packed, cache: RaggedCache, tokens: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
    """One timestep of every row left; what `step.step` computes, in fewer calls."""
    rows = cache.rows
    if cache.prepared is None:
        cache.prepared = Prepared(weights, cache)
    now: Prepared = cache.prepared
    positions = rows.positions
    end = int((positions + rows.left).max())
    now.timestep(rows, weights.rope(torch.from_numpy(positions), end, torch.float32))
    h = weights.look_up(tokens)
    return _of_integers(weights, now, h) if now.products else _of_floats(weights, now, h)


def _of_floats(weights: Packed, now: Prepared, h: Float[Tensor, "R D"]) -> Float[Tensor, "R V"]:
    """With products that take and give floats, whatever they hold."""
    attend, post_norm, swiglu, go_on = _functions()
    told, x, y, inner = ctypes.addressof(now.told), now.x, now.y, now.inner
    to_x, to_y, to_inner = x.data_ptr(), y.data_ptr(), inner.data_ptr()
    go_on(told, -1, to_x, h.data_ptr())
    for i, layer in enumerate(weights.layers):
        qkv = layer.qkv(x)
        attend(told, i, to_y, qkv.data_ptr())
        h = layer.o.add_to(h, y)
        post_norm(told, i, to_x, h.data_ptr())
        gate_up = layer.gate_up(x)
        swiglu(told, i, to_inner, gate_up.data_ptr())
        h = layer.down.add_to(h, inner)
        go_on(told, i, to_x, h.data_ptr())
    return weights.head(x)


def _of_integers(weights: Packed, now: Prepared, h: Float[Tensor, "R D"]) -> Float[Tensor, "R V"]:
    """With products of 8-bit integers: what is before and after each is in the kernels."""
    attend, post_norm, swiglu, go_on = _functions()
    told, to_x, to_y = ctypes.addressof(now.told), now.x.data_ptr(), now.y.data_ptr()
    to_h, to_inner, given = h.data_ptr(), now.inner.data_ptr(), now.given.data_ptr()
    products = iter(now.products)
    go_on(told, -1, to_x, to_h)
    for i in range(len(weights.layers)):
        next(products)()
        attend(told, i, to_y, given)
        next(products)()
        post_norm(told, i, to_x, to_h)
        next(products)()
        swiglu(told, i, to_inner, given)
        next(products)()
        go_on(told, i, to_x, to_h)
    assert isinstance(weights.head, Bits8)
    return weights.head.scaled(next(products)(), now.units)


def _functions() -> list[Callable[..., None]]:
    found = kernels()
    assert found is not None
    return [getattr(found, name) for name in NAMES]
