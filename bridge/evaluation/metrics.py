"""What responses to one problem come to: pass@k, G-Pass@k, best-of-k, maj@k, each exactly.

Counts, rewards and answers in; one number a problem out. An estimate at k from n responses is the
mean over all ways to choose k of the n. It is meant for **independent** rows. Rows of a Bridge
group depend on each other, and k of its N rows are not what a group of width k would have said:
for a group, call with k = n = N, where each function is what the group itself came to. Intervals
over problems are in `intervals.py`.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from fractions import Fraction
from math import ceil, comb

import numpy as np
from jaxtyping import Float, Int


def pass_at_k(correct: Int[np.ndarray, "*P"], n: int, k: int) -> Float[np.ndarray, "*P"]:
    """The probability that k of n responses hold a correct one, where `correct` of the n are.

        1 - C(n - c, k) / C(n, k)

    Chen et al. 2021, "Evaluating large language models trained on code" (arXiv 2107.03374). At
    k = 1 it is the mean accuracy, and at k = n whether any is correct: the coverage of a group.
    Raises ValueError unless 1 <= k <= n and 0 <= c <= n.
    """
    return g_pass_at_k(correct, n, k, 0)


def g_pass_at_k(
    correct: Int[np.ndarray, "*P"], n: int, k: int, tau: float | str | Fraction
) -> Float[np.ndarray, "*P"]:
    """The probability that at least the fraction `tau` of k of n responses is correct, and at least
    one (so that `tau = 0` is pass@k).

        sum over j >= max(1, ceil(tau k)) of C(c, j) C(n - c, k - j) / C(n, k)

    Liu et al. 2024, "Are your LLMs capable of stable reasoning?" (arXiv 2412.13147). `tau` is taken
    as the decimal number that it is written as: 0.55 of 100 is 55, which floats make 56.
    Raises ValueError as `pass_at_k`, and for a `tau` outside [0, 1].
    """
    tau = Fraction(str(tau))
    if not 0 <= tau <= 1:
        raise ValueError(f"tau must be in [0, 1], not {tau}")
    return at_least(correct, n, k, max(1, ceil(tau * k)))


def mean_g_pass_at_k(correct: Int[np.ndarray, "*P"], n: int, k: int) -> Float[np.ndarray, "*P"]:
    """mG-Pass@k: G-Pass@k averaged over tau in [0.5, 1].

        (2 / k) sum over j from ceil(k / 2) + 1 to k of G-Pass@k_(j / k)

    As Liu et al. 2024 define it: a sum of k / 2 terms for even k. At k = 1 it is 0.
    """
    sums = [at_least(correct, n, k, j) for j in range(ceil(Fraction(k, 2)) + 1, k + 1)]
    return 2 / k * np.sum(sums, axis=0) if sums else 0.0 * at_least(correct, n, k, 1)


def at_least(correct: Int[np.ndarray, "*P"], n: int, k: int, j: int) -> Float[np.ndarray, "*P"]:
    """The probability that at least j of k of n responses are correct: the hypergeometric tail."""
    _check(n, k)
    correct = np.asarray(correct)
    if correct.size and not 0 <= correct.min() <= correct.max() <= n:
        raise ValueError(f"correct must be counts in 0..{n}")
    ways = comb(n, k)
    tails = [
        sum(comb(c, i) * comb(n - c, k - i) for i in range(j, min(c, k) + 1)) / ways
        for c in range(n + 1)
    ]
    return np.array(tails, np.float64)[correct]


def best_of_k(rewards: Float[np.ndarray, "*P n"], k: int) -> Float[np.ndarray, "*P"]:
    """The expected largest reward among k of n responses: best-of-k by a perfect judge of rewards.

        sum over i from k to n of r_(i) C(i - 1, k - 1) / C(n, k),    r_(1) <= ... <= r_(n)

    since the i-th smallest is the largest of k in C(i - 1, k - 1) ways. Where rewards are 0 and 1
    it is pass@k.
    """
    rewards = np.sort(np.asarray(rewards, np.float64), axis=-1)
    n = rewards.shape[-1]
    _check(n, k)
    ways = comb(n, k)
    return rewards @ np.array([comb(i - 1, k - 1) / ways for i in range(1, n + 1)])


def maj_at_k(answers: Sequence[str | None], correct: Sequence[bool], k: int) -> float:
    """The probability that the majority answer of k of n responses is correct, exactly.

    `answers`: what each response concludes, normalised; None does not vote, and where nobody votes
    the majority is wrong. A tie is broken uniformly among the most frequent answers. That is the
    mean of `bridge.evaluation.voting.majority`, which takes the earliest row's, over all orders of
    the rows; and rows are exchangeable (clause 3.8). An answer is as correct as the responses that
    give it: where they differ, it counts with the fraction of them that is.

    Counted without drawing: for an answer with t votes, the ways to choose the other k - t
    responses such that s other answers have t votes too and none has more, each way counting
    1 / (s + 1).
    Raises ValueError unless 1 <= k <= n.
    """
    n = len(answers)
    _check(n, k)
    votes = Counter(answer for answer in answers if answer is not None)
    silent = n - votes.total()
    right = Counter(a for a, c in zip(answers, correct, strict=True) if a is not None and c)
    wins = {}  # by the number of votes: answers with as many win as often
    for own in {votes[answer] for answer in right}:
        others = list(votes.values())
        others.remove(own)
        wins[own] = _winning(own, others, silent, k) / comb(n, k)
    return float(sum(Fraction(right[a], votes[a]) * wins[votes[a]] for a in right))


def _winning(own: int, others: Iterable[int], silent: int, k: int) -> Fraction:
    """In how many choices of k responses an answer that `own` of them give wins; a tie of s + 1
    answers counts 1 / (s + 1)."""
    others, total = list(others), Fraction(0)
    for t in range(1, min(own, k) + 1):
        ways = {(k - t, 0): comb(own, t)}  # by (responses still to choose, answers that tie)
        for size in others:
            after: dict[tuple[int, int], int] = defaultdict(int)
            for (left, ties), count in ways.items():
                for j in range(min(t, size, left) + 1):
                    after[left - j, ties + (j == t)] += count * comb(size, j)
            ways = after
        for (left, ties), count in ways.items():
            total += Fraction(count * comb(silent, left), ties + 1)
    return total


def _check(n: int, k: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k must be in 1..{n}, the number of responses, not {k}")
