"""The tables of `bridge eval`: a row a width, and under it its baseline and the difference.

Shares are in percent; a difference whose interval excludes 0 has a mark. One that was stopped says
what is kept instead.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bridge_cli.text import harmless_line

if TYPE_CHECKING:
    from bridge.evaluation.summary import Evaluation, Figures, Report

SHOWN = {
    "accuracy": {
        "pass@1": "pass@1",
        "coverage": "any row",
        "majority": "majority",
        "best": "best reward",
    },
    "G-Pass": {
        "gpass@0.25": "τ 0.25",
        "gpass@0.5": "τ 0.5",
        "gpass@0.75": "τ 0.75",
        "gpass@1.0": "τ 1 (all rows)",
    },
}


WIDE = 104  # characters that a table needs with each interval beside its mean


@dataclass
class Asked:
    """What a command is to find, as far as is known yet."""

    groups: int  # a problem and width
    widths: dict[str, tuple[int, ...]] = field(default_factory=dict)  # decoded, by model
    each: int | None = None  # groups a width, of all problems


def stopped(out: Path | None, asked: Asked) -> str:
    """What is left of an evaluation that was stopped, in one line."""
    from bridge.evaluation.records import kept

    if out is None:
        return "stopped; nothing is kept without --out"
    found = [(name, key) for name in ("model", "baseline") for key in kept(out / name)]
    of = ""
    if asked.each is not None:
        problems = asked.each // asked.groups
        found = [
            (name, (width, problem, number))
            for name, (width, problem, number) in found
            if width in asked.widths.get(name, ()) and problem < problems and number < asked.groups
        ]
        of = f" of {asked.each * sum(map(len, asked.widths.values()))}"
    return f"kept {len(found)}{of} groups in {harmless_line(str(out))}; the same command goes on"


def show(report: "Report") -> None:
    """Print the tables, and what should be known before they are believed."""
    # Elsewhere than on a terminal, wide enough for every table.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    for title, columns in SHOWN.items():
        console.print(_table(report, title, columns, " " if console.width >= WIDE else "\n"))
        console.print()
    for line in _remarks(report):
        console.print(Text(line, "dim"))


def _table(report: "Report", title: str, columns: dict[str, str], gap: str) -> Table:
    """`gap`: what stands between a mean and its interval."""
    table = Table(title, *columns.values(), box=None, pad_edge=False, header_style="bold")
    for figures, theirs, difference in _by_width(report):
        cells = [_cell(figures, metric, gap) for metric in columns]
        table.add_row(f"width {figures.width}", *cells)
        if theirs is not None and difference is not None:
            cells = [_cell(theirs, metric, gap) for metric in columns]
            table.add_row("  baseline", *cells)
            cells = [_difference(difference, metric, gap) for metric in columns]
            table.add_row("  difference", *cells)
    return table


def _by_width(
    report: "Report",
) -> "Iterator[tuple[Figures, Figures | None, Figures | None]]":
    if report.baseline is None:
        yield from ((figures, None, None) for figures in report.figures)
    else:
        yield from zip(report.figures, report.baseline_figures, report.differences, strict=True)


def _cell(figures: "Figures", metric: str, gap: str) -> Text:
    """A mean and its interval; shares in percent, and rewards as they are."""
    mean, low, high = _numbers(figures, metric, "")
    return Text.assemble(mean, gap, (f"[{low}, {high}]", "dim"))


def _difference(figures: "Figures", metric: str, gap: str) -> Text:
    interval = figures.metrics[metric]
    mean, low, high = _numbers(figures, metric, "+")
    if not interval.excludes_zero:
        return Text.assemble(mean, gap, (f"[{low}, {high}]", "dim"))
    return Text(f"{mean}*{gap}[{low}, {high}]", "green" if interval.mean > 0 else "red")


def _numbers(figures: "Figures", metric: str, sign: str) -> list[str]:
    i = figures.metrics[metric]
    scale, form = (1, ".3f") if metric == "best" else (100, ".1f")
    return [f"{scale * x + 0.0:{sign}{form}}" for x in (i.mean, i.low, i.high)]


def _remarks(report: "Report") -> "Iterator[str]":
    ours, settings = report.evaluation, report.evaluation.settings
    yield (
        f"{harmless_line(settings['task'])}, {_counted(len(ours.problems), 'problem')} of "
        f"{settings['split']}, "
        f"{_counted(ours.groups, 'group')} each; temperature "
        f"{settings['temperature']:g}, seed {settings['seed']}; percent, with 95 % intervals over "
        "problems"
    )
    if report.baseline is not None:
        yield "* the interval of this paired difference excludes 0; not corrected for their number"
    yield from _of_one("model", ours, report.figures)
    if report.baseline is not None:
        yield from _of_one("baseline", report.baseline, report.baseline_figures)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _of_one(name: str, evaluation: "Evaluation", figures: "list[Figures]") -> "Iterator[str]":
    if evaluation.independent and len(evaluation.widths) > 1:
        widest = evaluation.widths[-1]
        yield f"{name}: its rows do not see each other; all widths are from its rows at {widest}"
    if (cut := max(f.metrics["cut_off"].mean for f in figures)) > 0:
        limit = evaluation.settings["max_new_tokens"]
        yield f"{name}: up to {cut:.1%} of rows were cut off at {limit} tokens"
    if troubles := evaluation.troubles():
        first = harmless_line(troubles[0])
        yield f"{name}: {len(troubles)} responses could not be scored and count 0, such as: {first}"
