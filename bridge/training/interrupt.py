"""Ctrl-C: the first is an order to save at the next boundary, the second ends the process at once.

Only the main thread hears signals; elsewhere nothing is changed.
"""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Self


class Interrupt:
    """A context manager; `asked` turns true at the first Ctrl-C within it."""

    def __init__(self, told: Callable[[], object] = lambda: None) -> None:
        """`told` is called at the first Ctrl-C."""
        self.asked, self.told = False, told

    def __enter__(self) -> Self:
        self.mine = threading.current_thread() is threading.main_thread()
        if self.mine:
            self.before = signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        if self.mine:
            signal.signal(signal.SIGINT, self.before)

    def boundary(self) -> None:
        """Nothing is half done here: raises KeyboardInterrupt if Ctrl-C was heard."""
        if self.asked:
            raise KeyboardInterrupt

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.told()
