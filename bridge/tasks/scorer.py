"""Scoring that cannot take a run down: a task's rewards in a process of their own, against time.

A reward that raises, hangs, ends its process, eats memory or gives no finite number counts as 0,
with a line that says why, and the next response is scored as if nothing had been. Scores come in
the order asked, one after the other, from one process that stays; starting another costs as long as
the task takes to import.
"""

import pickle
from collections.abc import Sequence
from contextlib import suppress
from math import isfinite
from types import TracebackType
from typing import Self

from bridge.errors import BridgeError
from bridge.reading import one_line
from bridge.tasks.child import Child, ChildLost
from bridge.tasks.problem import Problem, Score, Task

TIME_LIMIT = 10.0
MEMORY = 4 << 30


class Scorer:
    """Scores responses to a task's problems; a context manager, since it holds a process."""

    def __init__(
        self, task: Task, *, time_limit: float = TIME_LIMIT, memory: int | None = MEMORY
    ) -> None:
        """`time_limit`: seconds that one response may take. `memory`: bytes that scoring may take
        on top of what the task holds once it is loaded, on Linux; None: no limit.

        Raises BridgeError for limits that are none, and where the task cannot be loaded in another
        process: it must be of a module that can be imported, not of the script that runs.
        """
        if not isfinite(time_limit) or time_limit <= 0:
            raise BridgeError(f"time_limit must be above 0 s, not {time_limit}")
        if memory is not None and memory < 1:
            raise BridgeError(f"memory must be 1 byte or more, or None, not {memory}")
        if type(task).__module__ == "__main__":
            raise BridgeError(
                f"the task {type(task).__name__} is defined in the script that runs; rewards run in"
                " a process of their own, so put it into a module and import it"
            )
        try:
            self.payload = pickle.dumps(task)
        except Exception as error:
            raise BridgeError(
                f"the task {type(task).__name__} cannot go to the process that scores "
                f"({one_line(error)}); keep out of it what cannot be pickled"
            ) from None
        self.time_limit, self.memory = time_limit, memory
        self.child: Child | None = None
        self.closed = False
        self._start().ready()

    def score(self, pairs: Sequence[tuple[Problem, str]]) -> list[Score]:
        """One score for each problem and response, in order; none raises."""
        if self.closed:
            raise ValueError("the scorer is closed")
        return [self._one(problem, response) for problem, response in pairs]

    def close(self) -> None:
        """End the process; may be called again."""
        self.closed = True
        if self.child is not None:
            self.child.close()
            self.child = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "child"):
            with suppress(Exception):  # modules may be gone already
                self.close()

    def _start(self) -> Child:
        self.child = Child("bridge.tasks.worker:score_with", self.payload, self.memory)
        return self.child

    def _one(self, problem: Problem, response: str) -> Score:
        try:
            request = pickle.dumps((problem, response))
        except Exception as error:
            return Score(0.0, f"problem {problem.number} cannot be pickled ({one_line(error)})")
        child = self.child or self._start()
        try:
            answer = child.ask(request, self.time_limit).decode("utf-8", "replace")
        except (ChildLost, BridgeError) as error:
            self.child = None
            reason = f"the reward {error}" if isinstance(error, ChildLost) else str(error)
            return Score(0.0, reason)
        except BaseException:  # Ctrl-C: the child is closed already
            self.child = None
            raise
        if answer.startswith("!"):
            return Score(0.0, one_line(answer[1:]))
        try:
            return Score(float.fromhex(answer))
        except ValueError:  # not ours: what follows on the line may not be either
            self.child = child.close()
            return Score(0.0, "the reward wrote into the line to its own process")
