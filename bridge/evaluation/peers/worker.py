"""An engine's process, as the run holds it: started, asked, and ended."""

import json
from dataclasses import asdict
from typing import Any

from bridge.errors import BridgeError
from bridge.evaluation.peers.engine import Call, Decoded, Setup
from bridge.evaluation.peers.limit import Limit
from bridge.processes.parent import Child, ChildLost

ROOM = "bridge.evaluation.peers"
LOADING = 1800.0  # seconds, also for a large model from a slow disk
MEASURING = 60.0  # seconds, for the machine's limits


class EngineFailed(Exception):
    """An engine did not do what it was asked, and why, in one line."""


class Worker:
    """An entry in its process, which sleeps unless it is asked."""

    def __init__(self, setup: Setup) -> None:
        """Start it, and load the engine. Raises EngineFailed, and leaves no process behind."""
        self.setup = setup
        if setup.entry.prepares:
            self._start()
            try:
                self._ask(LOADING, do="prepare")
            finally:
                self.close()  # a converter leaves frameworks and copies of weights behind
        self._start()
        try:
            self._ask(LOADING, do="load")
        except BaseException:
            self.close()
            raise

    def decode(self, call: Call, limit: float) -> Decoded:
        """One call, within `limit` seconds. Raises EngineFailed."""
        return Decoded(**self._ask(limit, do="decode", call=asdict(call)))

    @property
    def closed(self) -> bool:
        """Whether its process has ended."""
        return self.child.closed

    def close(self) -> None:
        """End it; may be called again."""
        self.child.close()

    def _start(self) -> None:
        payload = json.dumps(self.setup.to_json()).encode()
        self.child = Child(f"{ROOM}.engine_process:serve", payload, what="the engine")

    def _ask(self, limit: float, **question: Any) -> dict[str, Any]:
        try:
            answer = json.loads(self.child.ask(json.dumps(question).encode(), limit))
        except ChildLost as error:
            raise EngineFailed(f"it {error}") from None
        except BridgeError as error:
            raise EngineFailed(str(error)) from None
        if "error" in answer:
            raise EngineFailed(answer["error"])
        return answer


class Rates:
    """The machine's limits, measured in a process of their own; the best seen counts."""

    def __init__(self, device: str, threads: int) -> None:
        self.device = device
        self.child = Child(f"{ROOM}.limit_process:serve", str(threads).encode(), what="the limit")
        self.best: Limit | None = None

    def look(self) -> Limit | None:
        """Measure once more; the limit so far, None where it could not be measured."""
        try:
            seen = Limit(**json.loads(self.child.ask(self.device.encode(), MEASURING)))
        except (ChildLost, BridgeError):
            return self.best
        if self.best is not None:
            seen = Limit(max(seen.bandwidth, self.best.bandwidth), max(seen.rate, self.best.rate))
        self.best = seen
        return seen

    def close(self) -> None:
        """End its process."""
        self.child.close()
