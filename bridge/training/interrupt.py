"""Ctrl-C: the first ends a run as soon as nothing is lost, the second ends the process at once.

Where what is being done may be dropped and done again, that is now; elsewhere it is an order to
stop at the next boundary. Only the main thread hears signals; elsewhere nothing is changed.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self


class Stopped(KeyboardInterrupt):
    """Ctrl-C was heard, and nothing is half done."""


class Interrupt:
    """A context manager; `asked` turns true at the first Ctrl-C within it."""

    def __init__(self, told: Callable[[], object] = lambda: None) -> None:
        """`told` is called at a first Ctrl-C that has to wait for a boundary."""
        self.asked, self.told, self.droppable = False, told, False

    def __enter__(self) -> Self:
        self.mine = threading.current_thread() is threading.main_thread()
        if self.mine:
            self.before = signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        if self.mine:
            signal.signal(signal.SIGINT, self.before)

    def boundary(self) -> None:
        """Nothing is half done here: raises Stopped if Ctrl-C was heard."""
        if self.asked:
            raise Stopped

    @contextmanager
    def dropping(self) -> Iterator[None]:
        """What is done within can be done again: Ctrl-C raises Stopped there, wherever it is."""
        self.droppable = True
        try:
            self.boundary()
            yield
            self.boundary()  # a callback may have swallowed it
        finally:
            self.droppable = False

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if self.droppable:
            raise Stopped
        self.told()
