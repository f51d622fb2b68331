"""What a decoder remembers: keys and values, of prompts and of rows' own timesteps (chapter 4).

A prompt's are shared by the rows of its group. Rows that end leave every tensor, in place. The
Bridge block has no cache: it reads the rows that are left.

Axes: G prompts, P prefix slots, R rows left, T own timesteps, K key heads, d head width.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridge.decoding.rows import Rows
from bridge_torch.block import Grid


@dataclass
class Cache:
    """The state of a decoder at one timestep."""

    prefix: Float[Tensor, "L two G K P d"]
    padding: Bool[Tensor, "G one one one P"] | None  # slots without a token; None: there are none
    own: Float[Tensor, "L two rows K T d"]  # of R rows, the first ones
    rows: Rows  # that are left; their prompts end at slot P
    grid: Grid
    step: int = 0  # own timesteps that were fed

    @classmethod
    def of(
        cls,
        prefix: Float[Tensor, "L two G K P d"],
        active: Bool[np.ndarray, "G P"],
        rows: Rows,
        timesteps: int,
    ) -> "Cache":
        """Room for as many timesteps of these rows."""
        L, two, _, K, _, d = prefix.shape
        padding = None if active.all() else ~torch.from_numpy(active).to(prefix.device)
        return cls(
            prefix=prefix,
            padding=None if padding is None else padding[:, None, None, None, :],
            own=prefix.new_empty(L, two, len(rows), K, max(timesteps, 1), d),
            rows=rows,
            grid=Grid.of(rows.group, prefix.device),
        )

    @property
    def end(self) -> int:
        """Above every position that there is room for."""
        return self.prefix.shape[4] + self.own.shape[4]

    def compact(self, kept: Int[np.ndarray, " kept"]) -> None:
        """Only the rows at these places, ascending, stay; prompts without rows go too."""
        for new, old in enumerate(kept):
            if new != old:
                self.own[:, :, new, :, : self.step] = self.own[:, :, old, :, : self.step]
        self.rows, prompts = self.rows.keep(kept).compact()
        if len(prompts) < self.prefix.shape[2]:
            left = torch.from_numpy(prompts).to(self.own.device)
            self.prefix = self.prefix.index_select(2, left)
            if self.padding is not None:
                self.padding = self.padding.index_select(0, left)
        self.grid = Grid.of(self.rows.group, self.own.device)
