"""A trace to keep or to show around: a page for a browser (`page.html`), and a picture.

A trace in; HTML that needs nothing else, or a PNG file, out. Nothing here computes a figure, or
writes a file. matplotlib, for the picture alone, is imported when it is needed (extra `plots`).
"""

import warnings
from collections.abc import Callable, Iterable
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from bridge.contract import Sampling
from bridge.errors import BridgeError
from bridge.tracing.colours import VIRIDIS, scale_of
from bridge.tracing.trace import Trace, layers_shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAGE = Path(__file__).with_name("page.html")
LETTERS = 12  # of a token that are shown on the page
BLUE, VERMILION = "#0072B2", "#D55E00"  # of the picture: Okabe and Ito's
NUMBERS = 10  # rows up to which its map of rows says each weight


# The page


def page(
    trace: Trace,
    checkpoint: str,
    sampling: Sampling,
    clean: Callable[[str], str],
    layer: int | None = None,
) -> str:
    """The whole page. `clean` takes what could mislead a reader out of a text; all are escaped.
    `layer`: whose attention colours the tokens; None is the mean over layers."""
    from jinja2 import Environment, StrictUndefined

    clean = cache(clean)  # the same few words and figures stand in cell after cell

    def finalize(said: Any) -> Any:
        """Of whatever the page shows; what a macro gives, which is HTML, has been here."""
        return clean(said) if isinstance(said, str) and not hasattr(said, "__html__") else said

    environment = Environment(
        autoescape=True,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"path": _path, "short": lambda word: _short(clean(word))}
    environment.tests["nan"] = np.isnan
    filters = {"top-k": sampling.top_k, "top-p": sampling.top_p, "min-p": sampling.min_p}
    heads = f" of {trace.heads} heads" if trace.heads else ""
    facts = {
        "checkpoint": checkpoint,
        "blocks": f"{trace.kind}, {len(trace.layers)} layers{heads}",
        "width": trace.width,
        "steps": trace.steps,
        "temperature": f"{sampling.temperature:g}",
        **{name: f"{value:g}" for name, value in filters.items() if value is not None},
        "seed": sampling.seed,
    }
    shown = (None, *trace.layers) if trace.attention is not None else ()
    wide = min(36.0, max(10.0, 804 / trace.steps))  # pixels of a step: neither sliver nor slab
    return environment.from_string(PAGE.read_text(encoding="utf-8")).render(
        trace=trace,
        facts=facts,
        layer=layer,
        maps={layers_shown(which): trace.looks(which) for which in shown},
        wide=wide,
        # Numbers of steps stand no nearer to each other than can be read.
        every=next(n for n in (1, 2, 5, 10, 20, 50, 100) if n * wide >= 24 or n == 100),
        viridis=VIRIDIS,
        layers_shown=layers_shown,
        scale_of=scale_of,
    )


def _short(word: str) -> str:
    """A token's text so that it can be seen, in a cell."""
    shown = word.replace("\n", "⏎").replace("\t", "⇥").strip() or "␣"
    return shown if len(shown) <= LETTERS else f"{shown[: LETTERS - 1]}…"


def _path(figures: Float[np.ndarray, " T"], most: float) -> str:
    """A line as SVG has it, a step wide and 1 tall, as far as figures go; of one alone, a dash."""
    heights = [f"{1 - share:.4f}" for share in figures[~np.isnan(figures)] / most]
    if len(heights) == 1:
        return f"M0.3,{heights[0]}h0.4"
    return "M" + "L".join(f"{t + 0.5},{height}" for t, height in enumerate(heights))


# The picture


def need_matplotlib() -> "type[Figure]":
    """Its Figure class. Raises BridgeError with the mend where it is missing."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise BridgeError("plots need matplotlib; try: pip install 'bridge-llm[plots]'") from None
    return Figure


def picture(trace: Trace, layer: int | None = None) -> bytes:
    """All of a trace as a PNG file; of blocks without attention what there is.

    `layer`: whose attention the maps of rows show; None is the mean over layers. Raises BridgeError
    where matplotlib is missing, or the layer has no block.
    """
    attends = trace.attention is not None
    tall = 0.22 * len(trace.layers) + 0.26 * trace.width if attends else 0.0
    figure = need_matplotlib()(figsize=(11, min(4.2 + tall, 24)), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)  # type: ignore[union-attr]
    if attends:
        heights = [max(1.6, 0.22 * len(trace.layers)), max(1.6, 0.26 * trace.width), 1.8]
        (left, ratios), (heard, looks), curves = figure.subplots(
            3, 2, width_ratios=[3, 1], height_ratios=heights
        )
        title = "attention to other rows, mean over rows and heads"
        _draw_heat(left, trace.by_layer(), trace.layers, "layer", title)
        title = f"attention from the other rows, {layers_shown(layer)}"
        _draw_heat(heard, trace.heard(layer).T, range(trace.width), "row", title)
        _draw_looks(looks, trace, layer)
    else:
        (left, ratios), curves = figure.subplots(2, 2, width_ratios=[3, 1])
        left.axis("off")
        words = "P-Match blocks (kind mlp) read no other rows:\nthere is no attention to show"
        left.text(0.5, 0.5, words, ha="center", va="center", color="0.4")
    _draw_ratios(ratios, trace)
    _draw_curves(curves[0], trace)
    _draw_diversity(curves[1], trace)
    figure.suptitle(_title(trace), fontsize=10, x=0.01, ha="left")
    drawn = BytesIO()
    with warnings.catch_warnings():
        # A prompt may have letters that the font lacks; they are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(drawn, format="png", dpi=150)
    return drawn.getvalue()


def _draw_heat(
    ax: "Axes", figures: Float[np.ndarray, "Y T"], names: Iterable[int], what: str, title: str
) -> None:
    ax.set_title(title, fontsize=10, loc="left")
    ax.set_ylabel(what)
    if np.isnan(figures).all():
        ax.set_yticks([])
        ax.text(0.5, 0.5, "one row has no others", ha="center", transform=ax.transAxes)
        return
    image = ax.imshow(figures, cmap="viridis", aspect="auto", interpolation="nearest")
    _steps(ax, figures.shape[1])
    _named(ax.set_yticks, names)
    ax.figure.colorbar(image, ax=ax, pad=0.01, aspect=12)


def _draw_looks(ax: "Axes", trace: Trace, layer: int | None) -> None:
    looks = trace.looks(layer)
    ax.imshow(looks, cmap="viridis", aspect="equal")
    bright = looks > looks.min() + 0.6 * np.ptp(looks)
    for row, other in np.ndindex(looks.shape if trace.width <= NUMBERS else (0, 0)):
        ax.text(
            other,
            row,
            f"{100 * looks[row, other]:.0f}",
            ha="center",
            va="center",
            fontsize=7,
            color="black" if bright[row, other] else "white",
        )
    _named(ax.set_xticks, range(trace.width))
    _named(ax.set_yticks, range(trace.width))
    ax.set_xlabel("at row")
    ax.set_ylabel("row looks")
    ax.set_title(f"who looks at whom, %\n{layers_shown(layer)}", fontsize=10)


def _draw_ratios(ax: "Axes", trace: Trace) -> None:
    places = np.arange(len(trace.layers))
    ax.barh(places, trace.norm_ratios, color=BLUE, height=0.7)
    ax.set_ylim(len(places) - 0.5, -0.5)
    _named(ax.set_yticks, trace.layers)
    ax.set_ylabel("layer")
    ax.set_xlim(left=0)
    ax.set_title("norm ratio", fontsize=10)
    _plain(ax, "x")


def _draw_curves(ax: "Axes", trace: Trace) -> None:
    ax.plot(trace.entropy.T, color=BLUE, alpha=0.2, linewidth=0.8)
    ax.plot(trace.mean_entropy(), color=BLUE, linewidth=1.8)
    ax.set_ylabel("entropy, nats", color=BLUE)
    ax.set_ylim(bottom=0)
    _steps(ax, trace.steps)
    ax.set_xlabel("step (token of the answer)")
    ax.set_title("entropy and agreement", fontsize=10, loc="left")
    _plain(ax, "both")
    if trace.width < 2:
        return
    other = ax.twinx()
    other.plot(100 * trace.agreement(), color=VERMILION, linewidth=1.8, linestyle="--")
    other.set_ylim(0, 103)
    other.set_ylabel("agree, %", color=VERMILION)
    other.spines["top"].set_visible(False)
    if (start := trace.agree_from()) is not None:
        other.axvline(start, color=VERMILION, linewidth=1, linestyle=":")


def _draw_diversity(ax: "Axes", trace: Trace) -> None:
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
        look: Any = {"y": 0.92 - 0.16 * i, "fontsize": 9, "transform": ax.transAxes, "va": "top"}
        ax.text(0.0, s=name, color="0.35", **look)
        ax.text(1.0, s=value, ha="right", **look)


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _named(set_ticks: Any, names: Iterable[int]) -> None:
    """A tick a name, or every few where there are many."""
    names = list(names)
    every = -(-len(names) // 16)
    set_ticks(range(0, len(names), every), [str(name) for name in names[::every]])


def _steps(ax: "Axes", steps: int) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_xlim(-0.5, steps - 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _plain(ax: "Axes", axis: Any) -> None:
    ax.grid(color="0.9", linewidth=0.8, axis=axis)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _title(trace: Trace) -> str:
    """The prompt in a line; a dollar sign in it begins no formula."""
    prompt = "".join(c if c.isprintable() else " " for c in trace.prompt)
    prompt = " ".join(prompt.split())
    prompt = prompt if len(prompt) <= 90 else f"{prompt[:89]}…"
    rows = "row" if trace.width == 1 else "rows"
    return f"{trace.width} {rows}: {prompt}".replace("$", r"\$")
