"""A trace as a picture: where rows look, how much blocks add, entropy and agreement.

A trace in, a PNG file out, written whole or not at all. Nothing here computes a figure. matplotlib
is imported when it is needed (extra `plots`).
"""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from bridge.errors import BridgeError
from bridge.files.atomic import new_file
from bridge.tracing.trace import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILION = "#0072B2", "#D55E00"  # Okabe and Ito's
NUMBERS = 10  # rows up to which a map of rows says each weight


def need_matplotlib() -> Any:
    """Its Figure class. Raises BridgeError with the mend where it is missing."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise BridgeError("plots need matplotlib; try: pip install 'bridge-llm[plots]'") from None
    return Figure


def plot_trace(path: Path, trace: Trace, layer: int | None = None) -> None:
    """All of a trace on one picture; of blocks without attention what there is.

    `layer`: whose attention the maps of rows show; None is the mean over layers. Raises BridgeError
    where matplotlib is missing, the layer has no block, or the file cannot be written.
    """
    attention = trace.attention is not None
    tall = 0.22 * len(trace.layers) + 0.26 * trace.width if attention else 0.0
    figure: Figure = need_matplotlib()(figsize=(11, min(4.2 + tall, 24)), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)  # type: ignore[union-attr]
    if attention:
        heights = [max(1.6, 0.22 * len(trace.layers)), max(1.6, 0.26 * trace.width), 1.8]
        axes = figure.subplots(3, 2, width_ratios=[3, 1], height_ratios=heights)
        _by_layer(figure, axes[0, 0], trace)
        _ratios(axes[0, 1], trace)
        _heard(figure, axes[1, 0], trace, layer)
        _looks(axes[1, 1], trace, layer)
        curves = axes[2]
    else:
        axes = figure.subplots(2, 2, width_ratios=[3, 1])
        _ratios(axes[0, 1], trace)
        axes[0, 0].axis("off")
        words = "P-Match blocks (kind mlp) read no other rows:\nthere is no attention to show"
        axes[0, 0].text(0.5, 0.5, words, ha="center", va="center", color="0.4")
        curves = axes[1]
    _curves(curves[0], trace)
    _diversity(curves[1], trace)
    figure.suptitle(_title(trace), fontsize=10, x=0.01, ha="left")
    with new_file(path) as file, warnings.catch_warnings():
        # A prompt may have letters that the font lacks; they are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(file, format="png", dpi=150)


def _by_layer(figure: "Figure", ax: "Axes", trace: Trace) -> None:
    image = _heat(ax, np.nanmean(trace.to_others(), axis=2), trace.steps)
    _named(ax.set_yticks, trace.layers)
    ax.set_ylabel("layer")
    ax.set_title("attention to other rows, mean over rows and heads", fontsize=10, loc="left")
    figure.colorbar(image, ax=ax, pad=0.01, aspect=12)


def _heard(figure: "Figure", ax: "Axes", trace: Trace, layer: int | None) -> None:
    heard = trace.heard(layer).T
    ax.set_title(f"attention from the other rows, {_layers(layer)}", fontsize=10, loc="left")
    ax.set_ylabel("row")
    if np.isnan(heard).all():
        ax.set_yticks([])
        ax.text(0.5, 0.5, "one row has no others", ha="center", transform=ax.transAxes)
        return
    image = _heat(ax, heard, trace.steps)
    _named(ax.set_yticks, range(trace.width))
    figure.colorbar(image, ax=ax, pad=0.01, aspect=12)


def _looks(ax: "Axes", trace: Trace, layer: int | None) -> None:
    looks = trace.looks(layer)
    ax.imshow(looks, cmap="viridis", aspect="equal")
    for row, weights in enumerate(looks if trace.width <= NUMBERS else []):
        for other, weight in enumerate(weights):
            bright = weight > looks.min() + 0.6 * np.ptp(looks)
            ax.text(
                other,
                row,
                f"{100 * weight:.0f}",
                ha="center",
                va="center",
                fontsize=7,
                color="black" if bright else "white",
            )
    _named(ax.set_xticks, range(trace.width))
    _named(ax.set_yticks, range(trace.width))
    ax.set_xlabel("at row")
    ax.set_ylabel("row looks")
    ax.set_title(f"who looks at whom, %\n{_layers(layer)}", fontsize=10)


def _ratios(ax: "Axes", trace: Trace) -> None:
    places = np.arange(len(trace.layers))
    ax.barh(places, trace.norm_ratios, color=BLUE, height=0.7)
    ax.set_ylim(len(places) - 0.5, -0.5)
    _named(ax.set_yticks, trace.layers)
    ax.set_ylabel("layer")
    ax.set_xlim(left=0)
    ax.set_title("norm ratio", fontsize=10)
    _plain(ax, "x")


def _curves(ax: "Axes", trace: Trace) -> None:
    from matplotlib.ticker import MaxNLocator

    steps = np.arange(trace.steps)
    for row in trace.entropy:
        ax.plot(steps, row, color=BLUE, alpha=0.2, linewidth=0.8)
    ax.plot(steps, trace.mean_entropy(), color=BLUE, linewidth=1.8)
    ax.set_ylabel("entropy, nats", color=BLUE)
    ax.set_ylim(bottom=0)
    ax.set_xlim(-0.5, trace.steps - 0.5)
    ax.set_xlabel("step (token of the answer)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_title("entropy and agreement", fontsize=10, loc="left")
    _plain(ax, "both")
    if trace.width < 2:
        return
    other = ax.twinx()
    other.plot(steps, 100 * trace.agreement(), color=VERMILION, linewidth=1.8, linestyle="--")
    other.set_ylim(0, 103)
    other.set_ylabel("agree, %", color=VERMILION)
    other.spines["top"].set_visible(False)
    if (start := trace.agree_from()) is not None:
        other.axvline(start, color=VERMILION, linewidth=1, linestyle=":")


def _diversity(ax: "Axes", trace: Trace) -> None:
    """Figures in words."""
    alike, start = trace.diversity(), trace.agree_from()
    figures = {
        "distinct answers": f"{alike.distinct} of {alike.answers}",
        "token edits, two rows": _figure(alike.edit_distance, ".1f"),
        "of the longer": _figure(alike.edit_share, ".0%"),
        "distinct-1": _figure(alike.distinct_1, ".2f"),
        "distinct-2": _figure(alike.distinct_2, ".2f"),
        "agree from step": "never" if start is None else str(start),
    }
    ax.axis("off")
    ax.set_title("answers", fontsize=10)
    for i, (name, value) in enumerate(figures.items()):
        y = 0.92 - 0.16 * i
        ax.text(0.0, y, name, fontsize=9, color="0.35", transform=ax.transAxes, va="top")
        ax.text(1.0, y, value, fontsize=9, ha="right", transform=ax.transAxes, va="top")


def _heat(ax: "Axes", figures: Float[np.ndarray, "Y T"], steps: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    ax.set_xlim(-0.5, steps - 0.5)
    image = ax.imshow(figures, cmap="viridis", aspect="auto", interpolation="nearest")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return image


def _named(set_ticks: Any, names: Any) -> None:
    """A tick a name, or every few where there are many."""
    names = list(names)
    every = -(-len(names) // 16)
    set_ticks(range(0, len(names), every), [str(name) for name in names[::every]])


def _plain(ax: "Axes", axis: Any) -> None:
    ax.grid(color="0.9", linewidth=0.8, axis=axis)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _layers(layer: int | None) -> str:
    return "mean over layers" if layer is None else f"layer {layer}"


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _title(trace: Trace) -> str:
    """The prompt in a line; a dollar sign in it begins no formula."""
    prompt = "".join(c if c.isprintable() else " " for c in trace.prompt)
    prompt = " ".join(prompt.split())
    prompt = prompt if len(prompt) <= 90 else f"{prompt[:89]}…"
    rows = "row" if trace.width == 1 else "rows"
    return f"{trace.width} {rows}: {prompt}".replace("$", r"\$")
