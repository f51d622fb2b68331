"""What an evaluation comes to: each metric at each width, with intervals, and against a baseline.

A value is taken within a problem, and intervals are over problems. Where rows see each other, a
value at width N is what whole groups of N came to, averaged over the groups of the problem: no
subset of a group stands for a narrower one. Where rows are independent, all rows of a problem are
one pool, and the estimators choose N of them.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from bridge.config import ModelConfig
from bridge.errors import BridgeError
from bridge.evaluation.intervals import RESAMPLES, Interval, bootstrap
from bridge.evaluation.metrics import (
    at_least,
    best_of_k,
    g_pass_at_k,
    maj_at_k,
    mean_g_pass_at_k,
    pass_at_k,
)
from bridge.evaluation.records import Group, Row
from bridge.evaluation.voting import together
from bridge.numbers.rewards import EQUAL, reaches

TAUS = ("0.25", "0.5", "0.75", "1.0")
GPASS = tuple(f"gpass@{tau}" for tau in TAUS)
# The last two are of rows: that met the length limit, and that gave no answer.
SHARES = ("pass@1", "coverage", "majority", *GPASS, "mgpass", "cut_off", "no_answer")
SCORES = ("score", "best")  # shares too, if every score is in [0, 1]
AMOUNTS = ("tokens",)  # what has no bounds that we know
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Evaluation:
    """What was found: every group that `widths`, `problems` and `groups` ask for."""

    settings: dict[str, Any]
    widths: tuple[int, ...]
    problems: tuple[int, ...]
    groups: int
    threshold: float  # a score from which on a response is correct
    independent: bool  # rows do not see each other
    asked: tuple[str, ...]  # a digest a problem, the same for every model
    found: dict[tuple[int, int, int], Group] = field(repr=False)

    @property
    def decoded(self) -> tuple[int, ...]:
        """The widths that responses were drawn at."""
        return widths_decoded(self.widths, self.independent)

    def pools(self, width: int) -> list[list[Sequence[Row]]]:
        """For each problem, the sets of rows that the estimators at this width choose from: its
        groups, or all its rows as one where they are independent."""
        drawn = self.decoded[-1] if self.independent else width
        groups = [[self.found[drawn, p, g].rows for g in range(self.groups)] for p in self.problems]
        if self.independent:
            return [[[row for rows in problem for row in rows]] for problem in groups]
        return [list(problem) for problem in groups]

    @property
    def scores_are_shares(self) -> bool:
        """Whether every score is in [0, 1] up to rounding, as far as was seen."""
        pools = (pool for width in self.decoded for p in self.pools(width) for pool in p)
        scores = (row.score for pool in pools for row in pool)
        return all(-EQUAL <= score <= 1 + EQUAL for score in scores)

    def troubles(self) -> list[str]:
        """Why responses could not be scored, one a response."""
        pools = (pool for width in self.decoded for p in self.pools(width) for pool in p)
        return [row.trouble for pool in pools for row in pool if row.trouble]


@dataclass(frozen=True)
class Figures:
    """The metrics at a width, or their differences from a baseline."""

    width: int
    metrics: dict[str, Interval]
    curve: list[Interval]  # G-Pass at tau = 1 / width, 2 / width, ..., 1: at least j correct

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "width": self.width,
            "metrics": {name: asdict(interval) for name, interval in self.metrics.items()},
            "curve": [asdict(interval) for interval in self.curve],
        }


@dataclass(frozen=True)
class Report:
    """All that one command says: a function of what was found alone, and of no clock."""

    evaluation: Evaluation
    figures: list[Figures]
    baseline: Evaluation | None = None
    baseline_figures: list[Figures] = field(default_factory=list)
    differences: list[Figures] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and texts."""
        e, b = self.evaluation, self.baseline
        return {
            "format": 1,
            "task": e.settings["task"],
            "split": e.settings["split"],
            "problems": len(e.problems),
            "groups": e.groups,
            "threshold": e.threshold,
            "intervals": f"BCa bootstrap over problems, {RESAMPLES} resamples, {CONFIDENCE:.0%}",
            "model": _of_one(e, self.figures),
            "baseline": None if b is None else _of_one(b, self.baseline_figures),
            "differences": [f.to_json() for f in self.differences],
        }


def _of_one(evaluation: Evaluation, figures: list[Figures]) -> dict[str, Any]:
    return {
        "settings": evaluation.settings,
        "independent_rows": evaluation.independent,
        "widths_decoded": list(evaluation.decoded),
        "not_scored": len(evaluation.troubles()),
        "widths": [f.to_json() for f in figures],
    }


def rows_are_independent(config: ModelConfig) -> bool:
    """Whether rows of a group cannot see each other: no blocks, or P-Match's (clause 8.1)."""
    return config.bridge is None or config.bridge.kind == "mlp"


def widths_decoded(widths: tuple[int, ...], independent: bool) -> tuple[int, ...]:
    """The widths that responses are drawn at: of independent rows the largest holds all others."""
    return widths[-1:] if independent else widths


def values(evaluation: Evaluation, width: int) -> dict[str, Float[np.ndarray, "*curve P"]]:
    """Each metric at a width, and `curve` as `[width, P]`: one number a problem."""
    pools = evaluation.pools(width)
    flat = [pool for problem in pools for pool in problem]
    n, k = len(flat[0]), width
    scores = np.array([[row.score for row in pool] for pool in flat])
    right = reaches(scores, evaluation.threshold)
    counts = right.sum(axis=1)
    answers = [together([row.answer for row in pool]) for pool in flat]
    found = {
        "pass@1": pass_at_k(counts, n, 1),
        "coverage": pass_at_k(counts, n, k),
        "majority": np.array(
            [maj_at_k(a, c.tolist(), k) for a, c in zip(answers, right, strict=True)]
        ),
        **{f"gpass@{tau}": g_pass_at_k(counts, n, k, tau) for tau in TAUS},
        "mgpass": mean_g_pass_at_k(counts, n, k),
        "cut_off": np.array([np.mean([r.finish_reason == "length" for r in p]) for p in flat]),
        "no_answer": np.array([np.mean([a is None for a in pool]) for pool in answers]),
        "score": scores.mean(axis=1),
        "best": best_of_k(scores, k),
        "tokens": np.array([np.mean([row.tokens for row in pool]) for pool in flat]),
        "curve": np.stack([at_least(counts, n, k, j) for j in range(1, k + 1)]),
    }
    shape = (len(pools), len(flat) // len(pools))
    return {
        name: value.reshape(*value.shape[:-1], *shape).mean(axis=-1)
        for name, value in found.items()
    }


def summarise(
    evaluation: Evaluation, *, resamples: int = RESAMPLES, seed: int = 0
) -> list[Figures]:
    """Every metric at every width, with 95 % intervals over problems."""
    shares = evaluation.scores_are_shares
    return [
        _figures(width, values(evaluation, width), (0.0, 1.0), shares, resamples, seed)
        for width in evaluation.widths
    ]


def compare(
    evaluation: Evaluation,
    baseline: Evaluation,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Figures]:
    """The differences from a baseline at the widths that both have, paired by problem, with 95 %
    intervals. Raises BridgeError where they were not asked the same problems."""
    asked = [(e.settings["task"], e.settings["split"], e.asked) for e in (evaluation, baseline)]
    if asked[0] != asked[1]:
        raise BridgeError("baseline: was asked other problems; evaluate both on the same ones")
    shares = evaluation.scores_are_shares and baseline.scores_are_shares
    found = []
    for width in sorted(set(evaluation.widths) & set(baseline.widths)):
        one, other = values(evaluation, width), values(baseline, width)
        apart = {name: one[name] - other[name] for name in one}
        found.append(_figures(width, apart, (-1.0, 1.0), shares, resamples, seed, (one, other)))
    return found


def report(evaluation: Evaluation, baseline: Evaluation | None = None) -> Report:
    """All figures of an evaluation, and its differences from a baseline."""
    if baseline is None:
        return Report(evaluation, summarise(evaluation))
    differences = compare(evaluation, baseline)
    return Report(evaluation, summarise(evaluation), baseline, summarise(baseline), differences)


def _figures(
    width: int,
    found: dict[str, Float[np.ndarray, "*curve P"]],
    bounds: tuple[float, float],
    scores_are_shares: bool,
    resamples: int,
    seed: int,
    of: Sequence[dict[str, Float[np.ndarray, "*curve P"]]] = (),
) -> Figures:
    """Intervals of all metrics, from the same draws of problems. `of`: what they are differences
    of, if they are."""
    shares = SHARES + SCORES * scores_are_shares
    amounts = SCORES * (not scores_are_shares) + AMOUNTS
    options: dict[str, Any] = {"confidence": CONFIDENCE, "resamples": resamples, "seed": seed}
    bounded = np.stack([*(found[name] for name in shares), *found["curve"]])
    inside = bootstrap(bounded, bounds=bounds, **options)
    rows = [np.stack([values[name] for name in amounts]) for values in (found, *of)]
    outside = bootstrap(rows[0], bounds=None, of=rows[1:], **options)
    metrics = dict(zip((*shares, *amounts), inside[: len(shares)] + outside, strict=True))
    return Figures(width, metrics, inside[len(shares) :])
