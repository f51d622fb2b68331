"""How rows draw: the uniforms of clause 6.2, tabulated on the host for some steps ahead, and the
settings of each row (clause 6.9).

A uniform is a function of the seed, the step, and the numbers of the row and its prompt, so nothing
has to be known of the steps between: one table goes to the device for many of them. How it gets
there is the backend's to say.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Float, Int, UInt

from bridge.contract import Sampling
from bridge.errors import BridgeError
from bridge.philox import uniforms

STEPS = 64  # tabulated at a time

Table = TypeVar("Table")


class Uniforms(Generic[Table]):
    """The uniform of each row and step. When rows leave, come or move, make another."""

    def __init__(
        self,
        row_ids: Int[np.ndarray, " R"],
        prompt_ids: Int[np.ndarray, " R"],
        put: Callable[[Float[np.ndarray, "steps R"]], Table],
    ) -> None:
        """The numbers of the rows and of their prompts in the counter; `put` takes a table to the
        device."""
        self.row_ids, self.prompt_ids, self.put = row_ids, prompt_ids, put
        self.seeds = self.first = np.zeros(0, np.int64)
        self.table: Table | None = None

    def at(
        self, steps: Int[np.ndarray, " R"], seeds: UInt[np.ndarray, " R"], ahead: int = 1
    ) -> tuple[Table, int]:
        """A table `[steps, R]` of float32 on the device, and its line that is of these steps; the
        lines of the `ahead - 1` steps after them follow it."""
        if self.table is not None and np.array_equal(seeds, self.seeds):
            line = steps - self.first
            if len(line) and line.min() == line.max() and 0 <= line[0] <= STEPS - ahead:
                return self.table, int(line[0])
        later = np.arange(max(STEPS, ahead))[:, None]
        self.table = self.put(uniforms(seeds, steps + later, self.row_ids, self.prompt_ids))
        self.seeds, self.first = seeds.copy(), steps.copy()
        return self.table, 0


def seeds_of(sampling: Sampling | Sequence[Sampling], rows: int) -> UInt[np.ndarray, " R"]:
    """The seed that each row draws by. Refuses settings that are not one for every row."""
    if isinstance(sampling, Sampling):
        return np.full(rows, sampling.seed, np.uint64)
    if len(sampling) != rows:
        raise BridgeError(
            f"sample: {len(sampling)} settings for {rows} rows; give one, or one for every row"
        )
    return np.array([one.seed for one in sampling], np.uint64)


def alike(
    sampling: Sampling | Sequence[Sampling],
) -> list[tuple[Sampling, Int[np.ndarray, " rows"] | None]]:
    """Each setting, seeds aside, and the rows that draw by it, ascending; None: all rows do."""
    if isinstance(sampling, Sampling):
        return [(sampling, None)]
    rows: dict[Sampling, list[int]] = {}
    for row, one in enumerate(sampling):
        rows.setdefault(replace(one, seed=0) if one.seed else one, []).append(row)
    if len(rows) == 1:
        return [(one, None) for one in rows]
    return [(one, np.array(own)) for one, own in rows.items()]
