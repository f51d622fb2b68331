"""The live view of a group: its answers side by side as they grow, or stacked where it is narrow.

A view is told of events and draws itself; it knows nothing of models. Text of a model is shown as
it is, never as markup, and cannot steer the terminal.
"""

from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from bridge.decoding.events import Event, Finished, Started, Token
from bridge_cli.text import harmless

COLUMN = 30  # characters below which a column is no pleasure to read
PANEL = 5  # lines of a panel, its frame included, below which rows are listed, a line each
COLOURS = {"": "cyan", "eos": "green", "stop": "green", "length": "yellow"}  # by how a row ended


@dataclass
class Row:
    """One answer so far."""

    prompt: int
    number: int
    text: str = ""
    tokens: int = 0
    reason: str = ""

    def title(self) -> Text:
        """Its number, tokens and state."""
        return heading(self.number, self.tokens, self.reason)


def heading(row: int, tokens: int, reason: str) -> Text:
    """What stands over an answer; `reason` is a finish reason, or empty while it runs."""
    state = (reason or "running", COLOURS.get(reason, ""))
    return Text.assemble(f"row {row} · {tokens} token{'s' * (tokens != 1)} · ", state)


class View:
    """All rows of all prompts, in order; shows those of the earliest prompts still running."""

    def __init__(self, widths: list[int]) -> None:
        self.rows = [Row(g, n) for g, width in enumerate(widths) for n in range(width)]
        self.at = {(row.prompt, row.number): row for row in self.rows}
        self.started = len(widths)  # prompts that have been read, the first ones
        self.widths = widths

    def take(self, event: Event) -> None:
        """Note one event."""
        if isinstance(event, Started):
            self.started = event.first_prompt + len(event.prompt_tokens)
        elif isinstance(event, Token):
            row = self.at[event.prompt, event.row]
            row.text += harmless(event.text)
            row.tokens += 1
        elif isinstance(event, Finished):
            row = self.at[event.prompt, event.row]
            row.reason = event.reason
            row.text += harmless(event.text)
            row.tokens += event.reason == "eos"  # which is no Token event

    def shown(self) -> list[Row]:
        """The rows of the prompt to look at: the first that is read and not done, else the last."""
        running = [row.prompt for row in self.rows if not row.reason and row.prompt < self.started]
        prompt = running[0] if running else self.started - 1
        return [row for row in self.rows if row.prompt == prompt]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rows = self.shown()
        height = max(1, (options.height or console.height) - 2)
        columns = arrange(len(rows), options.max_width)
        lines = height // -(-len(rows) // columns)
        yield self._status(rows, options.max_width)
        if lines >= PANEL and options.max_width >= COLUMN:
            yield _grid(rows, columns, options.max_width // columns, lines, console)
        else:
            yield Group(*(_line(row, options.max_width) for row in rows[:height]))

    def progress(self) -> Text:
        """How far all rows are, in a line."""
        done = sum(bool(row.reason) for row in self.rows)
        tokens = sum(row.tokens for row in self.rows)
        return Text(f"{done} of {len(self.rows)} answers done · {tokens} tokens", "dim")

    def _status(self, rows: list[Row], width: int) -> Text:
        status = self.progress()
        if len(self.widths) > 1:
            status = Text.assemble(f"prompt {rows[0].prompt + 1} of {len(self.widths)} · ", status)
        status.truncate(width)
        return status


def arrange(rows: int, width: int) -> int:
    """Columns for so many rows of text: as many as are pleasant to read, evenly filled."""
    fit = max(1, min(rows, width // COLUMN))
    return -(-rows // -(-rows // fit))


def _grid(rows: list[Row], columns: int, width: int, lines: int, console: Console) -> Table:
    grid = Table.grid(expand=False)
    for _ in range(columns):
        grid.add_column(width=width)
    cells = [_panel(row, width, lines, console) for row in rows]
    for start in range(0, len(cells), columns):
        grid.add_row(*cells[start : start + columns])
    return grid


def _panel(row: Row, width: int, lines: int, console: Console) -> Panel:
    """The tail of an answer in a frame."""
    room = lines - 2
    tail = Text(recent(row.text, room * width)).wrap(console, width - 4)[-room:]
    body = Text("\n").join(tail)
    return Panel(body, title=row.title(), title_align="left", width=width, height=lines)


def recent(text: str, size: int) -> str:
    """The last characters, at least `size` where there are as many.

    It starts at multiples of `size`: from one token to the next lines break at the same places.
    """
    return text[max(0, len(text) // size - 1) * size :]


def _line(row: Row, width: int) -> Text:
    """An answer in one line: its state, and its last words."""
    line = row.title()
    line.append(" · ")
    words = " ".join(row.text[-4 * width :].split())
    room = max(0, width - line.cell_len)
    words = words[len(words) - room :] if len(words) > room else words
    while cell_len(words) > room:  # characters may be two cells wide
        words = words[1:]
    line.append(words)
    line.truncate(width)
    return line
