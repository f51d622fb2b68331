"""The report: from the directories of runs to the results that are committed.

    python experiments/replication/report.py RUNS

Reads RUNS/TASK/seed-N and writes, into results/, `tables.md`, and for each task `TASK.json` (every
figure), `TASK-curves.json` (training, thinned) and three plots; of operator search with something
changed there are no plots. It uses only what the directories hold: the same runs give the same
files.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from collect import METRICS, Estimate, Results, collect
from plans import ABLATIONS, ARMS, CHANGED
from plots import LOOKS, plot_tau, plot_training, plot_widths

from bridge.errors import BridgeError

NAMES = {name: look["label"] for name, look in LOOKS.items()} | {
    "no-warmup": "without warm-up",
    "self-excluded": "a row reads others only",
    "half-layers": "blocks on every second layer",
    "cut-gradients": "no gradient into other rows",
}
LESS = "Bridge less "
CHANGES = {
    "search-width-4": "Trained at width 4, in twice as many groups",
    "search-trials-4": "Room for four trials",
    "search-modulus-31": "Modulo 31",
    "search-small": "2 layers of 64",
    "search-large": "4 layers of 128",
}
HEAD = """# Results

Made by `report.py`, from the directories of the runs. In percent; after ± the half-width of the \
95 % interval over seeds (Student's t; base, data, blocks and sampling all differ by seed), and in \
brackets, where there is one seed, the 95 % interval over its problems. Differences are taken seed \
by seed. Rows of P-Match and RLVR do not see each other: they were drawn at the widest width, and \
the figures at narrower ones are exact means over choices of those rows.
"""


def tables(results: Results) -> str:
    """The tables of a task, as Markdown."""
    plan = results.plan
    seeds = results.seeds(*results.compared)
    lines = [
        f"## {results.task}",
        "",
        f"{plan['test_problems']} held-out problems a seed, trained at width {plan['width']} for "
        f"{plan['steps']} steps of {plan['problems']} groups; seeds {', '.join(map(str, seeds))}.",
    ]
    for metric, title in METRICS.items():
        rows = {NAMES[name]: _of(results, name, metric) for name in results.compared}
        for other in results.compared[1:]:
            if results.seeds("bridge", other):
                rows[f"{LESS}{NAMES[other]}"] = _apart(results, other, metric)
        lines += ["", f"### {title}", "", *_table(results, rows)]
    plots = {"widths": "Metrics by width", "tau": "G-Pass against τ", "training": "Training"}
    lines += ["", *(f"![{title}]({results.task}-{kind}.png)\n" for kind, title in plots.items())]
    if results.ablations and "bridge" in results.arms:
        lines += _ablations(results)
    return "\n".join(lines)


def _ablations(results: Results) -> list[str]:
    """Accuracy of each ablation, beside Bridge at the same seeds."""
    seeds = results.seeds("bridge", *results.ablations)
    names = ("bridge", *results.ablations)
    rows = {NAMES[name]: _of(results, name, "pass@1", seeds) for name in names}
    said = f"Accuracy (pass@1); seeds {', '.join(map(str, seeds))}."
    return ["### Ablations", "", said, "", *_table(results, rows), ""]


def _changed(found: list[Results], as_it_is: Results) -> str:
    """Accuracy where one thing differs, beside that of the same seeds where nothing does."""
    every = sorted({seed for results in found for seed in results.seeds(*results.compared)})
    lines = ["## search, with one thing changed", "", "Accuracy (pass@1)."]
    for results in (as_it_is, *found):
        seeds = every if results is as_it_is else results.seeds(*results.compared)
        rows = {NAMES[name]: _of(results, name, "pass@1", seeds) for name in results.compared}
        title = CHANGES.get(results.task, "Nothing changed")
        said = f"### {title}; seeds {', '.join(map(str, seeds))}"
        lines += ["", said, "", *_table(results, rows)]
    return "\n".join(lines)


def _of(
    results: Results, name: str, metric: str, seeds: Sequence[int] | None = None
) -> list[Estimate]:
    """By width, over these seeds; None: all that the arm is done for."""
    arm, seeds = results.arms[name], results.seeds(name) if seeds is None else seeds
    return [arm.estimate(metric, width, seeds) for width in _widths(results)]


def _apart(results: Results, other: str, metric: str) -> list[Estimate]:
    return [results.difference(other, metric, width) for width in _widths(results)]


def _widths(results: Results) -> list[int]:
    return results.arms[results.compared[0]].widths


def _table(results: Results, rows: dict[str, list[Estimate]]) -> list[str]:
    """A row of estimates a line; what is a difference has a sign."""
    head = ["test width", *map(str, _widths(results))]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for title, estimates in rows.items():
        cells = [_cell(estimate, signed=title.startswith(LESS)) for estimate in estimates]
        lines.append(f"| {' | '.join([title, *cells])} |")
    return lines


def _cell(estimate: Estimate, signed: bool) -> str:
    mean = f"{100 * estimate.mean:{'+' * signed}.1f}"
    if estimate.low is None or estimate.high is None:
        return mean
    if estimate.seeds > 1:
        return f"{mean} ± {50 * (estimate.high - estimate.low):.1f}"
    return f"{mean} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def write_report(root: Path, out: Path) -> None:
    """All files of the report. Raises BridgeError where there is nothing to report."""
    found = collect(root)
    order = list(ARMS) + list(ABLATIONS)
    out.mkdir(parents=True, exist_ok=True)
    for results in found:
        assert list(results.arms) == [name for name in order if name in results.arms]
        _write(out / f"{results.task}.json", results.to_json())
        if results.task in CHANGED:
            continue
        _write(out / f"{results.task}-curves.json", results.curves())
        plot_widths(out / f"{results.task}-widths.png", results)
        plot_tau(out / f"{results.task}-tau.png", results)
        plot_training(out / f"{results.task}-training.png", results)
    changed = [results for results in found if results.task in CHANGED]
    whole = {results.task: results for results in found if results.task not in CHANGED}
    lines = [HEAD, *map(tables, whole.values())]
    if changed and "search" in whole:
        lines.append(_changed(changed, whole["search"]))
    (out / "tables.md").write_text("\n".join(lines).rstrip() + "\n")


def _write(path: Path, said: Any) -> None:
    path.write_text(json.dumps(said, separators=(",", ":")) + "\n")


def main(
    runs: Path,
    out: Annotated[Path, typer.Option(help="Where results go.")] = Path(__file__).parent
    / "results",
) -> None:
    """Make the report of RUNS."""
    try:
        write_report(runs, out)
    except BridgeError as error:
        typer.echo(error, err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
