"""Draw curves.png from the two logs beside this file, as any run's log.jsonl can be drawn.

    python experiments/smollm2/curves.py

Points are steps; lines are means over five of them. Validation accuracy is over 64 problems of four
rows, with the interval that 64 independent answers would have.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

HERE = Path(__file__).parent
WINDOW = 5
BLUE, ORANGE = "#0072B2", "#D55E00"


def entries(log: str, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind of a run's log."""
    lines = (json.loads(line) for line in (HERE / log).read_text().splitlines())
    return [entry for entry in lines if entry["kind"] == kind]


def draw_steps(ax: Axes, log: str, field: str, title: str) -> None:
    """A field of every step, and its running mean."""
    steps = entries(log, "step")
    x, y = (np.array([entry[key] for entry in steps], float) for key in ("step", field))
    ax.plot(x, y, "o", color=BLUE, markersize=3, alpha=0.5, label="a step")
    mean = np.convolve(y, np.full(WINDOW, 1 / WINDOW), "valid")
    ax.plot(x[WINDOW // 2 : -(WINDOW // 2)], mean, color=BLUE, label="mean over five")
    ax.set_title(title, fontsize=10)
    ax.set_xlabel("step")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_accuracy(ax: Axes) -> None:
    """Accuracy on the validation problems, over that of the steps' own problems."""
    draw_steps(ax, "grpo-log.jsonl", "accuracy", "GRPO: rows correct")
    found = entries("grpo-log.jsonl", "evaluation")
    p = np.array([entry["accuracy"] for entry in found])
    half = 1.96 * np.sqrt(p * (1 - p) / np.array([entry["problems"] for entry in found]))
    steps = [entry["step"] for entry in found]
    ax.errorbar(steps, p, half, fmt="D-", color=ORANGE, capsize=3, label="validation")
    ax.set_ylim(0, 1)


def main() -> None:
    """See the module."""
    figure = Figure(figsize=(10, 3), layout="constrained")
    axes = figure.subplots(1, 3)
    draw_steps(axes[0], "warm-log.jsonl", "loss", "warm-up: loss of a token, nats")
    draw_accuracy(axes[1])
    draw_steps(axes[2], "grpo-log.jsonl", "entropy", "GRPO: entropy of a token, nats")
    for ax in (axes[0], axes[2]):
        ax.set_ylim(bottom=0)
    axes[1].legend(fontsize=7, loc="upper left")
    figure.savefig(HERE / "curves.png", dpi=110)


if __name__ == "__main__":
    main()
