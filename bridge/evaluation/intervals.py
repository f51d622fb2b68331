"""Error bars: BCa bootstrap intervals of means over problems, and of paired differences.

One row of numbers a metric in, one number a problem; intervals out. Problems are what is drawn
again: the rows of a group, and groups of one problem, depend on each other and stay together. All
metrics are drawn with the same problems, and the draws are a function of the seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from statistics import NormalDist

import numpy as np
from jaxtyping import Float

RESAMPLES = 10_000
AT_ONCE = 2_000_000  # numbers of a piece of the resampling matrix
NEAR = 1e-12  # of the numbers compared: how far apart those may be that are equal but for rounding


@dataclass(frozen=True)
class Interval:
    """A mean over problems, and the bounds that hold it at the confidence asked for."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference is one, as far as this interval says."""
        return self.low > 0 or self.high < 0


def bootstrap(
    values: Float[np.ndarray, "M P"],
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    of: Sequence[Float[np.ndarray, "M P"]] = (),
) -> list[Interval]:
    """The mean of each of M metrics over P problems, with its bias-corrected and accelerated (BCa)
    interval: Efron 1987, "Better bootstrap confidence intervals".

    Where all but a few problems have the same value, resampling sees next to no spread, though P
    problems cannot tell that there is none. That is so where a resample holds that value alone with
    a probability above alpha / 2 (at 95 %, up to three of many problems differ). With `bounds` on
    what a value may be, the interval is then an exact one: at this confidence no more than Clopper
    and Pearson's share of all problems differs, each by no more than the bounds allow; where every
    value is one of the bounds, it is Clopper and Pearson's own. `bounds` None: the bootstrap's, and
    of equal values the point. Values are equal up to rounding: that of their bounds, or else of the
    largest of them and of those that they are differences of (`of`). Values of any size have right
    intervals. Raises ValueError without a problem.
    """
    M, P = values.shape
    if P == 0:
        raise ValueError("no problem to take an interval over")
    if bounds is None:  # by a power of two, which rounds nothing: the cube of 1e-200 is 0
        units = np.frexp(np.abs(values).max(axis=1))[1]
        near = NEAR * np.ldexp(np.abs([values, *of]).max(axis=(0, 2)), -units)
    else:
        units = np.zeros(M, np.int64)
        near = np.full(M, NEAR * max(1.0, *np.abs(bounds)))
    values = np.ldexp(values, -units[:, None])
    means = values.mean(axis=1)
    sums = _resampled(values, resamples, seed)
    alpha = 1 - confidence
    found = []
    for m in range(M):
        common, differ = _commonest(values[m], near[m])
        if differ == 0 and bounds is None:
            low = high = common
        elif bounds is not None and (1 - differ / P) ** P > alpha / 2:
            low, high = _unseen(values[m], common, differ, alpha, bounds, near[m])
        else:
            low, high = _bca(values[m], float(means[m]), sums[m], alpha, near[m])
        mean = common if differ == 0 else float(means[m])
        found.append(Interval(*(float(np.ldexp(x, units[m])) for x in (mean, low, high))))
    return found


def paired(
    values: Float[np.ndarray, "M P"],
    baseline: Float[np.ndarray, "M P"],
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
    bounds: tuple[float, float] | None = (-1.0, 1.0),
) -> list[Interval]:
    """The mean differences of M metrics over the same P problems, with intervals as `bootstrap`.

    Differences are taken within a problem, so that how hard it is drops out.
    """
    return bootstrap(
        values - baseline,
        confidence=confidence,
        resamples=resamples,
        seed=seed,
        bounds=bounds,
        of=[values, baseline],
    )


def _resampled(
    values: Float[np.ndarray, "M P"], resamples: int, seed: int
) -> Float[np.ndarray, "M R"]:
    """The means over P problems drawn with replacement, R times."""
    P = values.shape[1]
    rng = np.random.default_rng(seed)
    pieces, left, size = [], resamples, max(1, AT_ONCE // P)
    while left:
        drawn = rng.integers(P, size=(min(size, left), P))
        rows = np.arange(len(drawn))[:, None]
        counts = np.bincount((rows * P + drawn).ravel(), minlength=len(drawn) * P)
        pieces.append(values @ counts.reshape(len(drawn), P).T / P)
        left -= len(drawn)
    return np.concatenate(pieces, axis=1)


def _bca(
    values: Float[np.ndarray, " P"],
    mean: float,
    means: Float[np.ndarray, " R"],
    alpha: float,
    near: float,
) -> tuple[float, float]:
    """Quantiles of the resampled means, moved for bias and skewness."""
    normal = NormalDist()
    below = float(np.mean(means < mean - near) + np.mean(np.abs(means - mean) <= near) / 2)
    half = 0.5 / len(means)
    bias = normal.inv_cdf(min(max(below, half), 1 - half))
    from_mean = values - mean
    skewness = float((from_mean**3).sum() / (6 * (from_mean**2).sum() ** 1.5))
    levels = []
    for level in (alpha / 2, 1 - alpha / 2):
        z = bias + normal.inv_cdf(level)
        levels.append(normal.cdf(bias + z / (1 - skewness * z)))
    low, high = np.quantile(means, levels)
    return float(low), float(high)


def _commonest(values: Float[np.ndarray, " P"], near: float) -> tuple[float, int]:
    """The value of most problems, and how many have another."""
    found, counts = np.unique(values, return_counts=True)
    common = float(found[counts.argmax()])
    return common, int(np.sum(np.abs(values - common) > near))


def _unseen(
    values: Float[np.ndarray, " P"],
    common: float,
    differ: int,
    alpha: float,
    bounds: tuple[float, float],
    near: float,
) -> tuple[float, float]:
    """Where the mean may lie though only a few of P problems, or none, have another value."""
    P, (low, high) = len(values), bounds
    most = _share(differ, P, alpha / 2)
    at_bounds = np.abs(np.subtract.outer(values, bounds)).min(axis=1) <= near
    least = _share(differ - 1, P, 1 - alpha / 2) if differ and at_bounds.all() else 0
    down, up = most * (common - low), most * (high - common)
    if least and abs(common - low) <= near:
        return low + least * (high - low), common + up
    if least:
        return common - down, high - least * (high - low)
    return common - down, common + up


def _share(count: int, P: int, chance: float) -> float:
    """The share of all problems at which `count` of P or fewer are drawn with this chance."""
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        tail = sum(comb(P, i) * middle**i * (1 - middle) ** (P - i) for i in range(count + 1))
        low, high = (middle, high) if tail > chance else (low, middle)
    return middle
