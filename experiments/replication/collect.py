"""What runs have come to: read from their directories, and put together over seeds.

A run's directory is ROOT/TASK/seed-N; `ARM.json` there has the figures of an arm that is done, and
`ARM-grpo/log.jsonl` the story of its training. Intervals are 95 % over seeds, by Student's t; of
one seed there is only the interval over its problems.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from plans import ABLATIONS, ARMS
from scipy import stats

from bridge.errors import BridgeError
from bridge.training.log import read_log

METRICS = {
    "pass@1": "Accuracy (pass@1)",
    "coverage": "Coverage: any row is correct (pass@k at k = width)",
    "majority": "Majority of the rows (maj@k at k = width)",
    "gpass@1.0": "All rows correct (G-Pass at τ = 1)",
}
CURVES = ("reward_mean", "entropy")
EVERY = 10  # steps of training that a point of a curve is the mean of


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, or the value of the only one; bounds are None where nothing gives them."""

    mean: float
    low: float | None
    high: float | None
    seeds: int

    @classmethod
    def over(cls, values: Sequence[float], of_one: tuple[float, float] | None = None) -> "Estimate":
        """Of one value a seed. `of_one`: the bounds of the value of a single seed."""
        n, mean = len(values), float(np.mean(values))
        if n == 1:
            return cls(mean, *(of_one or (None, None)), 1)
        half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
        return cls(mean, mean - half, mean + half, n)


@dataclass(frozen=True)
class Arm:
    """An arm of a task: what `ARM.json` says of each seed, and the curves of its training."""

    name: str
    figures: dict[int, dict[str, Any]]  # by seed
    curves: dict[int, dict[str, list[float]]]

    @property
    def widths(self) -> list[int]:
        """That every seed was tested at."""
        return [w["width"] for w in next(iter(self.figures.values()))["model"]["widths"]]

    def values(self, metric: str, width: int, seeds: Sequence[int]) -> list[float]:
        """A metric at a width, a seed each."""
        return [self._at(seed, width)["metrics"][metric]["mean"] for seed in seeds]

    def estimate(self, metric: str, width: int, seeds: Sequence[int]) -> Estimate:
        """Over these seeds."""
        first = self._at(seeds[0], width)["metrics"][metric]
        return Estimate.over(self.values(metric, width, seeds), (first["low"], first["high"]))

    def at_least(self, width: int, seeds: Sequence[int]) -> list[Estimate]:
        """The share of problems that at least 1, 2, ..., `width` rows get right."""
        curves = [self._at(seed, width)["curve"] for seed in seeds]
        return [
            Estimate.over([p["mean"] for p in points], (points[0]["low"], points[0]["high"]))
            for points in zip(*curves, strict=True)
        ]

    def _at(self, seed: int, width: int) -> dict[str, Any]:
        return next(w for w in self.figures[seed]["model"]["widths"] if w["width"] == width)


@dataclass(frozen=True)
class Results:
    """All that is known of a task."""

    task: str
    plan: dict[str, Any]  # of all seeds
    arms: dict[str, Arm]  # in the order of plans.py

    def seeds(self, *names: str) -> list[int]:
        """Those that all of these arms are done for."""
        common = set.intersection(*(set(self.arms[name].figures) for name in names))
        return sorted(common)

    @property
    def compared(self) -> list[str]:
        """The arms of the experiment itself that are there."""
        return [name for name in ARMS if name in self.arms]

    @property
    def ablations(self) -> list[str]:
        """The others."""
        return [name for name in ABLATIONS if name in self.arms]

    def difference(self, other: str, metric: str, width: int) -> Estimate:
        """Bridge minus another arm, seed by seed."""
        seeds = self.seeds("bridge", other)
        pairs = zip(
            self.arms["bridge"].values(metric, width, seeds),
            self.arms[other].values(metric, width, seeds),
            strict=True,
        )
        return Estimate.over([ours - theirs for ours, theirs in pairs])

    def to_json(self) -> dict[str, Any]:
        """Every figure that tables and plots are made of, and those of each seed."""
        arms: dict[str, Any] = {}
        for name, arm in self.arms.items():
            seeds = self.seeds(name)
            arms[name] = {"seeds": seeds, "widths": {}}
            for width in arm.widths:
                curve = [asdict(estimate) for estimate in arm.at_least(width, seeds)]
                arms[name]["widths"][str(width)] = {
                    metric: {
                        "each": arm.values(metric, width, seeds),
                        **asdict(arm.estimate(metric, width, seeds)),
                    }
                    for metric in METRICS
                } | {"at_least": curve}
        others = [name for name in self.arms if name != "bridge" and "bridge" in self.arms]
        apart = {
            f"bridge - {name}": {
                str(width): {m: asdict(self.difference(name, m, width)) for m in METRICS}
                for width in self.arms[name].widths
            }
            for name in others
            if self.seeds("bridge", name)
        }
        return _rounded({"task": self.task, "plan": self.plan, "arms": arms, "differences": apart})

    def curves(self) -> dict[str, Any]:
        """Training by arm and seed, a point for every EVERY steps."""
        found = {
            name: {str(seed): curves for seed, curves in sorted(arm.curves.items())}
            for name, arm in self.arms.items()
        }
        return _rounded({"task": self.task, "every": EVERY, "arms": found})


def collect(root: Path) -> list[Results]:
    """The tasks that have an arm that is done, in order. Raises BridgeError where there is none,
    and where seeds of a task were run by different plans."""
    found = []
    for place in sorted(path for path in root.glob("*") if path.is_dir()):
        plan: dict[str, Any] = {}
        arms = {name: Arm(name, {}, {}) for name in [*ARMS, *ABLATIONS]}
        for here in sorted(place.glob("seed-*")):
            seed = int(here.name.removeprefix("seed-"))
            for name, arm in arms.items():
                if (here / f"{name}.json").exists():
                    arm.figures[seed] = json.loads((here / f"{name}.json").read_text())
                    arm.curves[seed] = _curves(here / f"{name}-grpo" / "log.jsonl")
                    own = json.loads((here / "plan.json").read_text())
                    own.pop("seed")
                    if differing := [k for k in own.keys() & plan.keys() if own[k] != plan[k]]:
                        raise BridgeError(
                            f"{here / 'plan.json'}: {differing[0]} is {own[differing[0]]!r}, and "
                            f"{plan[differing[0]]!r} in seeds before; report them apart"
                        )
                    plan |= own
        if done := {name: arm for name, arm in arms.items() if arm.figures}:
            found.append(Results(place.name, plan, done))
    if not found:
        raise BridgeError(f"{root}: no arm is done; run.py leaves TASK/seed-N/ARM.json there")
    return found


def _curves(path: Path) -> dict[str, list[float]]:
    steps = [record for record in read_log(path) if record["kind"] == "step"]
    parts = [steps[at : at + EVERY] for at in range(0, len(steps), EVERY)]
    return {name: [float(np.mean([r[name] for r in p])) for p in parts] for name in CURVES}


def _rounded(value: Any) -> Any:
    """Floats to six digits: files that are committed need no more."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 6) if isinstance(value, float) else value
