"""Fused kernels for a decoding step on CPUs, compiled from fused.c (`compiled.py`).

A step at a few rows reads each weight once, which no code can save, and otherwise does little: most
of what is left is the dispatch of tiny operations. Four fused ones stand in for them in float32,
one of them the whole Bridge block, whose weights are too small for a GEMM to be worth its call.
Where there is no library of them the step is the plain one of decode.py: the same but slower.
"""

import ctypes
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridge.decoding.rows import Rows
from bridge_torch.cache import RaggedCache
from bridge_torch.compiled import FLOAT, POINTER, SIZE, library
from bridge_torch.packed import Packed, PackedLayer

SOURCE = Path(__file__).with_name("fused.c")
# Sums in any order, and no errno or signals: what -ffast-math has that leaves NaN and infinity be.
MATHS = ("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno")
OPTIONS = ("-O3", "-march=native", *MATHS, "-fPIC")
# Each takes the step, the number of a layer, what it writes and what it reads.
SIGNATURES = {
    name: [POINTER, SIZE, POINTER, POINTER] for name in ("attend", "post_norm", "swiglu", "go_on")
}


class _Layer(ctypes.Structure):
    """`Layer` of fused.c."""

    _fields_ = [
        *((name, POINTER) for name in ("input_norm", "q_norm", "k_norm", "post_norm")),
        *((name, POINTER) for name in ("block_norm", "inward", "outward")),
        ("window", SIZE),
    ]


class _Step(ctypes.Structure):
    """`Step` of fused.c."""

    _fields_ = [
        *((name, POINTER) for name in ("layers", "last_norm", "own", "prefixes", "rooms")),
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
    return library(SOURCE, OPTIONS, SIGNATURES)


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

    def timestep(self, rows: Rows, rope: Float[Tensor, "two R d"]) -> None:
        """It is that of these rows, at these positions."""
        told = self.told
        told.read = int(rows.positions.max()) + 1
        block = told.D + 4 * told.E + told.heads * told.R
        self.scratch = torch.empty(told.R * max(told.H * told.read, block))
        self.steps, self.rope = rows.steps, rope
        told.scratch, told.rope = self.scratch.data_ptr(), rope.data_ptr()
        told.steps = self.steps.ctypes.data


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
    return _Layer(window=layer.window or 0, **there)


def step(weights: Packed, cache: RaggedCache, tokens: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
    """One timestep of every row left; what `decode.step` computes, in fewer calls."""
    library, rows = kernels(), cache.rows
    assert library is not None
    attend, post_norm, swiglu, go_on = (
        getattr(library, name) for name in ("attend", "post_norm", "swiglu", "go_on")
    )
    if cache.prepared is None:
        cache.prepared = Prepared(weights, cache)
    now: Prepared = cache.prepared
    positions = rows.positions
    end = int((positions + rows.left).max())
    now.timestep(rows, weights.rope(torch.from_numpy(positions), end, torch.float32))
    told, x, y, inner = ctypes.addressof(now.told), now.x, now.y, now.inner
    to_x, to_y, to_inner = x.data_ptr(), y.data_ptr(), inner.data_ptr()
    h = weights.look_up(tokens)
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
