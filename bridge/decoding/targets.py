"""What a loss reads of a batch (clause 7.1): the cells with a target, and no others.

Elsewhere targets and log-probabilities may be anything, even NaN, and logits cost a product with
the whole vocabulary. So a backend selects first and computes after: here is what it selects, in
NumPy. Axes: B rows, S timesteps, n cells with a target, row by row and by timestep within one.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from bridge.contract import Batch

LOSS_CHUNK = 256  # targets whose logits are in memory at once, where no number is given


class TargetCells(NamedTuple):
    """The cells of a batch with a target, and what it gives for each, in the batch's dtypes."""

    rows: Int[np.ndarray, " n"]
    timesteps: Int[np.ndarray, " n"]
    targets: Int[np.ndarray, " n"]
    advantages: Float[np.ndarray, " n"] | None  # that of the row
    old_logprobs: Float[np.ndarray, " n"] | None
    ref_logprobs: Float[np.ndarray, " n"] | None

    @classmethod
    def of(cls, batch: Batch) -> "TargetCells":
        """Of a batch that `inputs.check_batch` lets pass."""
        mask = batch.target_mask
        rows, timesteps = np.nonzero(mask)
        old, ref = batch.old_logprobs, batch.ref_logprobs
        return cls(
            rows,
            timesteps,
            batch.targets[mask],
            None if batch.advantages is None else batch.advantages[rows],
            None if old is None else old[mask],
            None if ref is None else ref[mask],
        )

    def flat(self, timesteps: int) -> Int[np.ndarray, " n"]:
        """Their places in the flat batch `[B * S]`, where S is `timesteps`."""
        return self.rows * timesteps + self.timesteps


def by_cell(
    values: Float[np.ndarray, " n"], mask: Bool[np.ndarray, "B S"]
) -> Float[np.ndarray, "B S"]:
    """What was found at the cells with a target, `[B, S]`; 0 where there is none (clause 7.12)."""
    cells = np.zeros(mask.shape, values.dtype)
    cells[mask] = values
    return cells
