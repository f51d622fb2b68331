"""A run as it is watched: a few lines that stay in place on a terminal, else a line a step."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bridge_cli.text import harmless_line

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

FIGURES = {  # of a step's record, with how they are written
    "reward_mean": "reward {:.3f}",
    "accuracy": "accuracy {:.1%}",
    "loss": "loss {:.4f}",
    "length_mean": "length {:.1f}",
    "entropy": "entropy {:.3f}",
    "clip_fraction": "clipped {:.1%}",
    "kl": "KL {:.4f}",
    "grad_norm": "gradient {:.3f}",
    "logprob_gap": "gap {:.1e}",
    "lr": "lr {:.2e}",
    "norm_ratio": "norm ratio {:.3g}",
}
RECENT = 20  # steps whose mean is shown beside the last


@contextmanager
def watching(quiet: bool) -> Iterator["View"]:
    """The view of a run, on stderr; `quiet` shows notes alone."""
    from rich.console import Console
    from rich.live import Live

    console = Console(file=sys.stderr, highlight=False)
    if quiet or not console.is_terminal:
        yield View(None, quiet)
        return
    with Live(console=console, refresh_per_second=4, transient=False) as live:
        view = View(live, quiet)
        yield view


class View:
    """A `bridge.training.watch.Watcher`."""

    def __init__(self, live: "Live | None", quiet: bool) -> None:
        self.live, self.quiet = live, quiet
        self.first = self.total = self.done = 0
        self.now, self.began = "loading", time.monotonic()
        self.records: list[Mapping[str, Any]] = []
        self.evaluation = ""
        self.bad = 0

    def started(self, first: int, total: int) -> None:
        self.first, self.done, self.total = first, first, total
        self.began = time.monotonic()
        self._draw()

    def phase(self, name: str) -> None:
        self.now = name
        self._draw()

    def sampled(self, done: int, total: int, correct: int) -> None:
        self.now = f"sampled {done} of {total} problems, {correct} responses correct"
        self._draw()
        if self.live is None:
            self._say(self.now)

    def record(self, record: Mapping[str, Any]) -> None:
        if record.get("bad_rewards"):
            if not self.bad:
                self.note(f"a reward failed and counts as 0: {record['bad_reward']}")
            self.bad += record["bad_rewards"]
        if record["kind"] == "evaluation":
            self.evaluation = (
                f"step {record['step']}: accuracy {record['accuracy']:.1%}, reward "
                f"{record['reward_mean']:.3f} on {record['problems']} validation problems"
            )
            if self.live is None:
                self._say(f"evaluation, {self.evaluation}")
        else:
            self.records = [*self.records[1 - RECENT :], record]
            self.done = record["step"]
            if self.live is None:
                figures = [line.format(record[k]) for k, line in FIGURES.items() if _has(record, k)]
                self._say(f"step {self.done}/{self.total}, {', '.join(figures)}, {self._left()}")
        self._draw()

    def note(self, text: str) -> None:
        """A line of its own."""
        if self.live is None:
            print(harmless_line(text), file=sys.stderr)
        else:
            self.live.console.print(harmless_line(text))

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(harmless_line(text), file=sys.stderr, flush=True)

    def _left(self) -> str:
        """How long it may take yet."""
        if self.done == self.first:
            return "time left unknown"
        spent = time.monotonic() - self.began
        left = round(spent / (self.done - self.first) * (self.total - self.done))
        return f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"

    def _draw(self) -> None:
        if self.live is not None:
            self.live.update(self._table())

    def _table(self) -> "Table":
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        head = Table(box=None, show_header=False, pad_edge=False)
        bar = ProgressBar(self.total or None, self.done - 0, width=30, pulse=not self.total)
        head.add_row(bar, f"step {self.done} of {self.total or '?'}", self._left(), self.now)
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_row(head)
        if self.records:
            # What is measured each few steps stays in sight as it was last found.
            last = {name: value for record in self.records for name, value in record.items()}
            figures = Table(box=None, pad_edge=False, header_style="bold")
            figures.add_column("")
            chosen = {k: line for k, line in FIGURES.items() if _has(last, k)}
            for line in chosen.values():
                figures.add_column(line.partition(" {")[0], justify="right")
            numbers = {k: "{" + line.partition(" {")[2] for k, line in chosen.items()}
            figures.add_row("last", *(n.format(last[k]) for k, n in numbers.items()))
            figures.add_row(
                f"mean of {len(self.records)}",
                *(n.format(self._mean(k)) for k, n in numbers.items()),
                style="dim",
            )
            table.add_row(figures)
        if self.evaluation:
            table.add_row(f"evaluation, {self.evaluation}")
        if self.bad:
            table.add_row(f"{self.bad} rewards failed and count as 0")
        return table

    def _mean(self, name: str) -> float:
        values = [record[name] for record in self.records if _has(record, name)]
        return sum(values) / len(values)


def _has(record: Mapping[str, Any], name: str) -> bool:
    return isinstance(record.get(name), int | float)
