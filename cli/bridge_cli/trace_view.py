"""A trace on a terminal: answers, heat maps and curves, over the same steps from left to right.

It fits the terminal's width, 80 columns too: where there are more steps than columns, each column
is the mean of a few. Where there are no colours a heat map is made of digits.
"""

import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.style import Style
from rich.text import Text

from bridge.tracing.colours import Scale, scale_of
from bridge.tracing.trace import Trace, layers_shown
from bridge_cli.text import harmless_line
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
        trace, means = self.trace, self.trace.by_layer()
        scale = scale_of(means)
        self._title("attention to other rows", "by layer, mean over rows and heads", "norm ratio")
        for number, mean, ratio in zip(trace.layers, means, trace.norm_ratios, strict=True):
            self._line(_layer(number), self._cells(mean, scale), f"{ratio:.2g}")
        self._numbers()
        even = trace.even()
        ends = f"{even.min():.2f} to {even.max():.2f}" if np.ptp(even) else f"{even[0]:.2f}"
        self._legend(scale, f"attention that is even: {ends}")

    def _heard(self) -> None:
        heard = self.trace.heard(self.layer)
        if np.isnan(heard).all():  # a group of one
            return
        scale = scale_of(heard)
        self._title("attention from other rows", f"to each row, {layers_shown(self.layer)}", "mean")
        for row, figures in enumerate(heard.T):
            self._line(f"row {row}", self._cells(figures, scale), _mean(figures))
        self._numbers()
        self._legend(scale, "blank: the row has ended")

    def _looks(self) -> None:
        looks = self.trace.looks(self.layer)
        width, room = len(looks), self.console.width - LABEL
        scale = scale_of(looks)
        self._title("who looks at whom", f"percent, mean over steps, {layers_shown(self.layer)}")
        if width > room:
            return self.console.print(f"{width} rows are too many for this terminal; see --html")
        size = 4 if 4 * width <= room else 1
        if size > 1:
            numbers = "".join(f"{row:>{size - 1}} " for row in range(width))
            self._dim(f"{'':{LABEL}}{numbers}".rstrip())
        for row, weights in enumerate(looks):
            cells = Text()
            for weight in weights:
                said = f"{100 * weight:>{size - 1}.0f} " if size > 1 else self._digit(weight, scale)
                cells.append(said, self._on(weight, scale))
            self._line(f"row {row}", cells)
        if size == 1:
            self._legend(scale)

    def _ratios(self) -> None:
        """Of blocks without attention: a bar a layer."""
        ratios = self.trace.norm_ratios
        self._title("norm ratio", "of what a block adds to what it reads, by layer")
        room = self.console.width - LABEL - FIGURE
        for number, ratio in zip(self.trace.layers, ratios, strict=True):
            bar = "█" * round(room * ratio / max(ratios.max(), 1e-12))
            self._line(_layer(number), Text(f"{bar:{room}}"), f"{ratio:.2g}")

    def _curves(self) -> None:
        entropy, agreement = self.trace.mean_entropy(), self.trace.agreement()
        self._title("entropy and agreement", "by step", "mean")
        self._line("entropy", self._bars(entropy, float(entropy.max())), _mean(entropy))
        self._line("agree", self._bars(agreement, 1.0), _mean(agreement))
        self._numbers()

    def _remarks(self) -> None:
        self.console.print()
        for line in self.trace.remarks():
            self._dim(line)

    def _title(self, title: str, what: str, right: str = "") -> None:
        self.console.print()
        line = Text.assemble((title, "bold"), (f" · {what}", "dim"))
        gap = LABEL + self.cells * self.wide + FIGURE - line.cell_len - len(right)
        if right and gap < 1:  # the curves are short: it stands above its figures all the same
            gap = 1
        line.append(" " * max(gap, 0) + right, "dim")
        line.truncate(self.console.width)
        self.console.print(line)

    def _line(self, label: str, shown: Text, figure: str | None = None) -> None:
        line = Text(f"{label:{LABEL}}").append_text(shown)
        self.console.print(line if figure is None else line.append(f" {figure:>{FIGURE - 1}}"))

    def _dim(self, line: str) -> None:
        self.console.print(Text(line, "dim"))

    def _binned(self, figures: Float[np.ndarray, " T"]) -> list[float]:
        """A figure a column: the mean of its steps, without those that have none."""
        parts = (figures[i : i + self.each] for i in range(0, len(figures), self.each))
        return [float("nan") if np.isnan(p).all() else float(np.nanmean(p)) for p in parts]

    def _cells(self, figures: Float[np.ndarray, " T"], scale: Scale) -> Text:
        cells = Text()
        for value in self._binned(figures):
            cells.append(self._digit(value, scale) * self.wide, self._on(value, scale))
        return cells

    def _digit(self, value: float, scale: Scale) -> str:
        """What stands in a cell that has no number."""
        return " " if self.coloured else scale.digit(value)

    def _on(self, value: float, scale: Scale) -> Style:
        """A background, and letters that can be read on it."""
        paint = scale.paint(value) if self.coloured else None
        return Style(bgcolor=paint[0], color=paint[1]) if paint else Style()

    def _bars(self, figures: Float[np.ndarray, " T"], most: float) -> Text:
        shares = np.array(self._binned(figures)) / max(most, 1e-12)
        said = (" " if np.isnan(share) else BARS[round(7 * share)] for share in shares)
        return Text("".join(bar * self.wide for bar in said), "cyan")

    def _numbers(self) -> None:
        """Of steps, every ten cells, or five wide ones."""
        every = 10 if self.wide == 1 else 5
        places = range(0, self.cells, every)
        marks = "".join(f"{i * self.each:<{every * self.wide}}" for i in places).rstrip()
        self._dim(f"{'step':{LABEL}}{marks}")

    def _legend(self, scale: Scale, note: str = "") -> None:
        shown = Text(f"{scale.low:.2f} ")
        for i in range(10):
            value = scale.low + (i + 0.5) / 10 * (scale.high - scale.low)
            shown.append(self._digit(value, scale), self._on(value, scale))
        shown.append(f" {scale.high:.2f}").append(f" · {note}" if note else "", "dim")
        self._line("", shown)


def _layer(number: int) -> str:
    return f"layer {number}" if number < 10 else f"L {number}"


def _mean(figures: Float[np.ndarray, " T"]) -> str:
    return "" if np.isnan(figures).all() else f"{np.nanmean(figures):.2f}"
