"""Error bars: BCa bootstrap intervals of means over problems, and of paired differences.

One row of numbers a metric in, one number a problem; intervals out. Problems are what is drawn
again: the rows of a group, and groups of one problem, depend on each other and stay together. All
metrics are drawn with the same problems, and the draws are a function of the seed.
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Float

RESAMPLES = 10_000
AT_ONCE = 2_000_000  # numbers of a piece of the resampling matrix


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
) -> list[Interval]:
    """The mean of each of M metrics over P problems, with its bias-corrected and accelerated (BCa)
    interval: Efron 1987, "Better bootstrap confidence intervals".

    Where every problem has the same value, resampling sees no spread, though P problems cannot tell
    that there is none. With `bounds` on what a value may be, the interval is then the exact one: at
    this confidence fewer than the fraction 1 - (alpha / 2)^(1 / P) of all problems differ, each by
    no more than the bounds allow (for shares of 0 and 1, that of Clopper and Pearson). `bounds`
    None: the interval is the point. Raises ValueError without a problem.
    """
    M, P = values.shape
    if P == 0:
        raise ValueError("no problem to take an interval over")
    means = values.mean(axis=1)
    sums = _resampled(values, resamples, seed)
    constant = (values == values[:, :1]).all(axis=1)
    alpha = 1 - confidence
    found = []
    for m in range(M):
        if constant[m]:
            low, high = _unseen(float(values[m, 0]), P, alpha, bounds)
            found.append(Interval(float(values[m, 0]), low, high))
        else:
            low, high = _bca(values[m], float(means[m]), sums[m], alpha)
            found.append(Interval(float(means[m]), low, high))
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
        values - baseline, confidence=confidence, resamples=resamples, seed=seed, bounds=bounds
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
    values: Float[np.ndarray, " P"], mean: float, means: Float[np.ndarray, " R"], alpha: float
) -> tuple[float, float]:
    """Quantiles of the resampled means, moved for bias and skewness."""
    normal = NormalDist()
    # Means that are equal but for rounding must count as equal.
    near = 1e-12 * max(1.0, float(np.abs(values).max()))
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


def _unseen(
    value: float, P: int, alpha: float, bounds: tuple[float, float] | None
) -> tuple[float, float]:
    """Where the mean may lie though each of P problems had the same value."""
    if bounds is None:
        return value, value
    differ = 1 - (alpha / 2) ** (1 / P)
    low, high = bounds
    return value - differ * (value - low), value + differ * (high - value)
