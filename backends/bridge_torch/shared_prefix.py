"""Attention of a decoding step over a prefix that rows share, by Triton kernels on CUDA devices.

The rows of a group read their prompt together: one tile has the queries of all of them, so that the
prompt's keys and values are read once a group, and each row's own timesteps once a row. Slots are
split among programs, since a step has few queries, and the parts of each softmax are merged at the
end by the logarithms of their sums. What is read is said by tensors alone, so that a CUDA graph of
a step can be replayed while rows go on. `decode.py` computes the same by einsum where this does not
serve.

Axes: G prompts, P prefix slots, R rows, T own timesteps, K key heads, H query heads, d head width.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache as once
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridge.decoding.rows import Rows

# Queries of a tile at most, and slots that it reads at a time: what registers and shared memory of
# devices since sm_80 hold, by dtype, for heads of up to 128 and up to 256 numbers.
TILES = {
    torch.bfloat16: ((64, 64), (32, 32)),
    torch.float16: ((64, 64), (32, 32)),
    torch.float32: ((16, 16), (16, 16)),
}
LEAST = 16  # of all sizes of a product: what tensor cores take
PROGRAMS = 2  # on a multiprocessor at once
SPLITS = 32  # of one unit's slots, at most


def serves(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether a step on such a device, in this dtype, attends by these kernels."""
    known = device.type == "cuda" and dtype in TILES and head_dim <= 256
    return known and find_spec("triton") is not None


@once
def kernels() -> ModuleType:
    """The kernels' module."""
    from bridge_torch import prefix_kernels

    return prefix_kernels


@once
def multiprocessors(device: torch.device) -> int:
    """How many the device has; a few for the interpreter, so that there is more than one part."""
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True)
class Units:
    """Whose keys are read by whom: unit u's slots from `begin` to `end`, by rows from `first` on.
    All rows must be some unit's; a unit may have no rows, and no slots."""

    first: Int[Tensor, " U"]
    count: Int[Tensor, " U"]  # how many rows
    begin: Int[Tensor, " U"]
    end: Int[Tensor, " U"]
    widest: int  # no unit has more rows
    longest: int  # nor more slots


@dataclass(frozen=True)
class Readers:
    """The rows of each prompt, which stay the same for as long as the same rows are left."""

    first: Int[Tensor, " G"]
    count: Int[Tensor, " G"]
    lengths: Int[Tensor, " G"]  # tokens of each prompt, which ends at the last slot
    row: Int[Tensor, " R"]  # 0, 1, 2, ...
    one: Int[Tensor, " R"]
    widest: int
    longest: int

    @classmethod
    def of(cls, rows: Rows, device: torch.device, prompts: int = 0) -> "Readers":
        """Those of rows that stand in the order of their prompts; of at least so many `prompts`,
        the last without rows and tokens."""
        count = np.bincount(rows.group, minlength=max(len(rows.lengths), prompts))
        lengths = np.zeros_like(count)
        lengths[: len(rows.lengths)] = rows.lengths

        def put(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array.astype(np.int32)).to(device)

        row = put(np.arange(len(rows)))
        return cls(
            put(np.cumsum(count) - count),
            put(count),
            put(lengths),
            row,
            torch.ones_like(row),
            int(count.max()),
            int(rows.lengths.max()),
        )

    def units(
        self, steps: Int[Tensor, " R"], window: int | None, slots: int, timesteps: int
    ) -> tuple[Units, Units]:
        """What the present timestep of each row, number `steps`, reads of a prefix of so many
        `slots` and of its own timesteps, of which none has more than `timesteps` (clause 5.5)."""
        at = steps.to(torch.int32)
        end = torch.full_like(self.lengths, slots)
        begin, own_begin = slots - self.lengths, torch.zeros_like(at)
        if window is not None:
            of_prompt = at[self.first.clamp(max=len(at) - 1)]
            begin = torch.maximum(begin, (slots + 1 - window + of_prompt).clamp(max=slots))
            own_begin = (at + 1 - window).clamp(min=0)
        of_prefix = Units(self.first, self.count, begin, end, self.widest, self.longest)
        return of_prefix, Units(self.row, self.one, own_begin, at + 1, 1, timesteps)


def attend(
    q: Float[Tensor, "R H d"],
    prefix: Float[Tensor, "two prompts K P d"],
    own: Float[Tensor, "two rows K T d"],
    of_prefix: Units,
    of_own: Units,
) -> Float[Tensor, "R H_d"]:
    """Each row's query over its prompt and its own timesteps in one softmax. `of_prefix`: the
    prompts' slots that are read, and by which rows; `of_own`: each row's own timesteps, one row a
    unit. Rows stand in the order of their prompts."""
    q = q if q.stride(2) == 1 else q.contiguous()
    (R, H, d), K = q.shape, own.shape[2]
    D = max(LEAST, _power_of_2(d))
    largest, slots = TILES[q.dtype][D > 128]
    passes = []
    for cache, units in ((prefix, of_prefix), (own, of_own)):
        asking = units.widest * (H // K)
        tile = min(max(_power_of_2(asking), LEAST), largest)
        tiles = -(-asking // tile)
        room = PROGRAMS * multiprocessors(q.device) // (len(units.first) * K * tiles)
        splits = max(1, min(room, SPLITS, -(-units.longest // slots)))
        passes.append((cache, units, tile, tiles, splits))
    total = sum(splits for *_, splits in passes)
    parts = q.new_empty(total, R, H, d, dtype=torch.float32)
    lse = q.new_empty(total, R, H, dtype=torch.float32)
    y = q.new_empty(R, H * d)
    of = 16 if d % 16 == 0 else 1  # numbers, of which all strides are multiples
    q_row, q_head, y_split, y_row = (x // of for x in (*q.stride()[:2], *parts.stride()[:2]))
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        done, factors = 0, kernels().factors(q)
        for cache, units, tile, tiles, splits in passes:
            kernels().attend_unit[(len(units.first), K, tiles * splits)](
                *(q, cache[0], cache[1], parts, lse),
                *(units.first, units.count, units.begin, units.end),
                *(q_row, q_head, *(stride // of for stride in cache.stride()[1:4])),
                *(y_split, y_row, lse.stride(0), H),
                *(d**-0.5, H // K, done, splits, d // of, D, of, tile, slots, factors),
            )
            done += splits
        kernels().merge[(R * H,)](
            *(y, parts, lse, y_split, lse.stride(0), total),
            *(d // of, D, of, _power_of_2(total)),
        )
    return y


def _power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
