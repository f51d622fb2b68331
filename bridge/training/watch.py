"""A run and who watches it: what it tells them, where its seconds go, and their Ctrl-C.

The first Ctrl-C ends a run as soon as nothing is lost, the second ends the process at once. Where
what is being done may be dropped and done again, that is now; elsewhere it is an order to stop at
the next boundary. Only the main thread hears signals; elsewhere nothing is changed.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol, Self


class Watcher(Protocol):
    """Hears of a run as it happens; the command line draws it."""

    def started(self, first: int, total: int) -> None:
        """Steps `first` to `total` will be done."""
        ...

    def phase(self, name: str) -> None:
        """Something else is being done from now on: such as rollout, reward, update, save."""
        ...

    def sampled(self, done: int, total: int, correct: int) -> None:
        """SFT has sampled `done` of `total` problems, and kept `correct` of the responses."""
        ...

    def record(self, record: Mapping[str, Any]) -> None:
        """A record of the log."""
        ...

    def note(self, text: str) -> None:
        """One line that the user should see."""
        ...


class Silent:
    """Nobody watches."""

    def started(self, first: int, total: int) -> None: ...
    def phase(self, name: str) -> None: ...
    def sampled(self, done: int, total: int, correct: int) -> None: ...
    def record(self, record: Mapping[str, Any]) -> None: ...
    def note(self, text: str) -> None: ...


class Phases:
    """A stopwatch: `phase(name)` ends what ran and starts `name`."""

    def __init__(self, watch: Watcher) -> None:
        self.watch = watch
        self.seconds: dict[str, float] = {}
        self.name, self.since = "", time.perf_counter()

    def __call__(self, name: str) -> None:
        now = time.perf_counter()
        if self.name:
            self.seconds[self.name] = self.seconds.get(self.name, 0.0) + now - self.since
        self.name, self.since = name, now
        if name:
            self.watch.phase(name)

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call, as `seconds_NAME`."""
        self("")
        found = {f"seconds_{name}": value for name, value in self.seconds.items()}
        self.seconds = {}
        return found


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
