"""A trace on a terminal: answers, heat maps and curves, over the same steps from left to right.

It fits the terminal's width, 80 columns too: where there are more steps than columns, each column
is the mean of a few. Where there are no colours a heat map is made of digits.
"""

import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.style import Style
from rich.text import Text

from bridge.tracing.trace import Trace
from bridge_cli.text import harmless_line
from bridge_cli.trace_colours import Scale, is_bright, scale_of
from bridge_cli.view import heading

LABEL, FIGURE = 8, 8  # columns on the left, and on the right where figures stand
BARS = "▁▂▃▄▅▆▇█"


class View:
    """Prints a trace; `layer` chooses whose attention the maps of rows show, None all layers'."""

    def __init__(self, console: Console, trace: Trace, layer: int | None) -> None:
        self.console, self.trace, self.layer = console, trace, layer
        room = max(8, console.width - LABEL - FIGURE)
        self.each = -(-trace.steps // room)  # steps of a cell
        self.cells = -(-trace.steps // self.each)
        self.wide = min(3, room // self.cells)  # columns of a cell
        self.coloured = console.color_system in ("256", "truecolor") and not console.no_color

    def show(self) -> None:
        """All of it."""
        self._answers()
        if self.trace.attention is None:
            self._ratios()
        else:
            self._by_layer()
            self._heard()
            self._looks()
        self._curves()
        self._remarks()

    def _answers(self) -> None:
        for row, (text, reason) in enumerate(
            zip(self.trace.answers, self.trace.reasons, strict=True)
        ):
            line = Text.assemble(heading(row, len(self.trace.words[row]), reason), " · ")
            room = self.console.width - line.cell_len
            said = harmless_line(text)
            # An answer's end says more than its beginning.
            line.append(said if len(said) <= room else f"…{said[1 - room :]}")
            line.truncate(self.console.width)
            self.console.print(line)

    def _by_layer(self) -> None:
        trace = self.trace
        shares = trace.to_others()
        means = np.nanmean(shares, axis=2)
        scale = scale_of(means)
        self._title("attention to other rows", "by layer, mean over rows and heads", "norm ratio")
        for number, mean, ratio in zip(trace.layers, means, trace.norm_ratios, strict=True):
            line = self._line(f"layer {number}" if number < 10 else f"L {number}")
            line.append_text(self._cells(mean, scale))
            line.append(f" {ratio:>{FIGURE - 1}.2g}")
            self.console.print(line)
        self._ruler()
        even = trace.even()
        ends = f"{even.min():.2f} to {even.max():.2f}" if np.ptp(even) else f"{even[0]:.2f}"
        self._legend(scale, f"attention that is even: {ends}")

    def _heard(self) -> None:
        heard = self.trace.heard(self.layer)
        if np.isnan(heard).all():  # a group of one
            return
        scale = scale_of(heard)
        self._title("attention from other rows", f"to each row, {self._layers()}", "mean")
        for row, figures in enumerate(heard.T):
            line = self._line(f"row {row}")
            line.append_text(self._cells(figures, scale))
            mean = "" if np.isnan(figures).all() else f"{np.nanmean(figures):.2f}"
            line.append(f" {mean:>{FIGURE - 1}}")
            self.console.print(line)
        self._ruler()
        self._legend(scale, "blank: the row has ended")

    def _looks(self) -> None:
        looks = self.trace.looks(self.layer)
        width, room = len(looks), self.console.width - LABEL
        scale = scale_of(looks)
        self._title("who looks at whom", f"percent, mean over steps, {self._layers()}")
        size = 4 if 4 * width <= room else 1
        if width > room:
            return self.console.print(f"{width} rows are too many for this terminal; see --html")
        if size > 1:
            numbers = "".join(f"{row:>{size - 1}} " for row in range(width))
            self.console.print(Text(f"{'':{LABEL}}{numbers}".rstrip(), "dim"))
        for row, weights in enumerate(looks):
            line = self._line(f"row {row}")
            for weight in weights:
                said = f"{100 * weight:>{size - 1}.0f} " if size > 1 else scale.digit(weight)
                line.append(said if size > 1 or not self.coloured else " ", self._on(weight, scale))
            self.console.print(line)
        if size == 1:
            self._legend(scale, "")

    def _ratios(self) -> None:
        """Of blocks without attention: a bar a layer."""
        ratios = self.trace.norm_ratios
        self._title("norm ratio", "of what a block adds to what it reads, by layer")
        room = self.console.width - LABEL - FIGURE
        for number, ratio in zip(self.trace.layers, ratios, strict=True):
            line = self._line(f"layer {number}" if number < 10 else f"L {number}")
            bar = "█" * round(room * ratio / max(ratios.max(), 1e-12))
            line.append(f"{bar:{room}} {ratio:>{FIGURE - 1}.2g}")
            self.console.print(line)

    def _curves(self) -> None:
        entropy, agreement = self.trace.mean_entropy(), self.trace.agreement()
        self._title("entropy and agreement", "by step", "mean")
        for name, figures, most in (
            ("entropy", entropy, float(entropy.max())),
            ("agree", agreement, 1.0),
        ):
            line = self._line(name)
            line.append(self._bars(figures, most), "cyan")
            mean = "" if np.isnan(figures).all() else f"{np.nanmean(figures):.2f}"
            line.append(f" {mean:>{FIGURE - 1}}")
            self.console.print(line)
        self._ruler()

    def _remarks(self) -> None:
        self.console.print()
        for line in remarks(self.trace):
            self.console.print(Text(line, "dim"))

    def _title(self, title: str, what: str, right: str = "") -> None:
        self.console.print()
        line = Text.assemble((title, "bold"), (f" · {what}", "dim"))
        gap = LABEL + self.cells * self.wide + FIGURE - line.cell_len - len(right)
        if right and gap < 1:  # the curves are short: it stands above its figures all the same
            gap = 1
        line.append(" " * max(gap, 0) + right, "dim")
        line.truncate(self.console.width)
        self.console.print(line)

    def _line(self, label: str) -> Text:
        return Text(f"{label:{LABEL}}")

    def _binned(self, figures: Float[np.ndarray, " T"]) -> list[float]:
        """A figure a column: the mean of its steps, without those that have none."""
        parts = (figures[i : i + self.each] for i in range(0, len(figures), self.each))
        return [float("nan") if np.isnan(p).all() else float(np.nanmean(p)) for p in parts]

    def _cells(self, figures: Float[np.ndarray, " T"], scale: Scale) -> Text:
        cells = Text()
        for value in self._binned(figures):
            said = " " if self.coloured else scale.digit(value)
            cells.append(said * self.wide, self._on(value, scale))
        return cells

    def _on(self, value: float, scale: Scale) -> Style:
        """A background, and letters that can be read on it."""
        if np.isnan(value) or not self.coloured:
            return Style()
        colour = scale.colour(value)
        ink = "#000000" if is_bright(colour) else "#ffffff"
        r, g, b = colour
        return Style(color=ink, bgcolor=f"#{r:02x}{g:02x}{b:02x}")

    def _bars(self, figures: Float[np.ndarray, " T"], most: float) -> str:
        def bar(value: float) -> str:
            said = " " if np.isnan(value) else BARS[round(value / max(most, 1e-12) * 7)]
            return said * self.wide

        return "".join(map(bar, self._binned(figures)))

    def _ruler(self) -> None:
        """Numbers of steps, every ten cells, or five wide ones."""
        every = 10 if self.wide == 1 else 5
        places = range(0, self.cells, every)
        marks = "".join(f"{i * self.each:<{every * self.wide}}" for i in places).rstrip()
        self.console.print(Text(f"{'step':{LABEL}}{marks}", "dim"))

    def _legend(self, scale: Scale, note: str) -> None:
        line = self._line("")
        line.append(f"{scale.low:.2f} ")
        for i in range(10):
            value = scale.low + (i + 0.5) / 10 * (scale.high - scale.low)
            line.append(" " if self.coloured else scale.digit(value), self._on(value, scale))
        line.append(f" {scale.high:.2f}")
        line.append(f" · {note}" if note else "", "dim")
        self.console.print(line)

    def _layers(self) -> str:
        if self.layer is not None:
            return f"layer {self.layer}"
        return "mean over layers"


def remarks(trace: Trace) -> list[str]:
    """What the figures mean, and what should be known of them, a sentence each."""
    alike, start = trace.diversity(), trace.agree_from()
    said = [f"{alike.distinct} of {alike.answers} answers are distinct"]
    if alike.edit_distance is not None:
        said.append(
            f"two differ by {alike.edit_distance:.1f} token edits ({alike.edit_share:.0%} of the "
            "longer) in the mean"
        )
    for n, share in enumerate((alike.distinct_1, alike.distinct_2), 1):
        said += [] if share is None else [f"distinct-{n} is {share:.2f}"]
    lines = ["; ".join(said) + "."]
    if trace.width > 1:
        lines.append(
            f"From step {start} on (the last is {trace.steps - 1}),"
            if start is not None
            else "There is no step from which on"
        )
        lines[-1] += " at least half of the rows, and two or more, say the same token."
    greedy = " (answers are greedy; this is of the softmax)" if trace.greedy else ""
    lines.append(f"Entropy is in nats, of what tokens are drawn from{greedy}.")
    if trace.kind != "attention":
        lines.append("P-Match blocks (kind mlp) read no other rows: there is no attention to show.")
    elif not trace.norm_ratios.any():
        lines.append("All norm ratios are 0: these blocks add nothing yet, as fresh ones do not.")
    return lines
