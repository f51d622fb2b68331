"""Responses in, teacher-forced batches of whole groups out (clauses 2.3 and 7.1 to 7.3).

Padding is on the right. The last token of a response is a target and never an active input, so a
row of P prompt tokens and R response tokens has P + R - 1 active cells (clause 2.5 shows one). What
rows of a group share, their prompt above all, is computed once, and counted once (clause 7.14). It
knows token ids and advantages; what made them it does not know.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile

import numpy as np
from jaxtyping import Bool, Float

from bridge.contract import Batch
from bridge.errors import BridgeError


@dataclass(frozen=True)
class Group:
    """The rows of one prompt, as training reads them. `name` is for messages: such as a problem."""

    prompt: Sequence[int]
    responses: Sequence[Sequence[int]]  # of each row, with the token that ended it
    advantages: Float[np.ndarray, " N"] | None = None
    name: str = "a group"
    learnt: Bool[np.ndarray, " N"] | None = None  # rows that have targets; None: all (clause 7.13)

    @property
    def rows(self) -> int:
        """Its width."""
        return len(self.responses)

    @property
    def length(self) -> int:
        """Timesteps of the longest row."""
        return len(self.prompt) + max(len(response) for response in self.responses) - 1

    @cached_property
    def shared(self) -> int:
        """Timesteps at which its rows are alike, from the first on: the prompt's, and those of
        whatever all responses begin with."""
        fed = zip(*(response[:-1] for response in self.responses), strict=False)
        return len(self.prompt) + sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, fed))

    @property
    def alone(self) -> int:
        """Timesteps that the longest row has after those that are shared."""
        return self.length - self.shared

    @property
    def cells(self) -> int:
        """Cells that are computed of it by itself, padding included."""
        return count_cells([self])


def count_cells(groups: Sequence[Group]) -> int:
    """Cells that are computed of a batch of these: in each group those that its rows share once,
    and each row's own, both padded to the longest (`bridge.decoding.shared`)."""
    shared = len(groups) * max(group.shared for group in groups)
    return shared + sum(group.rows for group in groups) * max(group.alone for group in groups)


def make_batch(groups: Sequence[Group], numbers: Sequence[int] | None = None) -> Batch:
    """One batch `[B, S]` of all rows, in order. `numbers`: of the groups; None: 0, 1, 2, ...

    Advantages are there if all groups have them. Raises BridgeError for a prompt or a response
    without tokens.
    """
    for group in groups:
        if not len(group.prompt) or not all(len(response) for response in group.responses):
            raise BridgeError(f"{group.name}: an empty prompt or response; leave it out")
    B, S = sum(group.rows for group in groups), max(group.length for group in groups)
    tokens, targets = np.zeros((B, S), np.int64), np.zeros((B, S), np.int64)
    active, mask = np.zeros((B, S), bool), np.zeros((B, S), bool)
    rows = (
        (group.prompt, response, group.learnt is None or group.learnt[row])
        for group in groups
        for row, response in enumerate(group.responses)
    )
    for b, (prompt, response, learnt) in enumerate(rows):
        said = np.asarray([*prompt, *response])
        first, end = len(prompt) - 1, len(said) - 1
        tokens[b, :end], active[b, :end] = said[:end], True
        targets[b, first:end], mask[b, first:end] = said[first + 1 :], learnt
    widths = [group.rows for group in groups]
    number = np.arange(len(groups)) if numbers is None else np.asarray(numbers)
    given = [group.advantages for group in groups if group.advantages is not None]
    advantages = np.concatenate(given) if len(given) == len(groups) else None
    return Batch(tokens, np.repeat(number, widths), active, targets, mask, advantages=advantages)


def pack(groups: Sequence[Group], budget: int) -> list[Batch]:
    """Micro-batches of one update, of at most `budget` computed cells each, padding included.

    Groups are sorted by what their rows have alone, so that those of a batch are about as long as
    each other, and stay whole. Raises BridgeError for a group that does not fit by itself.
    """
    order = sorted(range(len(groups)), key=lambda i: (groups[i].alone, groups[i].shared))
    parts: list[list[int]] = []
    for i in order:
        check_fits(groups[i], budget)
        if not parts or count_cells([groups[j] for j in (*parts[-1], i)]) > budget:
            parts.append([])
        parts[-1].append(i)
    return [make_batch([groups[i] for i in part], part) for part in parts]


def check_fits(group: Group, budget: int) -> None:
    """Refuse a group that would have to be cut."""
    if group.cells > budget:
        raise BridgeError(
            f"{group.name}: its {group.rows} rows of up to {group.length} tokens, of which "
            f"{group.shared} are computed once for all, are {group.cells} cells, above "
            f"micro_batch_tokens {budget}, and a group is never split (clause 7.3); raise "
            "micro_batch_tokens, or lower width or max_new_tokens"
        )
