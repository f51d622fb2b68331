"""The uniforms that rows draw by (clause 6.2), tabulated on the host for some steps ahead.

A draw is a function of the seed, the step, and the numbers of the row and its prompt, so nothing
has to be known of the steps between: one table goes to the device for many of them. How it gets
there is the backend's to say.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Float, Int

from bridge.philox import uniforms

STEPS = 64  # tabulated at a time

Table = TypeVar("Table")


class Uniforms(Generic[Table]):
    """The uniform of each step and row. When rows leave or move, make another."""

    def __init__(
        self,
        row_ids: Int[np.ndarray, " R"],
        prompt_ids: Int[np.ndarray, " R"],
        put: Callable[[Float[np.ndarray, "steps R"]], Table],
    ) -> None:
        """The numbers of the rows and of their prompts in the counter; `put` takes a table to the
        device."""
        self.row_ids, self.prompt_ids, self.put = row_ids, prompt_ids, put
        self.made: tuple[int, int, Table] | None = None  # of which seed, from which step on

    def at(self, step: int, seed: int) -> tuple[Table, int]:
        """A table `[steps, R]` of float32 on the device, and its line that is of this step."""
        if self.made is None or seed != self.made[0] or not 0 <= step - self.made[1] < STEPS:
            steps = np.arange(step, step + STEPS)[:, None]
            table = self.put(uniforms(seed, steps, self.row_ids, self.prompt_ids))
            self.made = seed, step, table
        _, first, table = self.made
        return table, step - first
