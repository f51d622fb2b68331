"""The Bridge block (chapter 3): attention whose sequence is the batch, at each timestep separately.

Rows of G groups of up to N rows become a grid `[G, N]`, so the cost is G * N^2 a timestep, never
(G * N)^2. Rows are laid out as that grid, by a reshape, where it has no more cells than there are
rows to compute; else they are gathered into it. Timesteps that rows share are computed once, at
width 1. Also holds what the host shares with the block: the RMS norm.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Int

from bridge.config import BridgeConfig
from bridge.decoding.rows import GridPlan
from bridge_jax.compiled import bucket
from bridge_jax.linear import KEPT, contract, named

Array = jax.Array


def rms_norm(x: Float[Array, "... D"], weight: Float[Array, " D"], eps: float) -> Array:
    """`x / sqrt(mean(x^2) + eps) * weight`, in float32 (clause 3.2)."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
    return (wide * scale * weight.astype(jnp.float32)).astype(x.dtype)


class Grid(NamedTuple):
    """Where each of R places for rows lies in `[G, N]`. Made with NumPy, once a batch."""

    filled: Bool[Any, "G N"]  # which cells hold a row
    to_grid: Int[Any, " G_N"] | None = None  # None: the places are the grid
    to_rows: Int[Any, " R"] | None = None

    def spread(self, rows: Float[Array, "R ..."]) -> Float[Array, "G N ..."]:
        """Rows to cells; empty cells hold 0."""
        G, N = self.filled.shape
        if self.to_grid is None:
            return rows.reshape(G, N, *rows.shape[1:])
        cells = take(rows, self.to_grid).reshape(G, N, *rows.shape[1:])
        filled = jnp.asarray(self.filled).reshape(G, N, *[1] * (rows.ndim - 1))
        return jnp.where(filled, cells, jnp.zeros_like(cells))

    def collect(self, cells: Float[Array, "G N ..."]) -> Float[Array, "R ..."]:
        """Cells back to rows."""
        cells = cells.reshape(-1, *cells.shape[2:])
        return cells if self.to_rows is None else take(cells, self.to_rows)


def take(array: Array, places: Array | np.ndarray) -> Array:
    """`array[places]` along the first axis."""
    return array.at[places].get(mode="clip")


@dataclass(frozen=True)
class Layout:
    """Where each of a batch's rows lies: its place among the R that are computed, and its cell in
    the flat grid `[G, N]`. Where the grid has no more cells than R, places are cells."""

    places: Int[np.ndarray, " rows"]
    cells: Int[np.ndarray, " rows"]
    groups: int  # G
    width: int  # N
    size: int  # R

    @classmethod
    def of(
        cls,
        groups: Sequence[int] | np.ndarray,
        floor: int = 1,
        width: int = 1,
        size_of: Callable[[int, int], int] = bucket,
    ) -> "Layout":
        """Of rows that answer the prompts `groups`, in any order (clause 2.2). At least `floor`
        groups, of at least `width` rows; `size_of` gives the sizes that are compiled."""
        plan, rows = GridPlan.of(groups), len(groups)
        plan = plan.padded(size_of(plan.groups, floor), size_of(plan.width, width))
        size, whole = size_of(rows, floor * width), plan.groups * plan.width
        places = plan.to_rows if size >= whole else np.arange(rows)
        return cls(places, plan.to_rows, plan.groups, plan.width, min(size, whole))

    def keep(self, rows: Int[np.ndarray, " kept"]) -> "Layout":
        """The rows at these numbers alone, where they are."""
        return replace(self, places=self.places[rows], cells=self.cells[rows])

    def same(self, other: "Layout") -> bool:
        """Whether all rows lie as in the other, among as many places and cells."""
        return (
            (self.groups, self.width, self.size) == (other.groups, other.width, other.size)
            and np.array_equal(self.places, other.places)
            and np.array_equal(self.cells, other.cells)
        )

    @property
    def measure(self) -> tuple[int, int]:
        """How much is computed: places first, then cells."""
        return self.size, self.groups * self.width

    def joined(self, groups: Int[np.ndarray, " new"]) -> "Layout | None":
        """These rows where they are, and after them those of further groups in what is free; None
        where that does not hold them."""
        plan = GridPlan.of(groups)
        free = np.setdiff1d(np.arange(self.groups), self.lines)
        if plan.groups > len(free) or plan.width > self.width:
            return None
        cells = free[plan.line] * self.width + plan.place
        places = cells
        if self.size < self.groups * self.width:
            places = np.setdiff1d(np.arange(self.size), self.places)[: len(groups)]
            if len(places) < len(groups):
                return None
        return replace(
            self,
            places=np.concatenate([self.places, places]),
            cells=np.concatenate([self.cells, cells]),
        )

    @property
    def lines(self) -> Int[np.ndarray, " rows"]:
        """The line of the grid that each row's group has."""
        return self.cells // self.width

    @cached_property
    def grid(self) -> Grid:
        """For the device."""
        cells = self.groups * self.width
        filled = np.zeros(cells, bool)
        filled[self.cells] = True
        filled = filled.reshape(self.groups, self.width)
        if self.size == cells:
            return Grid(filled)
        to_grid, to_rows = np.zeros(cells, np.int32), np.zeros(self.size, np.int32)
        to_grid[self.cells], to_rows[self.places] = self.places, self.cells
        return Grid(filled, to_grid, to_rows)

    def put(self, rows: np.ndarray, empty: int = 0) -> np.ndarray:
        """Values by row `[rows, ...]` to values by place `[R, ...]`."""
        values = np.full((self.size, *rows.shape[1:]), empty, rows.dtype)
        values[self.places] = rows
        return values


class Cells(NamedTuple):
    """Which cells of those that are computed are active. A stream `[C, D]` has those of the two
    pieces of clause 7.14 one after the other: what groups share, and what rows have alone."""

    shared: Bool[Any, "G P"]
    alone: Bool[Any, "R T"]
    grid: Grid

    @classmethod
    def of_rows(cls, active: Bool[Any, "R T"], grid: Grid) -> "Cells":
        """Where nothing is shared."""
        return cls(np.zeros((0, 0), bool), active, grid)

    @property
    def active(self) -> Bool[Array, " C"]:
        """Of all cells."""
        return joined(self.shared, self.alone)

    @property
    def rows(self) -> Int[Array, " C"]:
        """How many rows each active cell is of; 0 where not active."""
        width = jnp.asarray(self.grid.filled).sum(1, keepdims=True)[: len(self.shared)]
        return joined(self.shared * width, jnp.asarray(self.alone).astype(width.dtype))


def joined(shared: Array, alone: Array) -> Array:
    """The cells of both pieces, one after the other."""
    pieces = [jnp.asarray(x).reshape(-1, *x.shape[2:]) for x in (shared, alone) if x.size]
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces)


def block(
    weights: Mapping[str, Array],
    hidden: Float[Array, "C D"],
    cells: Cells,
    config: BridgeConfig,
) -> Float[Array, "C D"]:
    """The residual stream plus what each row reads from its group (clauses 3.2 to 3.6), or P-Match
    (8.1). `weights` by their names after the layer's, as `bridge.norm.weight`. Inactive cells
    influence nothing, even if they hold NaN, and stay as they are."""
    on = cells.active[:, None]
    # A zero residual gives zero q, k and v: nothing of the cell is left, not even NaN.
    y = _output(weights, jnp.where(on, hidden, 0), cells, config)
    return jnp.where(on, hidden + y, hidden)


def norm_ratio(
    weights: Mapping[str, Array],
    hidden: Float[Array, "C D"],
    cells: Cells,
    config: BridgeConfig,
) -> Float[Array, ""]:
    """The norm of what `block` adds to that of `hidden`, its mean over the active cells of all
    rows, in float32 (clauses 3.9 and 7.14)."""
    h, rows = jnp.where(cells.active[:, None], hidden, 0), cells.rows
    y = _output(weights, h, cells, config)
    added, before = (jnp.linalg.norm(z.astype(jnp.float32), axis=-1) for z in (y, h))
    ratio = jnp.where(before != 0, added / jnp.where(before != 0, before, 1), 0)
    return (ratio * rows).sum() / jnp.maximum(rows.sum(), 1)


def _output(
    weights: Mapping[str, Array],
    hidden: Float[Array, "C D"],
    cells: Cells,
    config: BridgeConfig,
) -> Float[Array, "C D"]:
    """y of clauses 3.6 and 8.1, at a residual that is 0 where not active."""

    def projected(x: Array, name: str) -> Array:
        return named(weights, f"bridge.{name}_proj", x)

    x = rms_norm(hidden, weights["bridge.norm.weight"], config.norm_eps)
    if config.kind == "mlp":
        return projected(silu(projected(x, "up")), "down")
    v = projected(x, "v")
    # A softmax over one row is 1 (clause 3.8): so it is of cells that rows share.
    if cells.grid.filled.shape[1] > 1 and cells.alone.size:
        shared, alone = v[: cells.shared.size], slice(cells.shared.size, None)
        q, k = (projected(x[alone], name) for name in "qk")
        mixed = _mix(q, k, v[alone], cells, config.num_heads)
        v = jnp.concatenate([shared, mixed]) if len(shared) else mixed
    return projected(v, "o")


def silu(x: Array) -> Array:
    """`x / (1 + exp(-x))`, in float32."""
    return jax.nn.silu(x.astype(jnp.float32)).astype(x.dtype)


def _mix(
    q: Float[Array, "R_T E"],
    k: Float[Array, "R_T E"],
    v: Float[Array, "R_T E"],
    cells: Cells,
    H: int,
) -> Float[Array, "R_T E"]:
    """What each row's heads read of the rows of its group (clauses 3.3 to 3.5)."""
    active, grid, E = jnp.asarray(cells.alone), cells.grid, q.shape[-1]
    q, k, v = (grid.spread(x.reshape(*active.shape, H, E // H)) for x in (q, k, v))
    score = contract("gnshd,gmshd->gshnm", q, k) * (E // H) ** -0.5
    # Clause 3.4. A row that may read nothing reads zeros, and is left as it is.
    allowed = grid.spread(active) & grid.filled[..., None]
    allowed = allowed.transpose(0, 2, 1)[:, :, None, None, :]
    p = jax.nn.softmax(jnp.where(allowed, score, LOWEST), -1)
    mixed = contract("gshnm,gmshd->gnshd", p.astype(v.dtype), v).astype(v.dtype)
    return checkpoint_name(grid.collect(mixed).reshape(-1, E), KEPT)


LOWEST = float(np.finfo(np.float32).min)  # what a blocked score becomes: finite, and e^it is 0
