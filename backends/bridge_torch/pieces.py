"""The cells of a batch that are computed, flat: what rows share once, and no padding (7.14).

`Pieces` stands where `cells.Cells` stands for a batch `[B, S]`: the layers are the same, and all
that is linear reads `[C, D]`. First come the cells that groups share, group by group, and then
those that rows have alone, in the same order of groups, row by row; inactive cells are not among
them. So self-attention needs no mask but that of a window, and blocks gather what rows have alone
into timesteps.

Axes: C cells, of which `alone` rows have alone; U timesteps of groups in which those lie, N rows of
the widest group.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridge.config import ModelConfig
from bridge.decoding.rows import inside_window
from bridge.decoding.shared import SharedPlan
from bridge_torch import block, flash
from bridge_torch.block import Grid
from bridge_torch.cells import Cells, Rope, attend
from bridge_torch.flash import Kernel, Read, Reads


@dataclass(frozen=True, eq=False)
class Timesteps:
    """Where what rows have alone lies in a grid `[U, N]`."""

    grid: Grid
    places: Int[Tensor, " alone"]
    filled: Bool[Tensor, "U_N one"] | None  # None: every place holds a cell


@dataclass(frozen=True, eq=False)
class AllRows:
    """The whole batch `[B, S]`, for what no kernel serves."""

    cells: Cells
    spread: Int[Tensor, " B_S"]  # the cell that stands for each of the batch
    collect: Int[Tensor, " C"]  # the cell of the batch that each stands for


@dataclass(frozen=True, eq=False)
class Pieces:
    """What the layers need to know of the cells of a batch; made once a call."""

    tokens: Int[Tensor, " C"]
    rope: Float[Tensor, "two C d"]
    rows: Int[Tensor, " C"]  # how many of the batch each cell stands for
    found: Int[np.ndarray, "B S"]  # the cell that stands for each active one of the batch
    reads: Reads
    kernel: Kernel | None
    timesteps: Timesteps
    whole: AllRows | None  # where there is no kernel, or it has no mask for a window
    masked: frozenset[int | None]  # windows that need one

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        rope: Rope,
        like: Tensor,
        tokens: Int[np.ndarray, "B S"],
        groups: Int[np.ndarray, " B"],
        active: Bool[np.ndarray, "B S"],
        positions: Int[np.ndarray, "B S"],
    ) -> "Pieces":
        """Those of a batch, for a model that computes in the dtype of `like`, where it is."""
        plan, device = SharedPlan.of(tokens, groups, active, positions), like.device

        def put(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array.astype(np.int64)).to(device)

        order = np.lexsort((plan.grid.place, plan.grid.line))
        line, place, of_alone = plan.grid.line[order], plan.grid.place[order], plan.of_alone[order]
        there = np.append(active.reshape(-1), False)  # the last is where -1 points: padding
        in_shared, in_alone = there[plan.of_shared], there[of_alone]
        flat = np.concatenate([plan.of_shared[in_shared], of_alone[in_alone]])
        numbers = np.empty_like(plan.of_alone)
        numbers[order] = _numbers(in_alone, int(in_shared.sum()))
        numbers = np.concatenate([_numbers(in_shared).ravel(), numbers.ravel(), [0]])
        found = numbers[plan.places]
        row, timestep = np.nonzero(in_alone)
        at = positions.reshape(-1)[flat]
        kernel = flash.kernel_for(device, like.dtype, config.head_dim)
        windows = set(config.sliding_windows or (None,))
        if kernel is not None:
            windows = {w for w in windows if not inside_window(active, positions, w)}
        whole = None
        if windows:
            cells = Cells.of(config, rope, like, groups, active, positions)
            whole = AllRows(cells, put(found.reshape(-1)), put(flat))
        widths = np.bincount(plan.grid.line, minlength=plan.grid.groups)
        return cls(
            put(tokens.reshape(-1)[flat]),
            rope(put(at), int(at.max(initial=0)) + 1, like.dtype),
            put(np.concatenate([np.repeat(widths, in_shared.sum(1)), np.ones(len(row))])),
            found,
            _reads(in_shared.sum(1), in_alone.sum(1), line, put),
            kernel,
            _timesteps(line[row] * plan.alone + timestep, place[row], plan.grid.width, put),
            whole,
            frozenset(windows),
        )

    def attend(
        self,
        q: Float[Tensor, "C heads d"],
        k: Float[Tensor, "C kv_heads d"],
        v: Float[Tensor, "C kv_heads d"],
        window: int | None,
    ) -> Float[Tensor, "C heads_d"]:
        """Self-attention of a layer (clauses 5.4 and 5.5)."""
        if window in self.masked or self.kernel is None:
            assert self.whole is not None
            cells, shape = self.whole.cells, self.found.shape
            q, k, v = (x.index_select(0, self.whole.spread).unflatten(0, shape) for x in (q, k, v))
            y = attend(q, k, v, cells, window)
            return y.flatten(0, 1).index_select(0, self.whole.collect)
        return flash.attend(q, k, v, self.reads, self.kernel).flatten(1)

    def cleared(self, x: Float[Tensor, "C D"]) -> Float[Tensor, "C D"]:
        """Itself: every cell is active."""
        return x

    def mixing(self, x: Float[Tensor, "C D"]) -> Float[Tensor, "alone D"]:
        """What rows have alone: in what they share, a block gives what one row has (3.8)."""
        return x[self.reads.shared :]

    def mix(self, parts: Sequence[Float[Tensor, "_ E"]], H: int | None) -> Float[Tensor, "C E"]:
        """Attention of a block within timesteps; see `block.mix`."""
        at, shared = self.timesteps, self.reads.shared
        if H is None:
            return block.mix(parts, H, at.grid, None)
        v = parts[-1]
        if not len(at.places):
            return v
        cells = (*parts[:-1], v[shared:])
        mixed = block.mix([spread(x, at)[:, None] for x in cells], H, at.grid, at.filled)
        return torch.cat([v[:shared], collect(mixed[:, 0], at)])


def spread(x: Float[Tensor, "alone E"], at: Timesteps) -> Float[Tensor, "U_N E"]:
    """Cells to their places in the grid; 0 where there is none."""
    return _Spread.apply(x, at.places, at.grid.groups * at.grid.width)


def collect(x: Float[Tensor, "U_N E"], at: Timesteps) -> Float[Tensor, "alone E"]:
    """Places back to cells."""
    return _Collect.apply(x, at.places)


class _Spread(torch.autograd.Function):
    """A place holds one cell at most, so that no gradient has to be added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(places)
        return x.new_zeros(count, *x.shape[1:]).index_copy_(0, places, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].index_select(0, ctx.saved_tensors[0]), None, None


class _Collect(torch.autograd.Function):
    """`_Spread` the other way round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.count = len(x)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,), (places,) = gradients, ctx.saved_tensors
        zeros = gradient.new_zeros(ctx.count, *gradient.shape[1:])
        return zeros.index_copy_(0, places, gradient), None


def _numbers(there: Bool[np.ndarray, "_ _"], first: int = 0) -> Int[np.ndarray, "_ _"]:
    """Those that are there counted from `first` on, line by line; elsewhere any of them."""
    count = np.cumsum(there, dtype=np.int64).reshape(there.shape)
    return np.maximum(count - 1, 0) + first


def _reads(
    shared: Int[np.ndarray, " G"],
    alone: Int[np.ndarray, " B"],
    line: Int[np.ndarray, " B"],
    put: Callable[[np.ndarray], Tensor],
) -> Reads:
    """What reads what: of so many cells that each group shares, and that each row has alone, in the
    order of their groups, which `line` has."""
    of_group = np.bincount(line, alone, len(shared)).astype(np.int64)
    keys = np.cumsum(shared) - shared
    queries = shared.sum() + np.cumsum(of_group) - of_group
    groups = list(
        zip(keys.tolist(), shared.tolist(), queries.tolist(), of_group.tolist(), strict=True)
    )
    within = (Read(1, a, n, a, n, True) for a, n, _, _ in groups if n)
    across = (Read(1, b, m, a, n, False) for a, n, b, m in groups if n and m)
    sizes = alone[alone > 0]
    longest = int(alone.max(initial=0))
    row, at = np.nonzero(np.arange(longest) < sizes[:, None])
    return Reads(
        int(shared.sum()),
        _joined(within),
        _joined(across),
        len(sizes),
        longest,
        None if (sizes == longest).all() else put(row * longest + at),
    )


def _joined(reads: Iterable[Read]) -> tuple[Read, ...]:
    """Calls of one size, for groups that follow each other, as one."""
    joined: list[Read] = []
    for read in reads:
        last = joined[-1] if joined else None
        if last and (read.n, read.m) == (last.n, last.m) and last.followed_by(read):
            joined[-1] = replace(last, count=last.count + 1)
        else:
            joined.append(read)
    return tuple(joined)


def _timesteps(
    timestep: Int[np.ndarray, " alone"],
    place: Int[np.ndarray, " alone"],
    width: int,
    put: Callable[[np.ndarray], Tensor],
) -> Timesteps:
    """Those that there are, of cells at such timesteps of groups, in such places of them."""
    used, timestep = np.unique(timestep, return_inverse=True)
    filled = np.zeros((len(used), width), bool)
    filled[timestep, place] = True
    grid = Grid(len(used), width)
    mask = None if filled.all() else put(filled.reshape(-1, 1)).to(torch.bool)
    return Timesteps(grid, put(timestep * width + place), mask)
