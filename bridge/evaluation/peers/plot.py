"""Tokens a second against width, both by their logarithms: a line an engine, and the limit.

In: results. Out: a PNG or SVG file, written whole or not at all. An engine has a colour and a
marker, its weights a kind of line, so that lines can be told apart without colour.
"""

from pathlib import Path

from bridge.errors import BridgeError
from bridge.evaluation.peers.results import Results
from bridge.files.atomic import new_file, refuse_existing

# Okabe and Ito's colours, and a marker each.
ENGINES = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#56B4E9", "P"),
    ("#666666", "X"),
)
LINES = {"float32": "-", "bfloat16": "--", "int8": "-.", "int4": ":"}
KINDS = ("png", "svg")


def check_plot(path: Path) -> None:
    """Raises BridgeError for a file that cannot be the plot, before anything is measured."""
    if path.suffix.removeprefix(".").lower() not in KINDS:
        raise BridgeError(f"{path}: name a .png or a .svg file for the plot")
    refuse_existing(path)
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise BridgeError("plots need matplotlib; try: pip install 'bridge-llm[plots]'") from None


def plot_peers(path: Path, results: Results, title: str) -> None:
    """Draw it. Raises BridgeError where the file cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, 5.2), layout="constrained")
    ax = figure.subplots()
    widths = list(results.workload.widths)
    looks = {
        name: ENGINES[i % len(ENGINES)]
        for i, name in enumerate(dict.fromkeys(found.entry.name for found in results.found))
    }
    if results.limit is not None:
        bounds = [results.limit.tokens_per_second(results.parameters, w) for w in widths]
        ax.plot(widths, bounds, color="black", linewidth=1, label="the machine's limit, float32")
    for found in results.found:
        measured = {w: found.tokens_per_second(w) for w in widths}
        shown = {w: rate for w, rate in measured.items() if rate is not None}
        if not shown:
            continue
        color, marker = looks[found.entry.name]
        ours, hollow = bool(found.entry.backend), bool(found.entry.backend) != found.entry.blocks
        ax.plot(
            list(shown),
            list(shown.values()),
            color=color,
            marker=marker,
            markerfacecolor="white" if hollow else color,
            linestyle=LINES.get(found.entry.weights, "-"),
            linewidth=2.0 if ours else 1.2,
            markersize=5,
            label=found.entry.label,
        )
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(widths, [str(width) for width in widths])
    for axis in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
        axis("{x:g}")
    ax.set_xlabel("width (rows of a group)")
    ax.set_ylabel("tokens a second, all rows")
    ax.grid(color="0.9", linewidth=0.8, which="both")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title.replace("$", r"\$"), fontsize=10, x=0.01, ha="left")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8, handlelength=3.5)
    with new_file(path) as file:
        figure.savefig(file, format=path.suffix.removeprefix(".").lower(), dpi=160)
