"""The Bridge block (chapter 3): attention whose sequence is the batch, at each timestep separately.

Rows of G groups of up to N rows become a grid `[G, N]`, so the cost is G * N^2 a timestep, never
(G * N)^2. Equal contiguous groups are that grid already, by a reshape; any others are gathered into
a padded one. Also holds what the host shares with the block: the RMS norm.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from bridge.config import ModelConfig
from bridge.decoding.rows import GridPlan
from bridge_torch import pointwise
from bridge_torch.linear import Whole

# Timesteps of groups that attend in one call. CUDA's kernels take fewer than 2**16 of them, and
# flash attention's gradient counts the numbers of all in 32 bits, after padding each to 128 rows.
CELLS = 2**14


def wide(dtype: torch.dtype) -> torch.dtype:
    """Where norms, softmax and rope are computed: float32, or float64 for a float64 model."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm(x: Float[Tensor, "... D"], weight: Float[Tensor, " D"], eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight`, in float32 or wider (clause 3.2)."""
    if x.device.type != "cpu":
        return F.rms_norm(x, weight.shape, weight, eps)
    if torch.is_grad_enabled():
        return pointwise.rms_norm(x, weight, eps)
    # torch has no fused norm for CPUs. This is half as many kernels as what it does instead.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide(x.dtype))
    square = torch.addcmul(_scalar(eps, norm.dtype), norm, norm, value=1 / x.shape[-1])
    return (x * square.rsqrt_()).mul_(weight).to(x.dtype)


@cache
def _scalar(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=dtype)


class Norm(nn.Module):
    """`rms_norm` with a weight that is learnt."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return rms_norm(x, self.weight, self.eps)


@dataclass(frozen=True)
class Grid:
    """Where each of R rows lies in `[G, N]`. Index tensors are made once, not at each step."""

    groups: int
    width: int
    to_grid: Tensor | None = None  # [G * N] rows; None: the rows are the grid, as they lie
    to_rows: Tensor | None = None  # [R] places of the flat grid
    filled: Bool[Tensor, "G N"] | None = None  # None: every place holds a row

    @classmethod
    def of(cls, groups: Sequence[int] | np.ndarray, device: torch.device | str) -> "Grid":
        """The grid of rows that answer the prompts `groups [R]`, in any order (clause 2.2)."""
        return cls.planned(GridPlan.of(groups), device)

    @classmethod
    def planned(cls, plan: GridPlan, device: torch.device | str) -> "Grid":
        """A plan on a device."""
        if plan.as_they_lie:
            return cls(plan.groups, plan.width)
        return cls(
            plan.groups,
            plan.width,
            torch.from_numpy(plan.to_grid).to(device),
            torch.from_numpy(plan.to_rows).to(device),
            None if plan.full else torch.from_numpy(plan.filled).to(device),
        )

    def spread(self, rows: Tensor, dim: int = 0) -> Tensor:
        """Rows along `dim` to places: R becomes G * N."""
        return rows if self.to_grid is None else rows.index_select(dim, self.to_grid)

    def collect(self, places: Tensor, dim: int = 0) -> Tensor:
        """Places along `dim` back to rows: G * N becomes R."""
        return places if self.to_rows is None else places.index_select(dim, self.to_rows)


class Mixing(Protocol):
    """Of the cells of a batch, what blocks need to know."""

    def cleared(self, x: Float[Tensor, "*cells D"]) -> Float[Tensor, "*cells D"]:
        """Zeros where a cell is not active."""
        ...

    def mixing(self, x: Float[Tensor, "*cells D"]) -> Float[Tensor, "*mixing D"]:
        """The cells that read other rows; each of the others reads what it gives itself."""
        ...

    def mix(
        self, parts: Sequence[Float[Tensor, "*_ E"]], H: int | None
    ) -> Float[Tensor, "*cells E"]:
        """See `mix`: q and k of the cells that `mixing` gives, and v of all."""
        ...


class Block(nn.Module):
    """One layer's block, which learns; `PackedBlock` is the one that decodes. A q, k, v and o
    projection, or an up and a down one: P-Match, the MLP baseline (clause 8.1)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        bridge, D = config.bridge, config.hidden_size
        assert bridge is not None
        E = bridge.inner
        self.norm = Norm(D, bridge.norm_eps)
        self.num_heads = bridge.num_heads if bridge.kind == "attention" else None
        if self.num_heads is None:
            self.up_proj = nn.Linear(D, 2 * E, bias=False)
            self.down_proj = nn.Linear(2 * E, D, bias=False)
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(D, E, bias=False) for _ in "qkv")
            self.o_proj = nn.Linear(E, D, bias=False)

    def inward(self) -> dict[str, nn.Linear]:
        """What reads the stream, by name, in stacking order."""
        if self.num_heads is None:
            return {"up_proj": self.up_proj}
        return {"q_proj": self.q_proj, "k_proj": self.k_proj, "v_proj": self.v_proj}

    def outward(self) -> dict[str, nn.Linear]:
        """What adds to it, by name."""
        return {"down_proj": self.down_proj} if self.num_heads is None else {"o_proj": self.o_proj}

    def forward(
        self,
        hidden: Float[Tensor, "*cells D"],
        cells: Mixing,
    ) -> Float[Tensor, "*cells D"]:
        """What a `PackedBlock` of the same weights gives, with gradients."""
        x = self.norm(cells.cleared(hidden))
        if self.num_heads is None:
            parts = [self.up_proj(x)]
        else:
            mixing = cells.mixing(x)
            parts = [self.q_proj(mixing), self.k_proj(mixing), self.v_proj(x)]
        (project,) = self.outward().values()
        return hidden + cells.cleared(project(cells.mix(parts, self.num_heads)))


@dataclass(frozen=True, eq=False)
class PackedBlock:
    """One layer's weights. `inward`: q, k and v stacked (P-Match: up); `outward`: o (down)."""

    norm: Float[Tensor, " D"]
    inward: Whole
    outward: Whole
    num_heads: int | None  # None: P-Match
    eps: float

    def __call__(
        self,
        hidden: Float[Tensor, "R S D"],
        grid: Grid,
        active: Bool[Tensor, "R S"] | None = None,
    ) -> Float[Tensor, "R S D"]:
        """The residual stream plus what each row reads from its group (clauses 3.2 to 3.6).

        `active` None: every cell is. Inactive cells influence nothing, even if they hold NaN.
        """
        x = self._read(cleared(hidden, active), grid, active)
        if active is None:
            return self.outward.add_to(hidden, x)
        return hidden + cleared(self.outward(x), active)

    def added(self, hidden: Float[Tensor, "*cells D"], cells: Mixing) -> Float[Tensor, "*cells D"]:
        """What is added to the residual stream of any cells, as `Block` does."""
        x = self.inward(rms_norm(cells.cleared(hidden), self.norm, self.eps))
        parts = [x]
        if self.num_heads is not None:
            q, k, v = x.chunk(3, -1)
            parts = [cells.mixing(q), cells.mixing(k), v]
        return cells.cleared(self.outward(cells.mix(parts, self.num_heads)))

    def _read(
        self, x: Float[Tensor, "R S D"], grid: Grid, active: Bool[Tensor, "R S"] | None
    ) -> Float[Tensor, "R S E"]:
        x = rms_norm(x, self.norm, self.eps)
        if self.num_heads is not None and grid.width == 1 and not self.inward.weight.is_mkldnn:
            return F.linear(x, self.inward.weight[-self.inward.sizes[-1] :])  # v (clause 3.8)
        x = self.inward(x)
        parts = [x] if self.num_heads is None else x.chunk(3, -1)
        return mix(parts, self.num_heads, grid, active)


def cleared(
    x: Float[Tensor, "R S D"], active: Bool[Tensor, "R S"] | None
) -> Float[Tensor, "R S D"]:
    """Zeros where a cell is not active. A zero residual gives zero q, k and v: nothing of the cell
    is left, not even NaN."""
    return x if active is None else x.masked_fill(~active[..., None], 0)


def mix(
    parts: Sequence[Float[Tensor, "R S _"]],
    H: int | None,
    grid: Grid,
    active: Bool[Tensor, "R S"] | None,
) -> Float[Tensor, "R S E"]:
    """What the outward projection is to project. `parts`: q, k and v of H heads; H None: what
    P-Match projected upwards."""
    if H is None:
        return F.silu(parts[0])
    if grid.width == 1:  # a softmax over one row is 1 (clause 3.8)
        return parts[2]
    _, S, E = parts[0].shape
    G, N = grid.groups, grid.width

    def in_grid(x: Float[Tensor, "R S E"]) -> Float[Tensor, "G_S H N d"]:
        cells = grid.spread(x).view(G, N, S, H, -1).permute(0, 2, 3, 1, 4)
        # A decoding step has one timestep, and its views need no copy.
        return (cells.contiguous() if S > 1 else cells).view(G * S, H, N, -1)

    q, k, v = map(in_grid, parts)
    mixed = attend(q, k, v, allowed(grid, active, S))
    mixed = mixed.view(G, S, H, N, -1).permute(0, 3, 1, 2, 4).reshape(G * N, S, E)
    return grid.collect(mixed)


def attend(
    q: Float[Tensor, "C H N d"],
    k: Float[Tensor, "C H N d"],
    v: Float[Tensor, "C H N d"],
    mask: Bool[Tensor, "C one N N"] | None,
) -> Float[Tensor, "C H N d"]:
    """Attention within each of C timesteps of groups, no more at once than kernels take."""
    if len(q) > CELLS:
        masks = repeat(None) if mask is None else mask.split(CELLS)
        lots = zip(q.split(CELLS), k.split(CELLS), v.split(CELLS), masks, strict=False)
        return torch.cat([attend(*lot) for lot in lots])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def allowed(grid: Grid, active: Bool[Tensor, "R S"] | None, S: int) -> Tensor | None:
    """Clause 3.4 as `[G * S, 1, N, N]`. A blocked row may read its own zeros, so that no softmax
    is empty."""
    if active is None and grid.filled is None:
        return None
    G, N = grid.groups, grid.width
    keys = torch.ones((), dtype=torch.bool)
    if active is not None:
        keys = grid.spread(active).reshape(G, N, S)
    if grid.filled is not None:
        keys = keys.to(grid.filled.device) & grid.filled[:, :, None].expand(G, N, S)
    keys = keys.transpose(1, 2).reshape(G * S, 1, 1, N)
    return keys | torch.eye(N, dtype=torch.bool, device=keys.device)
