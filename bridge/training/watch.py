"""What a run tells whoever watches it, and where its seconds go."""

import time
from collections.abc import Mapping
from typing import Any, Protocol


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
