"""What falls on which step: draws, problems, orders, and the learning rate.

Pure functions of the run's seed and of numbers that count steps: nothing is drawn, so nothing is
saved. Randomness is Philox (clause 6.1) at counters whose last word is 2 or 3, which sampling (6.2)
and initialisation (8.2) leave alone. A purpose is what a number is for, and keeps streams apart.
"""

import math
from functools import lru_cache

import numpy as np
from jaxtyping import Int

from bridge.philox import philox4x32

SCHEDULES = ("constant", "linear", "cosine")  # of the learning rate, after its warm-up
ROLLOUTS, VALIDATION, SAMPLES, PROBLEMS, MINIBATCHES, ROWS, GROUPS = range(7)  # purposes


def stream_seed(seed: int, purpose: int, number: int) -> int:
    """A seed of 64 bits for the sampling of step, or batch, `number`."""
    low, high = philox4x32((number, purpose, 0, 2), seed)[:2].tolist()
    return low | high << 32


@lru_cache(maxsize=4)
def permutation(size: int, seed: int, purpose: int, number: int) -> Int[np.ndarray, " size"]:
    """0 to size - 1 in the random order `number`, int64."""
    words = philox4x32((np.arange(size), number, purpose, 3), seed).astype(np.uint64)
    return np.argsort(words[:, 0] << np.uint64(32) | words[:, 1], kind="stable")


def problem_number(size: int | None, seed: int, position: int) -> int:
    """The problem at a position of the run's data.

    A split of `size` problems is gone through again and again, each time in an order of its own. An
    endless one is gone through from a place that the seed chooses, below 2^24.
    """
    if size is None:
        return (stream_seed(seed, PROBLEMS, 0) & 0xFFFFFF) + position
    return int(permutation(size, seed, PROBLEMS, position // size)[position % size])


def learning_rate(
    step: int, steps: int, peak: float, schedule: str, warmup: int = 0, end: float = 0.0
) -> float:
    """Of step 0, 1, ..., steps - 1.

    Warm-up step s has `peak (s + 1) / warmup`. After it, with p the fraction of what follows that
    is done before the step, `linear` has `peak (1 - (1 - end) p)` and `cosine`
    `peak (end + (1 - end) (1 + cos(pi p)) / 2)`: from `peak` towards `end peak`.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    p = (step - warmup) / max(steps - warmup, 1)
    if schedule == "linear":
        return peak * (1 - (1 - end) * p)
    if schedule == "cosine":
        return peak * (end + (1 - end) * (1 + math.cos(math.pi * p)) / 2)
    return peak
