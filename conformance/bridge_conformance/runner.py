"""A run: every check of the levels asked for, on a backend's device, in each dtype.

Cases are drawn first, then examined one at a time, by worker processes where the backend is known
by name; what fails is shrunk last. Nothing that a backend does, short of hanging, ends a run early:
a worker that dies is a failure of the checks that it was running.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from bridge.contract import Backend
from bridge.errors import BridgeError
from bridge.registry import ALIASES, find_backend, resolve_device
from bridge_conformance import spec_files
from bridge_conformance.cases_given import check_fits
from bridge_conformance.cases_json import from_text, readable, to_text
from bridge_conformance.checks import CHECKS, LEVELS, Check
from bridge_conformance.checks_golden import GoldenCase
from bridge_conformance.commands import reproduce
from bridge_conformance.examine import Finding, draw
from bridge_conformance.results import EDGES, Failure, Outcome, Report
from bridge_conformance.tolerance import DTYPES
from bridge_conformance.versions import versions
from bridge_conformance.workers import Job, Worker, carry_out


@dataclass(frozen=True)
class Profile:
    """How much a run does in each dtype."""

    cases: dict[int | str, int]  # drawn, by the keys of CASES, after the worst ones of each
    shrunk: int  # failures that are shrunk, in order of their levels
    budget: int  # cases that shrinking one of them may try
    wide: tuple[str, ...] = ()  # kinds of cases that run in the widest dtypes alone


WIDEST = ("float32", "float64")  # not the same code in every backend
PROFILES = {
    "quick": Profile(
        {
            **{1: 4, 2: 2, 3: 2, 4: 2, 5: 1, 6: 2},
            **{"long": 0, "coming": 0, "ends": 0, "life": 0, "trainable": 0},
            **{"shared": 0, "lora": 0},
        },
        shrunk=6,
        budget=60,
        wide=("long", "coming", "ends", "life"),
    ),
    "ci": Profile(
        {
            **{1: 24, 2: 24, 3: 16, 4: 8, 5: 5, 6: 8},
            **{"long": 0, "coming": 4, "ends": 1, "life": 1, "trainable": 2},
            **{"shared": 3, "lora": 1},
        },
        shrunk=12,
        budget=120,
    ),
    "thorough": Profile(
        {
            **{1: 300, 2: 200, 3: 150, 4: 150, 5: 100, 6: 60},
            **{"long": 40, "coming": 80, "ends": 20, "life": 100, "trainable": 60},
            **{"shared": 60, "lora": 40},
        },
        shrunk=99,
        budget=500,
    ),
}


@dataclass(frozen=True)
class Progress:
    """How far a run is: after each case."""

    done: int
    total: int
    failed: int  # checks, in any dtype
    doing: str


def run(
    backend: Backend | str,
    *,
    device: str | None = None,
    dtypes: Sequence[str] | None = None,
    profile: str = "quick",
    seed: int = 0,
    level: int = max(LEVELS),
    checks: Sequence[str] | None = None,
    case: str | None = None,
    workers: int | None = None,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Report:
    """Hold a backend to the spec up to `level`.

    `backend`: a registered name, or an object, which is then run in this process. `device` None is
    its best; `dtypes` None is all that the spec knows. `checks`: these alone, with no verdict on
    levels; `case`: on this case alone, of the kind that they take, as `cases_json.to_text` gave it.
    `workers` None: two, for a backend on a CPU. Ctrl-C ends a run with what was found so far,
    `complete` being false. Raises BridgeError, before anything runs, for what is not known and for
    a case that could not have been drawn.
    """
    amounts = find_profile(profile)
    if level not in LEVELS:
        raise BridgeError(f"level {level} is not known; use 1 to {max(LEVELS)}")
    object_ = find_backend(backend) if isinstance(backend, str) else backend
    device = resolve_device(object_, device)
    chosen = choose(checks, level)
    asked = list(dict.fromkeys(ALIASES.get(dtype, dtype) for dtype in dtypes or DTYPES))
    if unknown := [dtype for dtype in asked if dtype not in DTYPES]:
        raise BridgeError(f"dtype {unknown[0]!r} is not known (known: {', '.join(DTYPES)})")
    if case is not None:
        given = from_text(case)
        for check in chosen:
            check_fits(check, given)
        case = readable(given)
    report = Report(
        object_.name,
        device,
        asked,
        sorted({check.level for check in chosen}),
        profile,
        seed,
        versions(object_),
        datetime.now(UTC).isoformat(timespec="seconds"),
        checks_alone=[check.name for check in chosen] if checks else [],
        errors={dtype: [0] * len(EDGES) for dtype in asked},
    )
    offered = object_.dtypes(device)
    start = time.perf_counter()
    if workers is None:
        workers = 2 if isinstance(backend, str) and device == "cpu" else 1
    worker = Worker(backend if workers > 1 else object_, device)
    session = Session(report, amounts, chosen, workers, worker, progress)
    try:
        session.examine([dtype for dtype in asked if dtype in offered], case)
        if case is None:
            session.shrink()
        report.complete = True
    except KeyboardInterrupt:
        pass
    session.conclude(offered)
    report.seconds = time.perf_counter() - start
    return report


def find_profile(name: str) -> Profile:
    """The profile of that name. Raises BridgeError for one that is not known."""
    if name not in PROFILES:
        raise BridgeError(f"profile {name!r} is not known (known: {', '.join(PROFILES)})")
    return PROFILES[name]


def choose(names: Sequence[str] | None, level: int) -> list[Check]:
    """The checks of these names, each once, or else all up to `level`. Raises BridgeError for a
    name that is not known or lies above it."""
    if not names:
        return [check for check in CHECKS.values() if check.level <= level]
    for name in names:
        if name not in CHECKS:
            raise BridgeError(f"check {name!r} is not known; bridge conformance --list names all")
        if CHECKS[name].level > level:
            raise BridgeError(f"check {name!r} is of L{CHECKS[name].level}, above L{level}")
    return [CHECKS[name] for name in dict.fromkeys(names)]


class Session:
    """The findings of a run as they come in."""

    def __init__(
        self,
        report: Report,
        profile: Profile,
        checks: list[Check],
        workers: int,
        worker: Worker,
        progress: Callable[[Progress], None],
    ) -> None:
        self.report, self.profile, self.checks = report, profile, checks
        self.workers, self.worker, self.progress = workers, worker, progress
        # By dtype and check: each case in the order drawn, with what was found on it.
        self.found: dict[tuple[str, str], dict[int, tuple[str, Finding]]] = {}
        self.plainest: dict[tuple[str, str], tuple[str, Finding]] = {}
        self.done, self.total, self.given = 0, 0, False

    def examine(self, dtypes: Sequence[str], case: str | None) -> None:
        """Run all checks on all their cases, or on the case given."""
        self.given = case is not None
        jobs = list(self._jobs(dtypes, case))
        self.total = len(jobs)
        for job, findings in self._carry_out(jobs, "examining"):
            for finding in findings:
                key = job.dtype, finding.check
                self.found.setdefault(key, {})[job.number] = job.case, finding
                counts = self.report.errors[job.dtype]
                for i, n in enumerate(finding.errors):
                    counts[i] += n

    def _jobs(self, dtypes: Sequence[str], case: str | None) -> Iterator[Job]:
        """One a case; the dearest levels first, so that workers end together."""
        kinds = {check.cases: check.level for check in self.checks}
        for kind in sorted(kinds, key=lambda kind: (kinds[kind] not in (5, 3), kinds[kind])):
            here = [check for check in self.checks if check.cases == kind]
            drawn = tuple(check.name for check in here if not check.golden)
            few = [dtype for dtype in dtypes if dtype in WIDEST] or dtypes[:1]
            for dtype in few if kind in self.profile.wide else dtypes:
                if case is not None:
                    yield Job(dtype, tuple(check.name for check in here), case, 0)
                    continue
                count = self.profile.cases[kind] if drawn else 0
                cases = draw(kind, dtype, self.report.seed, count) if drawn else []
                for number, drawn_case in enumerate(cases):
                    yield Job(dtype, drawn, readable(drawn_case), number)
                for check in here:
                    if check.golden:
                        yield Job(dtype, (check.name,), readable(GoldenCase(check.golden)), 0)

    def _carry_out(
        self, jobs: Sequence[Job], doing: str
    ) -> Iterator[tuple[Job, Sequence[Finding]]]:
        if jobs:
            self.progress(Progress(self.done, self.total, len(self._failing()), doing))
        for job, findings in carry_out(self.worker, jobs, self.workers):
            yield job, findings
            self.done += 1
            self.progress(Progress(self.done, self.total, len(self._failing()), doing))

    def _failing(self) -> list[tuple[str, str]]:
        """Dtypes and checks that fail, in order of levels; float32 before other dtypes."""
        keys = [k for k, found in self.found.items() if _status(found) == "fail"]
        names = list(CHECKS)
        return sorted(keys, key=lambda k: (CHECKS[k[1]].level, names.index(k[1]), k[0][::-1]))

    def shrink(self) -> None:
        """Shrink the first failures, each check in one dtype."""
        jobs: dict[str, Job] = {}
        for dtype, name in self._failing():
            known = [self.found[dtype, name][i] for i in sorted(self.found[dtype, name])]
            if name in jobs or CHECKS[name].golden or len(jobs) == self.profile.shrunk:
                continue
            budget = self.profile.budget
            jobs[name] = Job(dtype, (name,), "", 0, self.report.seed, budget, tuple(known))
        self.total += len(jobs)
        for job, findings in self._carry_out(list(jobs.values()), "shrinking"):
            for finding in findings:
                self.plainest[job.dtype, finding.check] = finding.case, finding

    def conclude(self, offered: Sequence[str]) -> None:
        """Fill the report."""
        for check in self.checks:
            for dtype in self.report.dtypes:
                found = self.found.get((dtype, check.name), {})
                if found or dtype not in offered:
                    self.report.outcomes.append(_outcome(check, dtype, found, offered))
        for dtype, name in self._failing():
            self.report.failures.append(self._failure(dtype, CHECKS[name]))

    def _failure(self, dtype: str, check: Check) -> Failure:
        found = self.found[dtype, check.name]
        first = next(found[i] for i in sorted(found) if found[i][1].status == "fail")
        text, finding = self.plainest.get((dtype, check.name), first)
        return Failure(
            dtype,
            check.level,
            check.clause,
            spec_files.titles().get(check.clause, ""),
            check.name,
            check.property,
            finding.message,
            text,
            (dtype, check.name) in self.plainest or bool(check.golden) or self.given,
            reproduce(self.report, dtype, check, to_text(from_text(text))),
            finding.element,
        )


def _status(found: dict[int, tuple[str, Finding]]) -> Any:
    statuses = {finding.status for _, finding in found.values()}
    return "fail" if "fail" in statuses else "skip" if "skip" in statuses else "pass"


def _outcome(
    check: Check, dtype: str, found: dict[int, tuple[str, Finding]], offered: Sequence[str]
) -> Outcome:
    findings = [finding for _, finding in found.values()]
    status, reason = _status(found), None
    if dtype not in offered:
        status, reason = "skip", f"not offered: dtypes() does not name {dtype}"
    elif status == "skip":
        reason = next(f.message for f in findings if f.status == "skip")
    return Outcome(
        dtype,
        check.level,
        check.clause,
        check.name,
        status,
        sum(f.status in ("pass", "fail") for f in findings),
        max((f.worst for f in findings), default=0.0),
        round(sum(f.seconds for f in findings), 3),
        reason,
    )
