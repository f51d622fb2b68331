"""What an engine counts of its own work, and what the counts come to.

A row-step is one row fed at one timestep. It is alive if what came of it was used: a row that ended
on the device while others went on is fed no token there, and what was drawn past a stop is dropped.
"""

from dataclasses import dataclass


@dataclass
class Stats:
    """Sums since an engine began."""

    prompts: int = 0  # read
    tokens: int = 0  # said by rows
    timesteps: int = 0
    row_steps: int = 0  # computed
    alive: int = 0  # of them
    places: int = 0  # row-steps that the same timesteps have room for
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def alive_share(self) -> float:
        """Of the row-steps that were computed, those of rows alive; 1 where there were none."""
        return self.alive / self.row_steps if self.row_steps else 1.0

    @property
    def occupancy(self) -> float:
        """Of the places that there is room for, those that a row alive had; 1 where there were
        none."""
        return self.alive / self.places if self.places else 1.0
