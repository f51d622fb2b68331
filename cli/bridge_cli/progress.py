"""Bars on stderr for what takes long: of bytes and their rate, and of steps.

Nothing shows where stderr is no terminal, or where a command is to be quiet.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

LATE = 1.0  # seconds of work before a late bar is shown


@contextmanager
def byte_bar(quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Gives the function to call with the bytes done and their total; before its first call the bar
    says that something is read."""
    from rich.progress import DownloadColumn, TransferSpeedColumn

    with _bar(quiet, DownloadColumn(), TransferSpeedColumn()) as bar:
        task = bar.add_task("reading", total=None)

        def update(done: int, total: int) -> None:
            bar.update(task, description="writing", completed=done, total=total)

        yield update


@contextmanager
def late_bar(name: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Gives the function to call with what is done and of how much; the bar is shown for what takes
    longer than a second."""
    from rich.progress import TaskProgressColumn

    bar = _bar(quiet, TaskProgressColumn())
    task, began = bar.add_task(name), time.monotonic()

    def update(done: int, total: int) -> None:
        if not bar.live.is_started and time.monotonic() - began > LATE:
            bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield update
    finally:
        bar.stop()


def _bar(quiet: bool, *columns: "ProgressColumn") -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    # Not stderr=True: where the output of other libraries is hidden, the bar is not.
    console = Console(file=sys.stderr)
    quiet = quiet or not sys.stderr.isatty()
    shown = (TextColumn("{task.description}"), BarColumn(), *columns)
    return Progress(*shown, console=console, transient=True, disable=quiet)
