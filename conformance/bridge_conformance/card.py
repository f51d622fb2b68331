"""A report for the terminal: levels by dtype, the worst error by clause, failures, the verdict.

Text of a backend, such as what its exceptions say, is passed through `clean` before it is shown.
"""

from collections.abc import Callable, Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from bridge_conformance import spec_files
from bridge_conformance.checks import LEVELS
from bridge_conformance.results import Failure, Outcome, Report

STYLES = {"pass": "green", "fail": "bold red", "skip": "yellow", "": "dim"}
BAR = 24  # characters of a bar that stands for the whole allowance


def card(report: Report, clean: Callable[[str], str]) -> Iterator[RenderableType]:
    """The parts of the card, from top to bottom."""
    yield Text(facts(report), "dim")
    yield Text()
    yield levels(report)
    yield Text()
    if any(o.worst for o in report.outcomes):
        yield worst_errors(report)
        yield Text()
    for blocks in by_check(report.failures):
        yield from failure(blocks, clean)
        yield Text()
    for line in skipped(report):
        yield Text(clean(line), STYLES["skip"])
    yield verdict(report)


def facts(report: Report) -> str:
    """What ran, on what, in one line or two."""
    versions = dict(report.versions)
    where = versions.pop("platform", "")
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{report.backend} on {report.device}; {named}; {where}\n"
        f"profile {report.profile}, seed {report.seed}, {cases(report)} cases "
        f"in {report.seconds:.0f} s"
    )


def cases(report: Report) -> int:
    """How often a check was run on a case."""
    return sum(outcome.cases for outcome in report.outcomes)


def summary(outcomes: list[Outcome]) -> tuple[str, str]:
    """What a level came to in a dtype: its status, and in words with counts."""
    count = {s: sum(o.status == s for o in outcomes) for s in ("pass", "fail", "skip")}
    if not outcomes:
        return "", "not run"
    if count["fail"]:
        return "fail", f"fail {count['fail']} of {len(outcomes)}"
    if count["skip"] == len(outcomes):
        return "skip", "skip"
    if count["skip"]:
        return "skip", f"pass {count['pass']}, skip {count['skip']}"
    return "pass", f"pass {len(outcomes)}"


def levels(report: Report) -> Table:
    """Levels by dtype; the numbers count checks."""
    table = Table("level", *report.dtypes, box=None, pad_edge=False, header_style="bold")
    for level in report.levels:
        row = [Text(f"L{level} {LEVELS[level]}")]
        for dtype in report.dtypes:
            status, words = summary(report.at(level, dtype))
            row.append(Text(words, STYLES[status]))
        table.add_row(*row)
    return table


def worst_errors(report: Report) -> Table:
    """The worst error by clause, of the clauses whose results are compared with an allowance."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("clause")
    table.add_column("worst error / allowed", justify="right")
    table.add_column("")
    for clause, worst in report.worst_by_clause().items():
        if worst:
            name = Text(f"{clause} {spec_files.titles().get(clause, '')}")
            style = STYLES["pass" if worst <= 1 else "fail"]
            length = max(round(min(worst, 1.0) * BAR), 1)
            bar = Text("━" * length + ("▶" if worst > 1 else ""), style)
            table.add_row(name, Text(multiple(worst), style), bar)
    return table


def multiple(worst: float) -> str:
    """An error in multiples of the allowance."""
    return f"{worst:.3f}" if 0.0005 <= worst < 1000 else f"{worst:.1e}" if worst < 1e300 else "∞"


def by_check(failures: list[Failure]) -> list[list[Failure]]:
    """The failures of each check, what is shown of them first."""
    checks: dict[str, list[Failure]] = {}
    for found in failures:
        checks.setdefault(found.check, []).append(found)
    return [sorted(blocks, key=lambda f: not f.shrunk) for blocks in checks.values()]


def failure(found: list[Failure], clean: Callable[[str], str]) -> Iterator[RenderableType]:
    """One check, in the dtypes that it fails in; the first is shown in full."""
    first, *others = found
    title = f"FAIL clause {first.clause} {first.title}: {first.check} in {first.dtype}"
    yield Text(title, STYLES["fail"])
    lines = [first.property, said(first)]
    if others:
        lines.append(f"also fails in {', '.join(f.dtype for f in others)}")
    lines.append(("" if first.shrunk else "not shrunk; ") + f"case: {first.case}")
    for line in lines:
        yield Text("  " + clean(line))
    yield Text("  again with:")
    yield Text(clean(first.command), no_wrap=True, overflow="ignore")


def said(failure: Failure) -> str:
    """What is wrong: the worst element in figures, or in words where no numbers were compared."""
    worst = failure.worst
    if worst is None:
        return failure.message
    allowances = worst["allowances"]
    times = "bit for bit equality is asked for"
    if allowances not in ("inf", "nan"):
        times = f"{allowances:.3g} times what is allowed"
    ulps = worst["ulps"]
    return (
        f"{worst['what']} at {worst['index']}: got {worst['got']}, want {worst['want']}; "
        f"{ulps if isinstance(ulps, str) else f'{ulps:.3g}'} ulps of {failure.dtype}, {times}"
    )


def skipped(report: Report) -> Iterator[str]:
    """What was not offered, each reason once with what it is true of."""
    reasons: dict[str, list[Outcome]] = {}
    for outcome in report.outcomes:
        if outcome.status == "skip" and outcome.reason:
            reasons.setdefault(outcome.reason, []).append(outcome)
    for reason, outcomes in reasons.items():
        names = sorted({o.check for o in outcomes})
        dtypes = ", ".join(dict.fromkeys(o.dtype for o in outcomes))
        what = f"{len(names)} checks" if len(names) > 3 else ", ".join(names)
        yield f"skip {what} in {dtypes}: {reason}"


def verdict(report: Report) -> Text:
    """The last line."""
    style = "bold " + STYLES["pass" if report.ok else "fail"]
    return Text(sentence(report), style)


def sentence(report: Report) -> str:
    """The verdict in words."""
    found, name = report.verdict, f"{report.backend} on {report.device}"
    if not report.complete:
        return f"{name}: stopped before the end, so there is no verdict"
    if report.checks_alone:
        return f"{name}: {'passes' if report.ok else 'does not pass'} what was run"
    if found.passed:
        return f"{name} conforms to Bridge {report.versions['spec']} up to {found}"
    passed = f"only {found} is passed" if found.level else "no level is passed"
    return f"{name} does not conform to L{found.asked}: {passed}"
