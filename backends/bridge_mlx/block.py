"""The Bridge block (chapter 3): attention whose sequence is the batch, at each timestep separately.

Rows of G groups of up to N rows become a grid `[G, N]`, so the cost is G * N^2 a timestep, never
(G * N)^2. Equal contiguous groups are that grid already, by a reshape; any others are gathered into
a padded one. Also holds what the host shares with the block: the RMS norm and silu.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
from jaxtyping import Bool, Float

from bridge.decoding.rows import GridPlan
from bridge_mlx.linear import Linear, Weight

Result = TypeVar("Result")


def rms_norm(x: Float[mx.array, "... D"], weight: Float[mx.array, " D"], eps: float) -> mx.array:
    """`x / sqrt(mean(x^2) + eps) * weight`, in float32 (clause 3.2).

    On half precision MLX's kernel rounds before it multiplies by the weight; the spec rounds once,
    after it (clause 5.3).
    """
    return mx.fast.rms_norm(x.astype(mx.float32), weight, eps).astype(x.dtype)


def compiled_on_gpu(function: Callable[..., Result], **options: Any) -> Callable[..., Result]:
    """Element-wise work as few kernels on a GPU; `options` as `mx.compile` takes them.

    On a CPU `mx.compile` would want a C++ compiler at run time, which a user may lack, and of a
    step it gains next to nothing there.
    """
    compiled = mx.compile(function, **options)

    @wraps(function)
    def run(*arguments: Any) -> Result:
        on_gpu = mx.default_device().type == mx.gpu
        return compiled(*arguments) if on_gpu else function(*arguments)

    return run


fused = partial(compiled_on_gpu, shapeless=True)


@fused
def silu(x: Float[mx.array, "..."]) -> mx.array:
    """`x / (1 + exp(-x))` (clause 5.8)."""
    return x * mx.sigmoid(x)


@dataclass(frozen=True)
class Grid:
    """Where each of R rows lies in `[G, N]`. Index arrays are made once, not at each step."""

    groups: int
    width: int
    to_grid: mx.array | None = None  # [G * N] rows; None: the rows are the grid, as they lie
    to_rows: mx.array | None = None  # [R] places of the flat grid
    filled: Bool[mx.array, "G N"] | None = None  # None: every place holds a row

    @classmethod
    def of(cls, groups: Sequence[int] | np.ndarray) -> "Grid":
        """The grid of rows that answer the prompts `groups [R]`, in any order (clause 2.2)."""
        return cls.planned(GridPlan.of(groups))

    @classmethod
    def planned(cls, plan: GridPlan, among: tuple[np.ndarray, int] | None = None) -> "Grid":
        """The grid of a plan. `among`: the rows are those at these places of so many that are
        computed, and what the others give back is not said; None: they are all."""
        if among is None and plan.as_they_lie:
            return cls(plan.groups, plan.width)
        to_grid, to_rows = plan.to_grid, plan.to_rows
        if among is not None:
            places, count = among
            to_grid, of_rows = places[to_grid], to_rows
            to_rows = np.zeros(count, np.int64)
            to_rows[places] = of_rows
        return cls(
            plan.groups,
            plan.width,
            mx.array(to_grid, mx.int32),
            mx.array(to_rows, mx.int32),
            None if plan.full else mx.array(plan.filled),
        )

    def spread(self, rows: mx.array) -> mx.array:
        """Rows along the first axis to places: R becomes G * N."""
        return rows if self.to_grid is None else mx.take(rows, self.to_grid, axis=0)

    def collect(self, places: mx.array) -> mx.array:
        """Places along the first axis back to rows: G * N becomes R."""
        return places if self.to_rows is None else mx.take(places, self.to_rows, axis=0)


@dataclass(frozen=True)
class Sharing:
    """Which cells read each other, the same for the blocks of all layers; made once a call.

    Cells are flat: first those that a group shares, each alone at its timestep (clause 7.14), then
    those `[R, S]` of the rows in the grid.
    """

    grid: Grid
    timesteps: int  # S
    active: Bool[mx.array, " cells"] | None  # None: all are
    allowed: Bool[mx.array, "G_S one N N"] | None  # clause 3.4; None: every place reads its line
    shared: int = 0

    @classmethod
    def of(cls, grid: Grid, active: Bool[mx.array, "R S"] | None, S: int) -> "Sharing":
        """That of rows in a grid over S timesteps, and of nothing shared. A blocked row may read
        its own zeros, so that no softmax is empty."""
        if grid.width == 1 or (active is None and grid.filled is None):
            return cls(grid, S, None if active is None else mx.flatten(active), None)
        G, N = grid.groups, grid.width
        keys = mx.ones((1, 1, 1), mx.bool_)
        if active is not None:
            keys = grid.spread(active).reshape(G, N, S)
        if grid.filled is not None:
            keys = keys & grid.filled[:, :, None]
        keys = mx.broadcast_to(keys, (G, N, S)).swapaxes(1, 2).reshape(G * S, 1, 1, N)
        allowed = keys | mx.eye(N, dtype=mx.bool_)
        return cls(grid, S, None if active is None else mx.flatten(active), allowed)


@dataclass(frozen=True)
class Block:
    """One layer's weights. `inward`: q, k and v stacked (P-Match: up); `outward`: o (down)."""

    norm_name: str
    norm: Float[mx.array, " D"]
    inward: Linear
    outward: Linear
    num_heads: int | None  # None: P-Match, the MLP baseline (clause 8.1)
    eps: float

    def __call__(
        self, hidden: Float[mx.array, "cells D"], sharing: Sharing
    ) -> Float[mx.array, "cells D"]:
        """The residual stream plus what each row reads from its group (clauses 3.2 to 3.6).

        Inactive cells influence nothing, even if they hold NaN.
        """
        active = sharing.active
        # A zero residual gives zero q, k and v: nothing of the cell is left, not even NaN.
        x = hidden if active is None else mx.where(active[:, None], hidden, 0)
        y = self._output(x, sharing)
        return hidden + (y if active is None else mx.where(active[:, None], y, 0))

    def norm_ratio(
        self,
        hidden: Float[mx.array, "cells D"],
        sharing: Sharing,
        share: Float[mx.array, " cells"],
    ) -> Float[mx.array, ""]:
        """The norm of what a call adds to that of `hidden`, its mean over active cells, each of
        which has its `share` in it, in float32 (clause 3.9)."""
        active = sharing.active
        h = hidden if active is None else mx.where(active[:, None], hidden, 0)
        y = self._output(h, sharing)
        added, before = (mx.linalg.norm(z.astype(mx.float32), axis=-1) for z in (y, h))
        # A zero residual counts as 0, and what is not active is one by now.
        ratio = mx.where(before != 0, added / mx.where(before != 0, before, 1), 0)
        return mx.sum(ratio * share)

    def _output(
        self, x: Float[mx.array, "cells D"], sharing: Sharing
    ) -> Float[mx.array, "cells D"]:
        """y of clauses 3.6 and 8.1, at a residual that is 0 where not active."""
        x = rms_norm(x, self.norm, self.eps)
        if self.num_heads is None:
            return self.outward(silu(self.inward(x)))
        alone = len(x) if sharing.grid.width == 1 else sharing.shared
        parts = []
        if alone:  # a softmax over one row is 1 (clause 3.8): no q and k are computed
            parts.append(self.inward(x[:alone], first=self.inward.sizes[0] * 2))
        if alone < len(x):
            parts.append(self._mix(self.inward(x[alone:]), self.num_heads, sharing))
        return self.outward(parts[0] if len(parts) == 1 else mx.concatenate(parts))

    def _mix(
        self, qkv: Float[mx.array, "R_S three_E"], H: int, sharing: Sharing
    ) -> Float[mx.array, "R_S E"]:
        grid, S, E = sharing.grid, sharing.timesteps, qkv.shape[-1] // 3
        G, N = grid.groups, grid.width
        cells = grid.spread(qkv.reshape(-1, S, 3 * E)).reshape(G, N, S, 3, H, -1)
        q, k, v = cells.transpose(3, 0, 2, 4, 1, 5).reshape(3, G * S, H, N, -1)
        mixed = mx.fast.scaled_dot_product_attention(
            q, k, v, scale=q.shape[-1] ** -0.5, mask=sharing.allowed
        )
        mixed = mixed.reshape(G, S, H, N, -1).transpose(0, 3, 1, 2, 4).reshape(G * N, S, E)
        return grid.collect(mixed).reshape(-1, E)

    def parts(self) -> Iterator[tuple[str, Weight]]:
        """Its tensors by checkpoint name, in canonical order."""
        yield self.norm_name, self.norm
        yield from self.inward.parts()
        yield from self.outward.parts()

    def substitute(self, tensors: Mapping[str, mx.array]) -> "Block":
        """This block with some tensors replaced, differentiably."""
        return replace(
            self,
            norm=tensors.get(self.norm_name, self.norm),
            inward=self.inward.substitute(tensors),
            outward=self.outward.substitute(tensors),
        )
