"""The Triton kernels of `shared_prefix.py`, which says what they compute and where.

Imported where Triton is, and run by its interpreter if TRITON_INTERPRET=1 was set before that. Sums
and scores are in float32; a score is never rounded to the dtype of the keys.
"""

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

# Numbers of which no value has a kernel of its own: to compile one takes seconds. Strides and d are
# in units of `OF` numbers, so that the compiler knows which addresses are aligned.
SIZES = ["q_row", "q_head", "k_unit", "k_head", "k_slot", "y_split", "y_row", "lse_split", "heads"]
SIZES += ["shared", "split0", "splits", "d"]


def factors(q: Tensor) -> tl.dtype:
    """What is multiplied: numbers of the dtype of the keys. The interpreter cannot multiply
    bfloat16, and has the same numbers in float32."""
    if q.dtype == torch.float32 or (q.dtype == torch.bfloat16 and not q.is_cuda):
        return tl.float32
    return tl.bfloat16 if q.dtype == torch.bfloat16 else tl.float16


@triton.jit(do_not_specialize=SIZES)
def attend_unit(
    q_ptr, k_ptr, v_ptr, y_ptr, lse_ptr,
    first_ptr, count_ptr, begin_ptr, end_ptr,
    q_row, q_head, k_unit, k_head, k_slot, y_split, y_row, lse_split, heads,
    scale, shared, split0, splits, d,
    D: tl.constexpr, OF: tl.constexpr, QUERIES: tl.constexpr, SLOTS: tl.constexpr,
    FACTORS: tl.constexpr,
):  # fmt: skip
    """A tile of the queries that share a unit's keys, over one part of its slots: their softmax
    within the part, and the logarithm of its sum, by which parts are weighed."""
    q_row, q_head, y_split, y_row, d = q_row * OF, q_head * OF, y_split * OF, y_row * OF, d * OF
    k_unit, k_head, k_slot = k_unit * OF, k_head * OF, k_slot * OF
    unit, kv_head = tl.program_id(0), tl.program_id(1)
    tile, split = tl.program_id(2) // splits, tl.program_id(2) % splits
    begin, end = tl.load(begin_ptr + unit), tl.load(end_ptr + unit)
    each = tl.cdiv(tl.cdiv(end - begin, splits), SLOTS) * SLOTS
    begin += split * each
    end = tl.minimum(begin + each, end)

    place = tile * QUERIES + tl.arange(0, QUERIES)
    asked = place < tl.load(count_ptr + unit) * shared
    row = (tl.load(first_ptr + unit) + place // shared).to(tl.int64)
    head = kv_head * shared + place % shared
    width = tl.arange(0, D)
    inside = width[None, :] < d
    q_at = q_ptr + (row * q_row + head * q_head)[:, None] + width[None, :]
    q = tl.load(q_at, mask=asked[:, None] & inside, other=0.0).to(FACTORS)
    keys = k_ptr + unit.to(tl.int64) * k_unit + kv_head * k_head
    values = v_ptr + unit.to(tl.int64) * k_unit + kv_head * k_head

    best = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    y = tl.zeros([QUERIES, D], tl.float32)
    for start in range(begin, end, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        there = (slot < end)[:, None] & inside
        at = slot.to(tl.int64)[:, None] * k_slot + width[None, :]
        k = tl.load(keys + at, mask=there, other=0.0).to(FACTORS)
        v = tl.load(values + at, mask=there, other=0.0).to(FACTORS)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        score = tl.where((slot < end)[None, :], score, float("-inf"))
        higher = tl.maximum(best, tl.max(score, 1))
        p = tl.exp(score - higher[:, None])
        kept = tl.exp(best - higher)
        total = total * kept + tl.sum(p, 1)
        y = y * kept[:, None] + tl.dot(
            p.to(q_ptr.dtype.element_ty).to(FACTORS), v, input_precision="ieee"
        )
        best = higher

    part = (split0 + split).to(tl.int64)
    empty = total == 0  # a part may have no slot
    total = tl.where(empty, 1.0, total)
    y, lse = y / total[:, None], tl.where(empty, float("-inf"), best + tl.log(total))
    y_at = y_ptr + part * y_split + (row * y_row + head * d)[:, None] + width[None, :]
    tl.store(y_at, y, mask=asked[:, None] & inside)
    tl.store(lse_ptr + part * lse_split + row * heads + head, lse, mask=asked)


@triton.jit(do_not_specialize=SIZES)
def merge(
    y_ptr, parts_ptr, lse_ptr, y_split, lse_split, splits, d,
    D: tl.constexpr, OF: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One head of one row: the parts of its softmax as one."""
    y_split, d = y_split * OF, d * OF
    one = tl.program_id(0).to(tl.int64)
    split, width = tl.arange(0, SPLITS).to(tl.int64), tl.arange(0, D)
    lse = tl.load(lse_ptr + split * lse_split + one, mask=split < splits, other=float("-inf"))
    weight = tl.exp(lse - tl.max(lse, 0))
    weight = weight / tl.sum(weight, 0)
    at = parts_ptr + split[:, None] * y_split + one * d + width[None, :]
    there = (split < splits)[:, None] & (width < d)[None, :]
    parts = tl.load(at, mask=there, other=0.0)
    y = tl.sum(parts * weight[:, None], 0)
    tl.store(y_ptr + one * d + width, y.to(y_ptr.dtype.element_ty), mask=width < d)
