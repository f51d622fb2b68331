"""Two plots of one or two models: accuracy against width, and G-Pass against tau.

Figures with intervals in, PNG files out; written whole or not at all. Nothing here computes a
metric. Models differ in colour, marker and line, so that they can be told apart without colour
(Okabe and Ito's blue and vermilion).
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.errors import BridgeError
from bridge.evaluation.intervals import Interval
from bridge.evaluation.summary import Figures
from bridge.files.atomic import new_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOOKS: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    {"color": "#D55E00", "marker": "s", "linestyle": "--"},
)
PANELS = {
    "pass@1": "mean accuracy (pass@1)",
    "majority": "majority of the rows",
    "coverage": "any row (coverage)",
}
MOST = 4  # panels of tau: the widest widths


def plot_accuracy(path: Path, models: Mapping[str, Sequence[Figures]], title: str) -> None:
    """Pass@1, majority and coverage by width, a panel each, with bands of 95 %.

    Raises BridgeError where matplotlib is missing or the file cannot be written.
    """
    figure, axes = _panels(len(PANELS))
    for ax, (metric, name) in zip(axes, PANELS.items(), strict=True):
        for look, figures in zip(LOOKS, models.values(), strict=False):
            widths = [f.width for f in figures]
            _line(ax, widths, [f.metrics[metric] for f in figures], look)
        widths = sorted({f.width for figures in models.values() for f in figures})
        ax.set_xscale("log", base=2)
        ax.set_xticks(widths, [str(width) for width in widths])
        ax.minorticks_off()
        ax.set_xlabel("width (rows of a group)")
        ax.set_title(name, fontsize=10)
    axes[0].set_ylabel("correct, %")
    _finish(figure, axes, path, title, models)


def plot_gpass(path: Path, models: Mapping[str, Sequence[Figures]], title: str) -> None:
    """The share of problems where at least the fraction tau of the rows is correct, a panel for
    each of the widest widths above 1. Raises BridgeError as `plot_accuracy`."""
    widths = sorted({f.width for figures in models.values() for f in figures if f.width > 1})
    shown = widths[-MOST:] or [1]
    figure, axes = _panels(len(shown))
    for ax, width in zip(axes, shown, strict=True):
        for look, figures in zip(LOOKS, models.values(), strict=False):
            for f in figures:
                if f.width == width:
                    _line(ax, [j / width for j in range(1, width + 1)], f.curve, look)
        ax.set_xlim(0, 1.04)
        ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", ".25", ".5", ".75", "1"])
        ax.set_xlabel("τ, fraction of rows correct")
        ax.set_title(f"width {width}", fontsize=10)
    axes[0].set_ylabel("G-Pass$_τ$, %")
    _finish(figure, axes, path, title, models)


def _panels(count: int) -> "tuple[Figure, list[Axes]]":
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise BridgeError("plots need matplotlib; try: pip install 'bridge-llm[plots]'") from None
    figure = Figure(figsize=(max(2.9 * count + 0.6, 6), 3.5), layout="constrained")
    return figure, list(figure.subplots(1, count, sharey=True, squeeze=False)[0])


def _line(ax: "Axes", x: Sequence[float], y: Sequence[Interval], look: Mapping[str, Any]) -> None:
    """A line of means in percent, in its band."""
    low, high = ([100 * getattr(i, side) for i in y] for side in ("low", "high"))
    ax.fill_between(x, low, high, color=look["color"], alpha=0.18, linewidth=0)
    if len(x) == 1:  # a band without width is seen as a bar
        ax.vlines(x, low, high, color=look["color"], linewidth=1.2)
    means = [100 * i.mean for i in y]
    ax.plot(x, means, markersize=4.5, linewidth=1.6, clip_on=False, zorder=3, **look)


def _finish(
    figure: "Figure", axes: "list[Axes]", path: Path, title: str, models: Iterable[str]
) -> None:
    for ax in axes:
        ax.set_ylim(0, 100)
        ax.grid(color="0.9", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    names = [_short(title, 72), *(_short(name, 40) for name in models)]
    figure.suptitle(names[0], fontsize=10, x=0.01, ha="left")
    if len(names) > 2:
        lines = axes[-1].get_lines()
        figure.legend(lines, names[1:], loc="outside lower center", ncols=2, frameon=False)
    with new_file(path) as file:
        figure.savefig(file, format="png", dpi=160)


def _short(text: str, most: int) -> str:
    """Text that fits beside others; a dollar sign in it begins no formula."""
    if len(text) > most:
        text = f"{text[: most // 3]}…{text[len(text) + 1 + most // 3 - most :]}"
    return text.replace("$", r"\$")
