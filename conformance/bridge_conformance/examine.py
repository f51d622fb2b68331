"""Drawing cases, running checks on them, and shrinking what fails.

`draw` is a function of its seed: the same seed gives the same cases. `examine` runs checks on one
case and lets nothing that a backend raises escape. `shrink` lets Hypothesis look for the plainest
case that one check fails on.
"""

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, Verbosity
from hypothesis.errors import HypothesisException

from bridge_conformance.cases_json import readable
from bridge_conformance.checks import CASES, CHECKS, WORST, Check
from bridge_conformance.draws import by_seed_alone
from bridge_conformance.memory import Memory
from bridge_conformance.results import EDGES, Status, bin_of, plain
from bridge_conformance.trial import Nonconformance, Target, Unsuited


@dataclass(frozen=True)
class Finding:
    """One check on one case; `status` is None where the case was left out as ill-conditioned."""

    check: str
    status: Status | None
    seconds: float = 0.0
    worst: float = 0.0
    message: str = ""
    element: dict[str, Any] | None = None
    errors: tuple[int, ...] = ()  # comparisons, by bin of `results.EDGES`
    case: str = ""  # where shrinking found another


SPARE = 40  # numbers of cases beyond those asked for, where a check that nothing showed looks


def seed_of(seed: int, kind: int | str, dtype: str, number: int) -> int:
    """The seed of the case of that number of `CASES[kind]` in a dtype."""
    return zlib.crc32(f"{seed} {kind} {dtype} {number}".encode())


def draw(kind: int | str, dtype: str, seed: int, count: int) -> list[Any]:
    """The worst cases of a kind, up to `count` different ones that `CASES[kind]` draws, and more
    where a check would have none."""
    known = WORST.get(kind, ())
    cases = {readable(case): case for case in (_one(kind, dtype, seed, n) for n in range(count))}
    drawn = [*known, *cases.values()]
    for check in CHECKS.values():  # each needs one that it applies to and that is not left out
        if check.cases == kind and not check.golden and not any(_shows(check, c) for c in drawn):
            spare = (_one(kind, dtype, seed, n) for n in range(count, count + SPARE))
            drawn += [case for case in spare if _shows(check, case)][:1]
    return drawn


def _one(kind: int | str, dtype: str, seed: int, number: int) -> Any:
    """The case of one number, drawn by itself: of many that Hypothesis draws in a row, most are
    variations of a few, and few cases show much only if they are independent."""
    cases: list[Any] = []
    run(cases.append, kind, dtype, seed, number, phases=(Phase.generate,))
    return cases[-1]


def _shows(check: Check, case: Any) -> bool:
    rows = getattr(case, "rows", case)
    return check.applies(case) and rows.model.magnitudes == "plain"


def run(
    function: Callable[[Any], None],
    kind: int | str,
    dtype: str,
    seed: int,
    number: int,
    phases: Sequence[Phase],
) -> None:
    """Hypothesis on the plainest case of a kind and on the one of a number; a failure is raised,
    once it is shrunk where `phases` say so."""
    seeded = hypothesis.seed(seed_of(seed, kind, dtype, number))
    settings = hypothesis.settings(
        max_examples=2,
        phases=phases,
        database=None,
        deadline=None,
        derandomize=False,
        print_blob=False,
        report_multiple_bugs=False,
        verbosity=Verbosity.quiet,
        suppress_health_check=[
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
            HealthCheck.filter_too_much,
            HealthCheck.large_base_example,
        ],
    )
    test = seeded(settings(hypothesis.given(CASES[kind])(lambda case: function(case))))
    with by_seed_alone():
        test()


def examine(target: Target, checks: Sequence[Check], case: Any) -> list[Finding]:
    """What each check that applies finds on a case; they share models and the reference's work."""
    target = replace(target, memory=Memory())
    return [examine_one(target, check, case) for check in checks if check.applies(case)]


def examine_one(target: Target, check: Check, case: Any) -> Finding:
    """What one check finds on one case. Whatever the backend raises is a failure of the check;
    NotImplementedError alone says that something is not offered."""
    memory = target.memory or Memory()
    before, start = len(memory.errors), time.perf_counter()
    status: Status | None = "pass"
    message, element = "", None
    try:
        check.run(replace(target, clause=check.clause, memory=memory), case)
    except Unsuited:
        status = None
    except NotImplementedError as error:
        status, message = "skip", f"not offered: {_last_line(error)}"
    except Nonconformance as error:
        status, message = "fail", error.message
        element = None if error.worst is None else plain(asdict(error.worst))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # some frameworks' panics are no Exception
        status, message = "fail", f"raises {_last_line(error)}"
    errors = memory.errors[before:]
    counts = [0] * len(EDGES)
    for multiple in errors:
        counts[bin_of(multiple)] += 1
    worst = max(errors, default=0.0)
    worst = max(worst, float(element["allowances"])) if element else worst
    seconds = time.perf_counter() - start
    return Finding(check.name, status, seconds, worst, message, element, tuple(counts))


class _Found(Exception):
    """Tells Hypothesis that a case fails."""


def shrink(
    target: Target, check: Check, seed: int, known: Sequence[tuple[Any, Finding]], budget: int
) -> tuple[Any, Finding] | None:
    """The plainest case that Hypothesis finds the check to fail on, with what it finds there.

    `known`: the cases that `draw` gave, and what was found on each. At most `budget` others are
    run, and those beyond count as passing. None where no failure is met again.
    """
    seen = {readable(case): finding for case, finding in known}
    limit = len(seen) + budget
    last: list[tuple[Any, Finding]] = []

    def fails(case: Any) -> None:
        text = readable(case)
        if text not in seen:
            able = check.applies(case) and len(seen) < limit
            passed = Finding(check.name, "pass")
            seen[text] = examine_one(target, check, case) if able else passed
        if seen[text].status == "fail":
            last.append((case, seen[text]))
            raise _Found

    failing = next((readable(case) for case, finding in known if finding.status == "fail"), "")
    numbers = range(len(known) + SPARE)
    drawn = (readable(_one(check.cases, target.dtype, seed, number)) for number in numbers)
    # In a checkout Hypothesis draws constants of all modules loaded, so a worker may draw others
    # than the process that drew `known`: then any case that fails will do.
    matching = [number for number, text in zip(numbers, drawn, strict=True) if text == failing]
    for number in matching or numbers:
        if len(seen) >= limit:
            return None
        try:
            phases = (Phase.generate, Phase.shrink)
            run(fails, check.cases, target.dtype, seed, number, phases)
        except _Found:
            return last[-1]  # Hypothesis ends with the plainest
        except HypothesisException:  # it could not repeat what it saw
            return last[-1] if last else None
    return None


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1].strip()}" if lines else type(error).__name__
