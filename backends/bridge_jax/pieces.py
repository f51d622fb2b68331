"""A teacher-forced batch as it is computed: what groups share once, and what rows have alone.

`bridge.decoding.shared` says which cells these are (clause 7.14); here they are padded to sizes
that are compiled. Linear layers run over the cells of both pieces together, `[C, D]`; attention and
block know each piece by itself. Prompts that are read for a decoder are a batch of shared cells.

Axes: G groups, P timesteps that they share, R places for rows, T timesteps that rows have alone.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from bridge.decoding.rows import only_active
from bridge.decoding.shared import SharedPlan
from bridge_jax.block import Cells, Grid, Layout, joined
from bridge_jax.compiled import fine

STEPS = 16  # timesteps are padded at least to it


class Piece(NamedTuple):
    """Cells of so many groups or rows, teacher-forced."""

    tokens: Int[Any, "A S"]
    positions: Int[Any, "A S"]
    active: Bool[Any, "A S"]

    @classmethod
    def none(cls) -> "Piece":
        """Without a cell."""
        ids = np.zeros((0, 0), np.int32)
        return cls(ids, ids, ids.astype(bool))


class Pieces(NamedTuple):
    """The cells to compute."""

    shared: Piece  # [G, P]
    alone: Piece  # [R, T]
    grid: Grid  # of the places for rows

    @property
    def tokens(self) -> Int[Any, " C"]:
        """Of all cells."""
        return joined(self.shared.tokens, self.alone.tokens)

    @property
    def positions(self) -> Int[Any, " C"]:
        """Of all cells."""
        return joined(self.shared.positions, self.alone.positions)

    @property
    def cells(self) -> Cells:
        """Which are active."""
        return Cells(self.shared.active, self.alone.active, self.grid)


class Planned(NamedTuple):
    """A batch in the sizes that are compiled."""

    batch: Pieces
    places: Int[np.ndarray, "B S"]  # among the C, of each cell as it was given
    length: int  # of the table of positions that it reads


def planned(
    tokens: Int[np.ndarray, "B S"],
    groups: Int[np.ndarray, " B"],
    active: Bool[np.ndarray, "B S"],
    positions: Int[np.ndarray, "B S"],
    floor: int,
) -> Planned:
    """Of rows in any order. At least `floor` groups, of at least so many rows."""
    active = np.asarray(active)
    plan = SharedPlan.of(np.asarray(tokens), np.asarray(groups), active, np.asarray(positions))
    layout = Layout.of(groups, floor, floor, fine)
    P = fine(plan.shared, STEPS)
    T = fine(plan.alone if plan.shared else max(plan.alone, 1), STEPS)
    fed, place = (only_active(x, active).astype(np.int32) for x in (tokens, positions))

    def piece(flat: Int[np.ndarray, "A S"], lines: np.ndarray, shape: tuple[int, int]) -> Piece:
        where = np.full(shape, -1)
        where[lines, : flat.shape[1]] = flat
        found = (x.ravel()[where] for x in (fed, place, active))
        return Piece(*(np.where(where < 0, np.zeros_like(x), x) for x in found))

    shared = piece(plan.of_shared, np.arange(plan.grid.groups), (layout.groups, P))
    alone = piece(plan.of_alone, layout.places, (layout.size, T))
    places = plan.places_among(layout.groups, P, T, layout.places)
    return Planned(Pieces(shared, alone, layout.grid), places, int(place.max(initial=0)) + 1)
