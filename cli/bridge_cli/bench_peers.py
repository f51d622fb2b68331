"""`bridge bench --peers`: the same model through Bridge and other engines, as tables."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge_cli.machine import device_name
from bridge_cli.text import print_json

if TYPE_CHECKING:
    from bridge.evaluation.peers.results import Found, Results

PROMPT, ROUNDS = 85, 3


def bench_peers(
    checkpoint: Path,
    device: str | None,
    chosen: Mapping[str, str],
    sizes: Mapping[str, Any],
    plot: Path | None,
    save: Path | None,
    json: bool,
) -> None:
    """Measure, show, plot and keep. `chosen`: widths, engines and dtypes, by commas."""
    from rich.console import Console

    from bridge.checkpoints.reading import open_checkpoint
    from bridge.errors import BridgeError
    from bridge.evaluation.peers.measure import run
    from bridge.evaluation.peers.plan import plan
    from bridge.evaluation.peers.plot import check_plot, plot_peers
    from bridge.evaluation.peers.results import Workload
    from bridge.files.atomic import new_file, refuse_existing
    from bridge.numbers.machine import available_processors
    from bridge.numbers.ranges import RANGES
    from bridge.registry import backends

    if plot is not None:
        check_plot(plot)
    if save is not None:
        refuse_existing(save)
    widths = sorted({RANGES["width"].read("widths", w) for w in _listed(chosen["widths"])})
    if not widths:
        raise BridgeError("widths: name some, by commas")
    workload = Workload(
        tuple(widths),
        sizes["new"],
        sizes["prompt_tokens"] or PROMPT,
        sizes["rounds"] or ROUNDS,
        sizes["seconds"],
        sizes["threads"] or available_processors(),
    )
    opened = open_checkpoint(checkpoint)
    installed = backends()
    device = device or installed[0].devices[0]
    planned = plan(
        installed,
        device,
        blocks=opened.config.bridge is not None,
        engines=_listed(chosen["engines"]),
        weights=_listed(chosen["dtypes"]),
    )
    with Console(stderr=True).status("starting") as status:
        results = run(opened, planned, device, workload, status.update)
    machine = {"device": device_name(device), "threads": workload.threads}
    said = {"machine": machine, "checkpoint": str(checkpoint), **results.to_json()}
    if save is not None:
        import json as writer

        with new_file(save) as file:
            file.write((writer.dumps(said, indent=2) + "\n").encode())
    if plot is not None:
        title = f"{checkpoint.name} on {machine['device']}, threads: {workload.threads}"
        plot_peers(plot, results, title)
    if json:
        return print_json(said)
    _show(results, machine)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _show(results: "Results", machine: Mapping[str, Any]) -> None:
    from rich.console import Console

    width = None if sys.stdout.isatty() else 140
    console = Console(soft_wrap=True, highlight=False, width=width)
    console.print("decoding, tokens a second of all rows", style="bold")
    _print_table(console, results, lambda f, w: f.tokens_per_second(w), "{:.0f}", results.bound)
    console.print("\ntime until every row has its first token, ms", style="bold")
    _print_table(console, results, lambda f, w: f.first_token(w), "{:.0f}", None, 1e3)
    work = results.workload
    console.print(
        f"\n{work.prompt_tokens} tokens of prompt, {work.new} new tokens a row; medians of "
        f"{work.rounds}, in turn; threads of each: {work.threads}; on {machine['device']}",
        style="dim",
    )
    if results.limit is not None:
        console.print(
            f"memory is read at {results.limit.bandwidth / 1e9:.1f} GB/s, float32 matrices are "
            f"multiplied at {results.limit.rate / 1e9:.0f} GFLOP/s",
            style="dim",
        )
    if any(found.entry.blocks for found in results.found):
        console.print("peers run the host: they have nothing that runs blocks", style="dim")
    for found in results.found:
        if short := {w: n for w, n in found.new.items() if n < work.new}:
            listed = ", ".join(f"{n} at width {w}" for w, n in short.items())
            console.print(f"{found.entry.label}: too slow for all tokens, so {listed}", style="dim")
        for why in dict.fromkeys(found.left_out.values()):
            left = ", ".join(str(w) for w, said in found.left_out.items() if said == why)
            console.print(f"{found.entry.label}: no width {left}: {why}", style="dim")
    for name, same in results.doubts().items():
        said = f"{name}: parts from the host after {same} of the likeliest tokens; is it the same?"
        console.print(said, style="yellow", markup=False)
    for name, other in (("not measured", results.absent), ("failed", results.failed)):
        for absent in other:
            console.print(f"{name}: {absent.name}: {absent.why}", style="yellow", markup=False)


def _print_table(
    console: Any,
    results: "Results",
    value: "Callable[[Found, int], float | None]",
    form: str,
    bound: Callable[[int], float | None] | None,
    times: float = 1.0,
) -> None:
    from rich.table import Table

    table = Table("engine", "weights", "blocks", box=None, pad_edge=False)
    widths = results.workload.widths
    for width in widths:
        table.add_column(f"n={width}", justify="right")

    def cells(found: list[float | None]) -> list[str]:
        return ["-" if x is None else form.format(times * x) for x in found]

    for found in results.found:
        entry = found.entry
        table.add_row(
            f"{entry.name} {found.version}",
            entry.weights,
            "yes" if entry.blocks else "no",
            *cells([value(found, width) for width in widths]),
        )
    if bound is not None and results.limit is not None:
        limits = cells([bound(width) for width in widths])
        table.add_row("what the machine allows", "float32", "no", *limits, style="dim")
    console.print(table)
