"""Groups that come to one decoder in waves, each with what is fed to it and when its rows end.

A case says what comes when; that nothing of it depends on the rest is for checks to show. Steps are
a row's own. Axes: R rows of all waves, in the order of their coming; V vocabulary.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from bridge_conformance.cases import DecodeCase, ModelCase

SHORTEST = 4  # steps of a case; its waves may then have 2 tokens and more


class Wave(NamedTuple):
    """Prompts that are admitted together."""

    after: int  # timesteps since the wave before; it comes sooner where no row is left
    prompts: int  # the next so many of the case


@dataclass(frozen=True)
class ComingCase:
    """`text`: prompts, widths, and the tokens that rows are fed where a check does not draw them;
    its `steps` are the most that a row may have."""

    text: DecodeCase
    waves: tuple[Wave, ...]

    @property
    def model(self) -> ModelCase:
        """The model that decodes."""
        return self.text.model

    @property
    def seed(self) -> int:
        """Of all that is not in `text`."""
        return self.text.seed

    @cached_property
    def wave_of(self) -> np.ndarray:
        """The wave that each row comes with: `[R]`."""
        waves = np.repeat(np.arange(len(self.waves)), [wave.prompts for wave in self.waves])
        return waves[self.text.row_prompt]

    @cached_property
    def prompt_ids(self) -> np.ndarray:
        """The number of each prompt in the counter: not its place, which others may have too."""
        return 11 + 3 * np.arange(len(self.text.prompts))

    @cached_property
    def ends(self) -> np.ndarray:
        """The tokens that each row says: `[R]`, 1 to `steps`; one row of each prompt as many as
        its wave may."""
        rng = np.random.default_rng([self.seed, 2])
        ends = rng.integers(1, self.text.steps + 1, size=len(self.wave_of))
        for prompt in range(len(self.text.prompts)):
            own = np.flatnonzero(self.text.row_prompt == prompt)
            ends[rng.choice(own)] = self.limits[own[0]]
        return np.minimum(ends, self.limits)

    @cached_property
    def limits(self) -> np.ndarray:
        """The tokens that each row may have, which is its wave's to say: `[R]`."""
        rng = np.random.default_rng([self.seed, 3])
        least = self.text.steps - 2
        return rng.integers(least, self.text.steps + 1, size=len(self.waves))[self.wave_of]

    @cached_property
    def alive(self) -> np.ndarray:
        """At which of its own steps each row is there: `[steps, R]` bool."""
        return np.arange(self.text.steps)[:, None] < self.ends
