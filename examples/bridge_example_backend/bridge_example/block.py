"""The Bridge block (chapter 3): attention whose sequence is the batch, at each timestep separately.

Rows become a grid `[G, N]`, groups by rows of the widest one, so that the cost is G * N^2 a
timestep and never (G * N)^2. Where the rows of a group lie in the batch does not matter.

Axes: B rows, S timesteps, D model width, H heads, d head width, E = H * d.
"""

from collections.abc import Mapping

import numpy as np
from bridge.config import BridgeConfig

from bridge_example.tape import Array, Var, linear, rms_norm, silu, softmax, where

Weights = Mapping[str, Var]  # by checkpoint name


class Grid:
    """Where each row lies in `[G, N]`, and which cells of it hold a row."""

    def __init__(self, groups: Array) -> None:
        """Of rows that answer the prompts `groups [B]`, in any order (clause 2.2)."""
        _, group, widths = np.unique(groups, return_inverse=True, return_counts=True)
        order = np.argsort(group, kind="stable")
        first = np.cumsum(widths) - widths
        self.group = group  # [B]
        self.place = np.empty(len(group), np.int64)  # [B], within its group
        self.place[order] = np.arange(len(group)) - first[group[order]]
        self.filled = np.arange(widths.max(initial=0)) < widths[:, None]  # [G, N]
        # An empty cell reads its group's first row, and is masked.
        self.row = np.repeat(order[first][:, None], self.filled.shape[1], axis=1)  # [G, N]
        self.row[self.group, self.place] = np.arange(len(group))

    def spread(self, rows: Var) -> Var:
        """`[B, ...]` to `[G, N, ...]`."""
        return rows[self.row]

    def collect(self, cells: Var) -> Var:
        """`[G, N, ...]` back to `[B, ...]`."""
        return cells[self.group, self.place]


def block(
    h: Var, weights: Weights, prefix: str, config: BridgeConfig, grid: Grid, active: Array
) -> Var:
    """The residual stream `h [B, S, D]` plus what each row reads from its group (clause 3.6).

    `prefix` is that of the block's tensors; `active [B, S]`. Where not active, h is left as it is.
    """
    return h + added(h, weights, prefix, config, grid, active)


def added(
    h: Var, weights: Weights, prefix: str, config: BridgeConfig, grid: Grid, active: Array
) -> Var:
    """What `block` adds: `[B, S, D]`, 0 where not active."""

    def weight(name: str) -> Var:
        return weights[f"{prefix}.{name}.weight"]

    here = active[..., None]
    # Before anything is computed: 0 times NaN is NaN, so a mask on the scores alone is not enough.
    x = rms_norm(where(here, h), weight("norm"), config.norm_eps)
    if config.kind == "mlp":  # P-Match reads no other row (clause 8.1)
        y = linear(silu(linear(x, weight("up_proj"))), weight("down_proj"))
    else:
        q, k, v = (linear(x, weight(f"{name}_proj")) for name in "qkv")
        y = linear(mix(q, k, v, config.num_heads, grid, active), weight("o_proj"))
    return where(here, y)


def norm_ratio(h: Var, y: Var, active: Array) -> float:
    """Clause 3.9: the norm of y, which is added, to that of h, its mean over active cells."""
    added, before = (np.linalg.norm(z.value[active], axis=-1) for z in (y, h))
    ratio = np.divide(added, before, out=np.zeros_like(before), where=before > 0)
    return float(ratio.sum()) / max(ratio.size, 1)


def mix(q: Var, k: Var, v: Var, H: int, grid: Grid, active: Array) -> Var:
    """Each row's softmax over the rows that it may read (clauses 3.3 to 3.5): `[B, S, E]`."""
    (G, N), S, E = grid.filled.shape, q.shape[1], q.shape[2]
    d = E // H

    def heads(x: Var, *axes: int) -> Var:
        return grid.spread(x).reshape(G, N, S, H, d).transpose(*axes)

    q, k, v = heads(q, 0, 2, 3, 1, 4), heads(k, 0, 2, 3, 4, 1), heads(v, 0, 2, 3, 1, 4)
    score = q @ k * d**-0.5  # [G, S, H, N, N]
    on = (active[grid.row] & grid.filled[..., None]).transpose(0, 2, 1)  # [G, S, N]
    allowed = on[..., :, None] & on[..., None, :]
    p = softmax(score, allowed[:, :, None])
    y = (p @ v).transpose(0, 3, 1, 2, 4).reshape(G, N, S, E)
    return grid.collect(y)
