"""What a run finds: plain dataclasses, and the same as JSON.

A level is passed where each of its checks passes whole in the dtype that counts, none fails in any
other, and the levels before it are passed (clause 10.3). What a backend does not offer is skipped
and never counts as passed.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from bridge_conformance.checks import LEVELS

SCHEMA = 1  # of the JSON; changes whenever a key changes its meaning or goes
Status = Literal["pass", "fail", "skip"]
# Errors in multiples of the allowance are counted in bins of these upper edges; the last is open.
EDGES = (2.0**-10, *(2.0**-i for i in range(8, 1, -1)), 2.0**-1, 1.0, math.inf)


@dataclass(frozen=True)
class Outcome:
    """A check in a dtype, over all the cases that it ran on."""

    dtype: str
    level: int
    clause: str
    check: str
    status: Status
    cases: int  # compared; those left out as ill-conditioned are not among them
    worst: float  # the largest error, in multiples of the allowance
    seconds: float
    reason: str | None = None  # of a skip


@dataclass(frozen=True)
class Failure:
    """A check that a backend fails in a dtype, on the plainest case that was found."""

    dtype: str
    level: int
    clause: str
    title: str  # of the clause
    check: str
    property: str
    message: str
    case: str  # JSON
    shrunk: bool  # or the one that was asked for
    command: str  # which fails again
    worst: dict[str, Any] | None = None  # the fields of `trial.Worst`, where numbers were compared


@dataclass(frozen=True)
class Verdict:
    """The highest level that is passed, 0 for none, and the dtype that counts."""

    level: int
    asked: int
    dtype: str

    @property
    def passed(self) -> bool:
        """Whether every level asked for is passed."""
        return self.level >= self.asked > 0

    def __str__(self) -> str:
        return f"L{self.level}" if self.level else "none"


@dataclass
class Report:
    """Everything that a run found, and on what."""

    backend: str
    device: str
    dtypes: list[str]  # asked for, whether offered or not
    levels: list[int]
    profile: str
    seed: int
    versions: dict[str, str]
    started: str  # ISO 8601, UTC
    seconds: float = 0.0
    complete: bool = False  # False: stopped before its end
    checks_alone: list[str] = field(default_factory=list)  # the run was of these alone: no verdict
    outcomes: list[Outcome] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    errors: dict[str, list[int]] = field(default_factory=dict)  # comparisons by dtype and bin

    @property
    def verdict(self) -> Verdict:
        """See the module."""
        ran = [o.dtype for o in self.outcomes if o.status != "skip"]
        counting = [d for d in ("float32", "float64", "bfloat16", "float16") if d in ran]
        dtype = counting[0] if counting else (self.dtypes or ["float32"])[0]
        passed = 0
        for level in self.levels:
            if self.checks_alone or not self.complete or not self._passed(level, dtype):
                break
            passed = level
        return Verdict(passed, max(self.levels, default=0), dtype)

    def _passed(self, level: int, dtype: str) -> bool:
        outcomes = self.at(level)
        failed = any(o.status == "fail" for o in outcomes)
        return not failed and _whole([o for o in outcomes if o.dtype == dtype])

    @property
    def ok(self) -> bool:
        """Whether all that was asked for passes: exit code 0. A dtype that the backend does not
        offer is skipped, but no check may be skipped in every dtype."""
        if self.checks_alone:
            ran = [o for o in self.outcomes if o.status != "skip"]
            whole = {o.check for o in ran} == set(self.checks_alone) and _whole(ran)
            return self.complete and whole
        return self.verdict.passed

    def at(self, level: int, dtype: str | None = None) -> list[Outcome]:
        """The outcomes of a level, in one dtype or in all."""
        return [o for o in self.outcomes if o.level == level and dtype in (None, o.dtype)]

    def worst_by_clause(self) -> dict[str, float]:
        """The largest error that was found for each clause, in multiples of the allowance."""
        worst: dict[str, float] = {}
        for outcome in self.outcomes:
            worst[outcome.clause] = max(worst.get(outcome.clause, 0.0), outcome.worst)
        return dict(sorted(worst.items(), key=lambda item: _number(item[0])))

    def to_json(self) -> dict[str, Any]:
        """One JSON object; numbers that JSON lacks are the texts `inf` and `nan`."""
        verdict = {"level": str(self.verdict), "asked": f"L{self.verdict.asked}"}
        verdict |= {"dtype": self.verdict.dtype, "passed": self.ok}
        whole = {
            "schema": SCHEMA,
            "verdict": verdict,
            **asdict(self),
            "levels": {f"L{level}": LEVELS[level] for level in self.levels},
            "worst_by_clause": self.worst_by_clause(),
            "edges": list(EDGES),
        }
        return plain(whole)


def _whole(outcomes: list[Outcome]) -> bool:
    """Whether there are checks, and every one passes on a case at least."""
    return bool(outcomes) and all(o.status == "pass" and o.cases for o in outcomes)


def plain(value: Any) -> Any:
    """JSON values alone."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def bin_of(multiple: float) -> int:
    """The bin of `EDGES` that an error in multiples of its allowance falls into."""
    return next((i for i, edge in enumerate(EDGES) if multiple <= edge), len(EDGES) - 1)


def _number(clause: str) -> tuple[int, ...]:
    return tuple(int(part) for part in clause.split("."))
