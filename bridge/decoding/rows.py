"""How the rows of a batch lie, and which are left: what every backend plans in NumPy alike.

In: groups, prompts, widths, which cells are active. Out: NumPy arrays that say what to gather, pad,
mask and number. A backend asks once a batch, or as rows leave, and puts them onto its device. It
knows no framework and refuses nothing: what is asked here has passed `inputs`.

Axes: B rows, S timesteps; of rows that are decoded R are left, of G prompts whose slots are P;
N rows of the widest group.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from bridge.decoding.inputs import default_positions


@dataclass(frozen=True)
class GridPlan:
    """Where each of R rows lies in a grid `[G, N]`: a line a group, and a place in it a row.

    A block that attends within lines costs G N^2 a timestep, never (G N)^2. Lines stand in the
    order in which groups first appear, since a group's number is only a name (clause 2.2), and the
    rows of a group in theirs. So equal contiguous groups are their grid as they lie.
    """

    line: Int[np.ndarray, " R"]
    place: Int[np.ndarray, " R"]
    groups: int  # G
    width: int  # N

    @classmethod
    def of(cls, groups: Sequence[int] | Int[np.ndarray, " R"]) -> "GridPlan":
        """The smallest grid for rows of these groups, in any order."""
        _, first, group, widths = np.unique(
            np.asarray(groups), return_index=True, return_inverse=True, return_counts=True
        )
        lines = np.argsort(first)  # the groups, by the row with which each begins
        line, widths = np.argsort(lines)[group], widths[lines]
        place = np.empty_like(line)
        # Sorted by line, a row's place is how far it is from the first row of its line.
        order = np.argsort(line, kind="stable")
        place[order] = np.arange(len(line)) - np.repeat(np.cumsum(widths) - widths, widths)
        return cls(line, place, len(widths), int(widths.max(initial=0)))

    def padded(self, groups: int, width: int) -> "GridPlan":
        """The same rows in a grid with at least as many lines and places."""
        return replace(self, groups=groups, width=width)

    @property
    def as_they_lie(self) -> bool:
        """Whether a reshape of the rows is the grid."""
        return self.full and bool((self.to_rows == np.arange(len(self.line))).all())

    @property
    def full(self) -> bool:
        """Whether every place holds a row."""
        return len(self.line) == self.groups * self.width

    @property
    def first(self) -> Int[np.ndarray, " G"]:
        """The row with which each line begins; lines without rows are left out."""
        rows = np.flatnonzero(self.place == 0)
        return rows[np.argsort(self.line[rows])]

    @property
    def to_rows(self) -> Int[np.ndarray, " R"]:
        """The place of each row in the flat grid: `flat[to_rows]` are the rows."""
        return self.line * self.width + self.place

    @property
    def to_grid(self) -> Int[np.ndarray, " G_N"]:
        """The row of each place of the flat grid: `rows[to_grid]` are the places.

        One without a row is masked, and reads the first of its own group: 0 times another group's
        NaN would be NaN. In a line without a group it reads row 0.
        """
        rows = np.zeros((self.groups, self.width), np.int64)
        first = self.place == 0
        rows[self.line[first]] = np.flatnonzero(first)[:, None]
        rows[self.line, self.place] = np.arange(len(self.line))
        return rows.reshape(-1)

    @property
    def filled(self) -> Bool[np.ndarray, "G N"]:
        """Which places hold a row."""
        filled = np.zeros((self.groups, self.width), bool)
        filled[self.line, self.place] = True
        return filled


@dataclass(frozen=True)
class Rows:
    """The rows that are left of those that are decoded, in the order in which prompts came."""

    group: Int[np.ndarray, " R"]  # the prompt that each answers: 0..G-1, ascending
    lengths: Int[np.ndarray, " G"]  # tokens of each prompt
    # What stands for a row in the counter of its draws, and never changes (clause 6.2).
    row_ids: Int[np.ndarray, " R"]
    prompt_ids: Int[np.ndarray, " R"]
    steps: Int[np.ndarray, " R"]  # own timesteps that each was fed; equal within a group
    limits: Int[np.ndarray, " R"]  # how many it may be: the last token is drawn and not fed

    @classmethod
    def of(
        cls,
        prompts: Sequence[np.ndarray],
        widths: Sequence[int],
        max_new_tokens: int,
        prompt_ids: Sequence[int] | None = None,
    ) -> "Rows":
        """`widths[g]` rows of prompt g, whose number is `prompt_ids[g]` (None: g), before their
        first token."""
        ids = np.arange(len(prompts)) if prompt_ids is None else np.asarray(prompt_ids, np.int64)
        group = np.repeat(np.arange(len(prompts)), widths)
        return cls(
            group,
            np.array([len(prompt) for prompt in prompts], np.int64),
            np.concatenate([np.arange(width) for width in widths]),
            ids[group],
            np.zeros(len(group), np.int64),
            np.full(len(group), max_new_tokens - 1),
        )

    @classmethod
    def none(cls) -> "Rows":
        """Of a decoder to which no group has come yet."""
        return cls(*(np.zeros(0, np.int64) for _ in fields(cls)))

    def __len__(self) -> int:
        """R, how many are left."""
        return len(self.group)

    @property
    def positions(self) -> Int[np.ndarray, " R"]:
        """Where the next own timestep of each row stands in its text (clause 2.4)."""
        return self.lengths[self.group] + self.steps

    @property
    def left(self) -> Int[np.ndarray, " R"]:
        """How many timesteps each may still be fed."""
        return self.limits - self.steps

    @property
    def in_step(self) -> bool:
        """Whether all rows have been fed as many timesteps, so that one number says it."""
        return len(self) == 0 or bool((self.steps == self.steps[0]).all())

    def keep(self, rows: Int[np.ndarray, " kept"]) -> "Rows":
        """The rows at these places, ascending, alone; the prompts stay, even one without rows."""
        own = ("group", "row_ids", "prompt_ids", "steps", "limits")
        return replace(self, **{name: getattr(self, name)[rows] for name in own})

    def compact(self) -> tuple["Rows", Int[np.ndarray, " left"]]:
        """These rows without the prompts that none of them answers, numbered anew; and which
        prompts are left, ascending."""
        prompts, group = np.unique(self.group, return_inverse=True)
        return replace(self, group=group, lengths=self.lengths[prompts]), prompts

    def fed(self, timesteps: int | Int[np.ndarray, " R"]) -> "Rows":
        """The same rows so many timesteps later; below 0: gone back (clause 4.7)."""
        return replace(self, steps=self.steps + timesteps)

    def joined(self, others: "Rows") -> "Rows":
        """These rows, and after them others with their prompts (clause 4.5)."""
        both = {
            field.name: np.concatenate([getattr(self, field.name), getattr(others, field.name)])
            for field in fields(self)
        }
        both["group"][len(self) :] += len(self.lengths)
        return Rows(**both)


class Padded(NamedTuple):
    """Prompts as one batch to read."""

    tokens: Int[np.ndarray, "G P"]  # 0 where not active
    active: Bool[np.ndarray, "G P"]
    positions: Int[np.ndarray, "G P"]


def left_padded(prompts: Sequence[np.ndarray], slots: int | None = None) -> Padded:
    """Prompts that all end with the last of P slots, so that a slot is as far from the end in all
    (clause 2.4). `slots`: P, at least the longest one's tokens; None: as many."""
    P = max(len(prompt) for prompt in prompts) if slots is None else slots
    tokens = np.zeros((len(prompts), P), np.int64)
    active = np.zeros((len(prompts), P), bool)
    for g, prompt in enumerate(prompts):
        tokens[g, P - len(prompt) :] = prompt
        active[g, P - len(prompt) :] = True
    return Padded(tokens, active, default_positions(active))


def only_active(
    values: Int[np.ndarray, "B S"], active: Bool[np.ndarray, "B S"]
) -> Int[np.ndarray, "B S"]:
    """Tokens or positions, and 0 at inactive cells, where any number may be given (clause 2.3)."""
    return np.where(active, values, 0)


def causal_alone(
    active: Bool[np.ndarray, "B S"], positions: Int[np.ndarray, "B S"], window: int | None
) -> bool:
    """Whether a causal mask is all that attention needs (clauses 5.4 and 5.5): padding, if any,
    comes after all of a row's active cells, and none of these is further than the window from
    another. What attention gives at inactive cells is then to be cleared, and not to be read."""
    if (active[:, 1:] & ~active[:, :-1]).any():
        return False
    return inside_window(active, positions, window)


def inside_window(
    active: Bool[np.ndarray, "B S"], positions: Int[np.ndarray, "B S"], window: int | None
) -> bool:
    """Whether no two active cells of a row are further than the window from another, so that it
    hides nothing (clause 5.5)."""
    if window is None:
        return True
    last = np.where(active, positions, -1).max(axis=1, initial=-1)
    first = np.where(active, positions, last[:, None]).min(axis=1, initial=np.iinfo(np.int64).max)
    return bool((last - first < window).all())


def lost_to_window(window: int | None, slots: int, timesteps: int) -> tuple[int, int]:
    """How many of a prompt's first slots, and of a row's own first timesteps, the last timestep
    reads no more (clause 5.5). The same for all rows that have been fed as many `timesteps`: a
    window is counted back from the present, and the prompts end with the same slot
    (`left_padded`)."""
    lost = 0 if window is None else max(0, slots + timesteps - window)
    return min(lost, slots), max(0, lost - slots)
