"""Which cells of a teacher-forced batch are computed: what rows share, once (clause 7.14).

The rows of a group begin with the same timesteps, its prompt above all. A batch `[B, S]` becomes a
piece `[G, P]` of what groups share and a piece `[B, T]` of what rows have alone; both begin at
their column 0 and are padded on the right. Planned in NumPy, for every backend alike.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int

from bridge.decoding.rows import GridPlan, only_active


@dataclass(frozen=True)
class SharedPlan:
    """The two pieces of a batch, and where each of its cells is found in them."""

    grid: GridPlan  # of the B rows: `grid.line` is the group of each, in the order of the pieces
    lead: Int[np.ndarray, " G"]  # timesteps that a group shares
    length: Int[np.ndarray, " B"]  # timesteps of a row, up to its last active cell
    timesteps: int  # S

    @classmethod
    def of(
        cls,
        tokens: Int[np.ndarray, "B S"],
        groups: Int[np.ndarray, " B"],
        active: Bool[np.ndarray, "B S"],
        positions: Int[np.ndarray, "B S"],
    ) -> "SharedPlan":
        """Of a batch, whose cells that are not active may hold anything."""
        grid = GridPlan.of(groups)
        first = grid.first[grid.line]  # the row that each is compared with
        alike = active == active[first]
        for cells in (only_active(tokens, active), only_active(positions, active)):
            alike &= cells == cells[first]
        S = active.shape[1]
        length = np.where(active.any(axis=1), S - np.argmax(active[:, ::-1], axis=1), 0)
        lead = np.full(grid.groups, S)
        agreed = np.where(alike.all(axis=1), S, np.argmin(alike, axis=1))
        np.minimum.at(lead, grid.line, agreed)
        longest = np.zeros(grid.groups, np.int64)
        np.maximum.at(longest, grid.line, length)
        return cls(grid, np.minimum(lead, longest), length, S)

    @property
    def shared(self) -> int:
        """P: timesteps of the piece that groups share."""
        return int(self.lead.max(initial=0))

    @property
    def rest(self) -> Int[np.ndarray, " B"]:
        """Timesteps that each row has alone."""
        return np.maximum(self.length - self.lead[self.grid.line], 0)

    @property
    def alone(self) -> int:
        """T: timesteps of the piece of what rows have alone."""
        return int(self.rest.max(initial=0))

    @property
    def cells(self) -> int:
        """Cells that are computed, padding left out."""
        return int(self.lead.sum() + self.rest.sum())

    @cached_property
    def of_shared(self) -> Int[np.ndarray, "G P"]:
        """The flat cell `b * S + s` of the batch that each shared cell is, in the group's first
        row; -1: padding."""
        s, first = np.arange(self.shared), self.grid.first[:, None]
        return np.where(s < self.lead[:, None], first * self.timesteps + s, -1)

    @cached_property
    def of_alone(self) -> Int[np.ndarray, "B T"]:
        """The flat cell of the batch that each other cell is; -1: padding."""
        t, lead = np.arange(self.alone), self.lead[self.grid.line]
        flat = np.arange(len(lead))[:, None] * self.timesteps + lead[:, None] + t
        return np.where(t < self.rest[:, None], flat, -1)

    @cached_property
    def places(self) -> Int[np.ndarray, "B S"]:
        """Where each cell is in the two pieces, flat and one after the other, `[G * P + B * T]`;
        of a cell after its row's last active one, any place."""
        rows = np.arange(len(self.grid.line))
        return self.places_among(self.grid.groups, self.shared, self.alone, rows)

    def places_among(
        self, groups: int, shared: int, alone: int, rows: Int[np.ndarray, " B"]
    ) -> Int[np.ndarray, "B S"]:
        """`places` in pieces that are padded, `[groups, shared]` and `[_, alone]`, with each row at
        its place among `rows`."""
        s, line = np.arange(self.timesteps), self.grid.line
        lead = self.lead[line][:, None]
        after = groups * shared + rows[:, None] * alone + s - lead
        ends = s >= self.length[:, None]
        return np.where(ends, 0, np.where(s < lead, line[:, None] * shared + s, after))
