"""How alike answers are: their diversity, and when rows start to say the same.

Tokens in, figures out; it knows nothing of models. Axes: N rows, T steps; a token of -1 means that
the row has ended.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True)
class Diversity:
    """Of the answers of one group; None where there is nothing to count or to compare.

    `edit_distance` is Levenshtein's, in tokens: the least insertions, deletions and substitutions
    that turn one answer into the other; mean over pairs of rows. `edit_share` divides each by the
    longer of the two. `distinct_1` and `distinct_2` are distinct-n of Li et al. (NAACL 2016): the
    n-grams that differ over all there are, in tokens.
    """

    answers: int
    distinct: int  # texts that differ, apart from white space around them
    edit_distance: float | None
    edit_share: float | None
    distinct_1: float | None
    distinct_2: float | None


def diversity(texts: Sequence[str], tokens: Sequence[Sequence[int]]) -> Diversity:
    """Of answers as texts and as tokens."""
    distances, shares = [], []
    for a, b in combinations(tokens, 2):
        distance, longer = edit_distance(a, b), max(len(a), len(b))
        distances.append(distance)
        shares.append(distance / longer if longer else 0.0)
    return Diversity(
        answers=len(texts),
        distinct=len({text.strip() for text in texts}),
        edit_distance=float(np.mean(distances)) if distances else None,
        edit_share=float(np.mean(shares)) if shares else None,
        distinct_1=distinct_n(tokens, 1),
        distinct_2=distinct_n(tokens, 2),
    )


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Levenshtein distance, by Wagner and Fischer's table, a row of it at a time."""
    other, places = np.asarray(b, np.int64), np.arange(len(b) + 1)
    row = places
    for i, token in enumerate(a, 1):
        best = np.empty_like(row)
        best[0] = i
        best[1:] = np.minimum(row[1:] + 1, row[:-1] + (other != token))
        # Insertions run along the row: best[j] = min over j' <= j of best[j'] + (j - j').
        row = np.minimum.accumulate(best - places) + places
    return int(row[-1])


def distinct_n(tokens: Sequence[Sequence[int]], n: int) -> float | None:
    """Distinct n-grams over all n-grams, of all answers together; None where there is none."""
    grams = [tuple(row[i : i + n]) for row in tokens for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def agreement(tokens: Int[np.ndarray, "N T"]) -> Float[np.ndarray, " T"]:
    """At each step, the share of the active rows that say the commonest token; NaN where fewer than
    two rows are active, since one has nobody to agree with."""
    alike, active = _alike(tokens)
    return np.where(active >= 2, alike / np.maximum(active, 1), np.nan)


def agree_from(tokens: Int[np.ndarray, "N T"]) -> int | None:
    """The first step from which on rows agree for good: at it, and at every later step with two or
    more active rows, at least half of them, and at least two, say the same token.

    None where there is no such step: rows differ at the last step at which two are active. *Two*,
    since of two rows that differ each is a half.
    """
    alike, active = _alike(tokens)
    differ = (active >= 2) & ((alike < 2) | (2 * alike < active))
    start = int(np.flatnonzero(differ).max(initial=-1)) + 1
    return start if (active[start:] >= 2).any() else None


def _alike(tokens: Int[np.ndarray, "N T"]) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T"]]:
    """At each step, how many rows say the commonest token, and how many are active."""
    there = tokens >= 0
    said = [((tokens == row) & there).sum(axis=0) for row in tokens]
    return np.max(said, axis=0), there.sum(axis=0)
