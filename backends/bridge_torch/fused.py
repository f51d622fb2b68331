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

from bridge.config import ModelConfig
from bridge_torch.block import PackedBlock
from bridge_torch.cache import RaggedCache
from bridge_torch.compiled import FLOAT, POINTER, SIZE, library
from bridge_torch.packed import Packed, PackedLayer

SOURCE = Path(__file__).with_name("fused.c")
# Sums in any order, and no errno or signals: what -ffast-math has that leaves NaN and infinity be.
MATHS = ("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno")
OPTIONS = ("-O3", "-march=native", *MATHS, "-fPIC")
SIGNATURES = {
    "rms_norm": [POINTER] * 3 + [FLOAT] + [SIZE] * 2,
    "swiglu": [POINTER] * 2 + [SIZE] * 2,
    "attend": [POINTER] * 4 + [FLOAT] + [POINTER] * 7 + [SIZE] * 7,
    "block": [POINTER] * 2 + [FLOAT] + [POINTER] * 5 + [SIZE] * 4,
}


def serves(device: str, dtype: torch.dtype) -> bool:
    """Whether models on such a device, in this dtype, decode by the fused step."""
    return device == "cpu" and dtype == torch.float32 and kernels() is not None


@cache
def kernels() -> ctypes.CDLL | None:
    """The compiled kernels; None where they are switched off or cannot be had."""
    return library(SOURCE, OPTIONS, SIGNATURES)


def step(weights: Packed, cache: RaggedCache, tokens: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
    """One timestep of every row left; what `decode.step` computes, in fewer calls."""
    library, eps, rows = kernels(), weights.config.rms_norm_eps, cache.rows
    assert library is not None
    # What all layers share, looked up once: a step is many short calls.
    positions = rows.positions
    rope = weights.rope(
        torch.from_numpy(positions), int((positions + rows.left).max()), torch.float32
    )
    read = int(positions.max()) + 1
    scratch = torch.empty(_scratch_size(weights.config, len(rows), read))
    lengths = rows.lengths[rows.group]
    own, prefixes = (
        np.array([tensor.data_ptr() for tensor in tensors], np.uintp)
        for tensors in (cache.own, cache.prefixes)
    )
    rooms = np.array([tensor.shape[3] for tensor in cache.own], np.int64)
    told = (scratch.data_ptr(), *(a.ctypes.data for a in (own, prefixes, rooms, lengths)))
    told = (*told, rows.steps.ctypes.data)
    # Rows of a prompt lie together, and stay so as rows leave.
    first, last = (np.searchsorted(rows.group, rows.group, side) for side in ("left", "right"))
    ends = (scratch.data_ptr(), first.ctypes.data, last.ctypes.data)
    h = weights.look_up(tokens)
    for i, layer in enumerate(weights.layers):
        qkv = layer.qkv(_norm(library, h, layer.input_norm, eps))
        y = _attend(library, layer, i, qkv, rope, told, read)
        h = layer.o.add_to(h, y)
        gate_up = layer.gate_up(_norm(library, h, layer.post_norm, eps))
        h = layer.down.add_to(h, _swiglu(library, gate_up))
        if layer.block is not None:
            _add_block(library, h, layer.block, ends)
    return weights.head(_norm(library, h, weights.norm, eps))


def _scratch_size(config: ModelConfig, rows: int, read: int) -> int:
    """Floats that the kernels need besides, at most: see fused.c. `read`: timesteps of the row with
    most of them."""
    bridge, attending = config.bridge, config.num_attention_heads * read
    if bridge is None:
        return rows * attending
    return rows * max(attending, config.hidden_size + 8 * bridge.inner + bridge.num_heads * rows)


def _norm(
    library: ctypes.CDLL, x: Float[Tensor, "R D"], weight: Float[Tensor, " D"], eps: float
) -> Float[Tensor, "R D"]:
    y = torch.empty_like(x)
    library.rms_norm(y.data_ptr(), x.data_ptr(), weight.data_ptr(), eps, *x.shape)
    return y


def _swiglu(library: ctypes.CDLL, gate_up: Float[Tensor, "R two_I"]) -> Float[Tensor, "R I"]:
    R, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty(R, width)
    library.swiglu(y.data_ptr(), gate_up.data_ptr(), R, width)
    return y


def _attend(
    library: ctypes.CDLL,
    layer: PackedLayer,
    i: int,
    qkv: Float[Tensor, "R heads_d"],
    rope: Float[Tensor, "two R d"],
    told: tuple[int, ...],
    read: int,
) -> Float[Tensor, "R heads_d"]:
    """The cache takes the keys and values of this timestep, too. `told`: where the scratch and what
    is known of each row are; `read`: timesteps of the row with most of them."""
    c, R = layer.config, len(qkv)
    H, K, d = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    y = qkv.new_empty(R, H * d)
    library.attend(
        *(y.data_ptr(), qkv.data_ptr(), _pointer(layer.q_norm), _pointer(layer.k_norm)),
        *(c.rms_norm_eps, rope.data_ptr(), *told, i, layer.window or 0, R, H, K, d, read),
    )
    return y


def _add_block(
    library: ctypes.CDLL,
    h: Float[Tensor, "R D"],
    block: PackedBlock,
    ends: tuple[int, int, int],
) -> None:
    """In place, on a tensor that is the step's own. `ends`: where the scratch, and the first row
    and the end of each row's group are."""
    inward, outward = block.inward.weight, block.outward.weight
    library.block(
        *(h.data_ptr(), block.norm.data_ptr(), block.eps),
        *(inward.data_ptr(), outward.data_ptr(), *ends),
        *(len(h), *outward.shape, block.num_heads or 0),
    )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
