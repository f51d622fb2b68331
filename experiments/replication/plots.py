"""The plots of the report: estimates in, PNG files out. Nothing here computes a figure.

Arms differ in colour, marker and line (Okabe and Ito's colours), so that they can be told apart
without colour. Bars and bands are the 95 % intervals of `collect.py`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from collect import EVERY, METRICS, Estimate, Results
from matplotlib.axes import Axes
from matplotlib.figure import Figure

LOOKS: dict[str, dict[str, Any]] = {
    "bridge": {"label": "Bridge", "color": "#0072B2", "marker": "o", "linestyle": "-"},
    "pmatch": {"label": "P-Match", "color": "#D55E00", "marker": "s", "linestyle": "--"},
    "rlvr": {"label": "RLVR only", "color": "#009E73", "marker": "^", "linestyle": ":"},
}


def plot_widths(path: Path, results: Results) -> None:
    """Each metric against the width tested at, a panel each."""
    names = ("accuracy (pass@1)", "any row (coverage)", "majority", "all rows")
    figure, axes = _panels(len(METRICS))
    for ax, metric, title in zip(axes, METRICS, names, strict=True):
        widths: list[int] = []
        for name in results.compared:
            arm = results.arms[name]
            widths = arm.widths
            found = [arm.estimate(metric, width, results.seeds(name)) for width in widths]
            _line(ax, widths, found, LOOKS[name])
        ax.set_xscale("log", base=2)
        ax.set_xticks(widths, [str(width) for width in widths])
        ax.minorticks_off()
        ax.set_xlabel("width (rows of a group)")
        ax.set_title(title, fontsize=10)
    axes[0].set_ylabel("correct, %")
    _finish(figure, axes, path, results, (0, 100))


def plot_tau(path: Path, results: Results) -> None:
    """G-Pass against tau, a panel for each of the three widest widths."""
    widths = [w for w in results.arms[results.compared[0]].widths if w > 1][-3:] or [1]
    figure, axes = _panels(len(widths))
    for ax, width in zip(axes, widths, strict=True):
        taus = [j / width for j in range(1, width + 1)]
        for name in results.compared:
            found = results.arms[name].at_least(width, results.seeds(name))
            _line(ax, taus, found, LOOKS[name])
        ax.set_xlim(0, 1.04)
        ax.set_xlabel("τ, fraction of rows correct")
        ax.set_title(f"width {width}", fontsize=10)
    axes[0].set_ylabel("G-Pass$_τ$, %")
    _finish(figure, axes, path, results, (0, 100))


def plot_training(path: Path, results: Results) -> None:
    """Reward and entropy during GRPO: a thin line a seed, and their mean."""
    figure, axes = _panels(2, sharey=False)
    for ax, (curve, title) in zip(
        axes, {"reward_mean": "reward", "entropy": "entropy of a token, nats"}.items(), strict=True
    ):
        for name in results.compared:
            seeds = [curves[curve] for curves in results.arms[name].curves.values()]
            steps = EVERY * (0.5 + np.arange(min(map(len, seeds))))
            look = {key: LOOKS[name][key] for key in ("color", "linestyle")}
            if len(seeds) > 1:
                for values in seeds:
                    ax.plot(steps, values[: len(steps)], linewidth=0.6, alpha=0.45, **look)
            mean = np.mean([values[: len(steps)] for values in seeds], axis=0)
            ax.plot(steps, mean, linewidth=1.8, label=LOOKS[name]["label"], **look)
        ax.set_ylim(bottom=0)
        ax.set_xlabel("GRPO step")
        ax.set_title(title, fontsize=10)
    _finish(figure, axes, path, results, None)


def _panels(count: int, sharey: bool = True) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(max(2.8 * count + 0.6, 7), 3.6), layout="constrained")
    return figure, list(figure.subplots(1, count, sharey=sharey, squeeze=False)[0])


def _line(ax: Axes, x: Sequence[float], y: Sequence[Estimate], look: dict[str, Any]) -> None:
    """Means in percent, with bars where there are intervals."""
    means = np.array([100 * e.mean for e in y])
    ends = [[100 * e.mean if b is None else 100 * b for e, b in zip(y, side, strict=True)]
            for side in ([e.low for e in y], [e.high for e in y])]  # fmt: skip
    bars = np.maximum(0, [means - np.array(ends[0]), np.array(ends[1]) - means])
    ax.errorbar(x, means, yerr=bars, markersize=4, linewidth=1.5, elinewidth=1, capsize=2, **look)


def _finish(
    figure: Figure,
    axes: Sequence[Axes],
    path: Path,
    results: Results,
    limits: tuple[float, float] | None,
) -> None:
    for ax in axes:
        if limits:
            ax.set_ylim(*limits)
        ax.grid(color="0.9", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    count = len(results.seeds(*results.compared))
    seeds = f"{count} seeds" if count != 1 else "1 seed"
    name = str(results.plan.get("task", results.task)).rpartition(":")[2].replace("_", " ")
    trained = results.plan["width"]
    figure.suptitle(f"{name}, trained at width {trained}, {seeds}", fontsize=10, x=0.01, ha="left")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)
