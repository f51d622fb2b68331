"""What can be said of rewards as float64 numbers: which are equal, and which reach a threshold.

A reward is often a sum of parts, and the same parts in another order make 0.3 or 0.1 + 0.2. So
rewards are compared up to such rounding (clause 7.6), wherever they are. Rewards are finite and of
any size: nothing here overflows or vanishes on the way. It knows neither tasks nor groups.
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float

EQUAL = 2.0**-46  # of the larger of two rewards: 64 times the distance from 1 to the next float64


def equal(rewards: Float[np.ndarray, " N"]) -> bool:
    """Whether all are equal up to rounding: `max r - min r <= EQUAL max |r|`, as clause 7.6 has it.

    True of one reward, and of none.
    """
    r, _ = scaled(rewards)
    return not r.size or bool(r.max() - r.min() <= EQUAL * np.abs(r).max())


def reaches(rewards: Any, threshold: float) -> Bool[np.ndarray, "..."]:
    """Which are `threshold` or above, or equal to it up to rounding: 0.7 + 0.2 + 0.1 is 1."""
    rewards = np.asarray(rewards, np.float64)
    return rewards >= threshold - EQUAL * abs(threshold)


def scaled(rewards: Float[np.ndarray, "..."]) -> tuple[Float[np.ndarray, "..."], int]:
    """The rewards times the power of two that takes the largest magnitude to [1/2, 1), which rounds
    none that counts beside it; and the exponent that takes them back, for `np.ldexp`."""
    rewards = np.asarray(rewards, np.float64)
    exponent = int(np.frexp(np.abs(rewards).max(initial=0))[1])
    return np.ldexp(rewards, -exponent), exponent


def mean(rewards: Float[np.ndarray, "..."]) -> float:
    """The mean; of finite rewards it is finite."""
    r, exponent = scaled(rewards)
    return float(np.ldexp(r.mean(), exponent))


def std(rewards: Float[np.ndarray, "..."]) -> float:
    """The standard deviation of the population; 0 where all are equal."""
    if equal(np.ravel(rewards)):
        return 0.0
    r, exponent = scaled(rewards)
    return float(np.ldexp(r.std(), exponent))
