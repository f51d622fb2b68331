"""A bar of bytes and their rate on stderr, for what writes checkpoints."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def byte_bar(quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Gives the function to call with the bytes done and their total; before its first call the bar
    says that something is read. `quiet`, and no terminal, show nothing."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    # Not stderr=True: where the output of other libraries is hidden, the bar is not.
    console = Console(file=sys.stderr)
    quiet = quiet or not sys.stderr.isatty()
    with Progress(*columns, console=console, transient=True, disable=quiet) as bar:
        task = bar.add_task("reading", total=None)

        def update(done: int, total: int) -> None:
            bar.update(task, description="writing", completed=done, total=total)

        yield update
