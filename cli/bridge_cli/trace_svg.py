"""The drawings of a trace's page: heat maps, maps of rows, bars and curves, as SVG text.

Figures in, SVG out, with what the pointer shows as the title of each cell. No text comes in but
what `word` gives, which is escaped.
"""

from collections.abc import Callable, Sequence
from html import escape

import numpy as np
from jaxtyping import Float

from bridge_cli.text import harmless
from bridge_cli.trace_colours import Scale, is_bright

ROOM = 860  # pixels of a drawing's width that need no scrolling
SIDE = 56  # pixels on the left, for names
TALL = 18  # pixels of a row or a layer
SHORT = 12  # letters of a token that are shown


def word(text: str | None) -> str:
    """A token's text so that it can be seen, and as HTML."""
    if text is None:
        return ""
    shown = harmless(text).replace("\n", "⏎").replace("\t", "⇥")
    shown = shown.strip() or "␣"
    return escape(shown if len(shown) <= SHORT else f"{shown[: SHORT - 1]}…")


def heat(
    names: Sequence[str],
    figures: Float[np.ndarray, "Y T"],
    scale: Scale,
    title: Callable[[int, int], str],
) -> str:
    """A cell for each figure, steps to the right; NaN is blank. `title(y, t)` is escaped text."""
    steps = figures.shape[1]
    wide = cell_width(steps)
    parts = []
    for y, (name, row) in enumerate(zip(names, figures, strict=True)):
        parts.append(_name(name, TALL * (y + 0.5)))
        for t, value in enumerate(row):
            if not np.isnan(value):
                at = f'x="{SIDE + t * wide:.1f}" y="{TALL * y}"'
                size = f'width="{wide - 0.5:.1f}" height="{TALL - 0.5}"'
                parts.append(
                    f'<rect {at} {size} fill="{css(scale, value)}">'
                    f"<title>{title(y, t)}</title></rect>"
                )
    base = TALL * len(names)
    return drawing(SIDE + steps * wide, base + 18, [*parts, *ruler(steps, wide, base + 14)])


def rows_map(
    looks: Float[np.ndarray, "N N"], scale: Scale, title: Callable[[int, int], str]
) -> str:
    """Who looks (down) at whom (across)."""
    N = len(looks)
    size = min(26.0, max(8.0, 208 / N))
    every = -(-N // 16)
    parts = []
    for row, weights in enumerate(looks):
        if row % every == 0:
            parts.append(_text(14, size * (row + 0.5) + 3.5, str(row), "end"))
            parts.append(_text(20 + size * (row + 0.5), size * N + 12, str(row), "middle"))
        for other, weight in enumerate(weights):
            x, y = 20 + size * other, size * row
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{size - 0.5:.1f}" '
                f'height="{size - 0.5:.1f}" fill="{css(scale, weight)}">'
                f"<title>{title(row, other)}</title></rect>"
            )
            if size > 20:
                ink = "#000" if is_bright(scale.colour(weight)) else "#fff"
                parts.append(
                    f'<text x="{x + size / 2:.1f}" y="{y + size / 2 + 3.5:.1f}" font-size="10" '
                    f'text-anchor="middle" fill="{ink}" pointer-events="none">'
                    f"{100 * weight:.0f}</text>"
                )
    return drawing(20 + size * N, size * N + 16, parts)


def bars(names: Sequence[str], figures: Float[np.ndarray, " Y"]) -> str:
    """A bar for each figure, and the figure beside it."""
    most = max(float(np.max(figures)), 1e-12)
    parts = []
    for y, (name, value) in enumerate(zip(names, figures, strict=True)):
        long = 420 * float(value) / most
        parts.append(_name(name, TALL * (y + 0.5)))
        parts.append(
            f'<rect x="{SIDE}" y="{TALL * y + 3}" width="{max(long, 0.5):.1f}" '
            f'height="{TALL - 6}" rx="2" fill="var(--bar)"/>'
        )
        parts.append(_text(SIDE + long + 6, TALL * (y + 0.5) + 3.5, f"{value:.3g}", "start"))
    return drawing(SIDE + 490, TALL * len(names), parts)


def curves(
    lines: Sequence[tuple[Float[np.ndarray, " T"], str, float]],
    most: float,
    titles: Sequence[str],
    mark: int | None = None,
) -> str:
    """Lines `(figures, colour, opacity)` over the steps, from 0 to `most`; gaps where NaN.

    `titles`: what the pointer shows at each step, escaped. `mark`: a step with an upright line.
    """
    steps, height = len(titles), 110.0
    wide = cell_width(steps)
    most = most or 1.0

    def place(t: int) -> float:
        return SIDE + (t + 0.5) * wide

    parts = []
    for value in (0.0, most / 2, most):
        y = height + 8 - height * value / most
        parts.append(
            f'<line x1="{SIDE}" x2="{SIDE + steps * wide:.1f}" y1="{y:.1f}" y2="{y:.1f}" '
            'stroke="var(--line)"/>'
        )
        parts.append(_text(SIDE - 8, y + 3.5, f"{value:.2g}", "end"))
    if mark is not None:
        parts.append(
            f'<line x1="{place(mark):.1f}" x2="{place(mark):.1f}" y1="8" y2="{height + 8}" '
            'stroke="var(--soft)" stroke-dasharray="3 3"/>'
        )
    for figures, colour, opacity in lines:
        look = f'fill="none" stroke="{colour}" stroke-opacity="{opacity}" stroke-width="2"'
        for run in _runs(figures):
            points = (f"{place(t):.1f},{height + 8 - height * figures[t] / most:.1f}" for t in run)
            parts.append(f'<polyline {look} points="{" ".join(points)}"/>')
            if len(run) == 1:
                y = height + 8 - height * figures[run[0]] / most
                parts.append(
                    f'<circle cx="{place(run[0]):.1f}" cy="{y:.1f}" r="1.5" fill="{colour}"/>'
                )
    for t, title in enumerate(titles):
        parts.append(
            f'<rect x="{SIDE + t * wide:.1f}" y="0" width="{wide:.1f}" height="{height + 16}" '
            f'fill="transparent"><title>{title}</title></rect>'
        )
    parts += ruler(steps, wide, height + 26)
    return drawing(SIDE + steps * wide, height + 30, parts)


def legend(scale: Scale) -> str:
    """What the colours mean."""
    parts = [_text(SIDE - 8, 12, f"{scale.low:.2f}", "end")]
    for i in range(40):
        value = scale.low + (i + 0.5) / 40 * (scale.high - scale.low)
        parts.append(
            f'<rect x="{SIDE + 4 * i}" y="3" width="4.2" height="11" fill="{css(scale, value)}"/>'
        )
    parts.append(_text(SIDE + 168, 12, f"{scale.high:.2f}", "start"))
    return drawing(SIDE + 210, 18, parts)


def css(scale: Scale, value: float) -> str:
    """The colour of a figure."""
    return "#{:02x}{:02x}{:02x}".format(*scale.colour(value))


def cell_width(steps: int) -> float:
    """Pixels of a step: what fits, but neither a sliver nor a slab."""
    return min(36.0, max(10.0, (ROOM - SIDE) / steps))


def ruler(steps: int, wide: float, y: float) -> list[str]:
    """Numbers of steps, not nearer to each other than can be read."""
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100) if n * wide >= 24 or n == 100)
    return [_text(SIDE + (t + 0.5) * wide, y, str(t), "middle") for t in range(0, steps, every)]


def drawing(width: float, height: float, parts: Sequence[str]) -> str:
    """As large as it is drawn."""
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" style="width:{width:.0f}px" role="img">'
        f"{''.join(parts)}</svg>"
    )


def _runs(figures: Float[np.ndarray, " T"]) -> list[list[int]]:
    """Steps next to each other that have a figure."""
    runs: list[list[int]] = [[]]
    for t, value in enumerate(figures):
        if np.isnan(value):
            runs.append([])
        else:
            runs[-1].append(t)
    return [run for run in runs if run]


def _name(name: str, y: float) -> str:
    return _text(SIDE - 8, y + 3.5, name, "end")


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="10" text-anchor="{anchor}" '
        f'fill="var(--soft)">{text}</text>'
    )
