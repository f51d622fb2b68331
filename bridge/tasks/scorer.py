"""Scoring that cannot take a run down: a task's rewards in processes of their own, against time.

A reward that raises, hangs, ends its process, eats memory or gives no finite number counts as 0,
with a line that says why, and the next response is scored as if nothing had been. Scores come in
the order asked. They come one after the other from one process that stays, which costs quick
rewards nothing; where one takes long, others begin beside it, each in a process that costs as long
to start as the task takes to import. Where nothing comes in time at all, waiting on is no use.
"""

import pickle
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from types import TracebackType
from typing import Self

from bridge.errors import BridgeError, one_line
from bridge.numbers.machine import available_processors
from bridge.numbers.ranges import RANGES, take
from bridge.processes.parent import Child, ChildLate, ChildLost
from bridge.tasks.problem import Problem, Score, Task

TIME_LIMIT = 10.0
MEMORY = 4 << 30
PATIENCE = 1.0  # seconds without an answer, after which there is one process more
PROCESSES = 8  # at most, and no more than there are cores: rewards must not take each other's time
HOPELESS = (32, 4)  # so many rewards in a row, of so many problems, that took too long


class Scorer:
    """Scores responses to a task's problems; a context manager, since it holds processes."""

    def __init__(
        self,
        task: Task,
        *,
        time_limit: float = TIME_LIMIT,
        memory: int | None = MEMORY,
        processes: int | None = None,
    ) -> None:
        """`time_limit`: seconds that one response may take. `memory`: bytes that scoring one may
        take on top of what the task holds once it is loaded, on Linux; None: no limit. `processes`:
        most at a time; None: as many as there are cores, and at most 8.

        Raises BridgeError for limits that are none, and where the task cannot be loaded in another
        process: it must be of a module that can be imported, not of the script that runs.
        """
        RANGES["reward_seconds"].take("time_limit", time_limit)
        for name, value in (("memory", memory), ("processes", processes)):
            if value is not None:
                take(name, value)
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
        self.most = processes or min(PROCESSES, available_processors())
        self.children: list[Child] = []
        self.late: list[int] = []  # problems of the rewards that took too long, in a row
        self.closed = False
        self._start().ready()

    def score(self, pairs: Sequence[tuple[Problem, str]]) -> list[Score]:
        """One score for each problem and response, in order; no reward's error raises.

        Raises BridgeError where 32 in a row, of 4 problems or more, take too long.
        """
        if self.closed:
            raise ValueError("the scorer is closed")
        scores: dict[int, Score] = {}
        todo = deque(range(len(pairs)))
        asked: dict[Child, int] = {}
        size = max(1, len(self.children))
        try:
            while len(scores) < len(pairs):
                while todo and len(self.children) < size:
                    self._start()
                for child in self.children:
                    while todo and not child.busy:
                        asked[child] = number = todo.popleft()
                        if trouble := self._ask(child, *pairs[number]):
                            scores[number] = trouble
                busy = [child for child in self.children if child.busy]
                slow = bool(todo) and size < self.most and not any(c.starting for c in busy)
                come = _come(busy, PATIENCE if slow else None)
                size += slow and not come
                for child in come:
                    if not child.starting:
                        scores[asked[child]] = self._take(child, pairs[asked[child]][0])
                    elif trouble := self._begun(child):
                        size = max(1, size - 1)
                        if todo and not self.children:
                            scores[todo.popleft()] = trouble
        except BaseException:  # Ctrl-C leaves answers on their way, which the next must not read
            self._end()
            raise
        return [scores[number] for number in range(len(pairs))]

    def close(self) -> None:
        """End the processes; may be called again."""
        self.closed = True
        self._end()

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
        if hasattr(self, "children"):
            with suppress(Exception):  # modules may be gone already
                self.close()

    def _start(self) -> Child:
        self.children.append(
            Child("bridge.tasks.scorer_process:score_with", self.payload, self.memory)
        )
        return self.children[-1]

    def _end(self) -> None:
        while self.children:
            self.children.pop().close()

    def _begun(self, child: Child) -> Score | None:
        """A process has started; what to say of a response where it has not."""
        try:
            child.ready()
        except BridgeError as error:
            self.children.remove(child)
            return Score(0.0, str(error))
        return None

    def _ask(self, child: Child, problem: Problem, response: str) -> Score | None:
        """Have a response scored; its score where that cannot be."""
        try:
            request = pickle.dumps((problem, response))
        except Exception as error:
            return Score(0.0, f"problem {problem.number} cannot be pickled ({one_line(error)})")
        child.begin(request, self.time_limit)
        return None

    def _take(self, child: Child, problem: Problem) -> Score:
        """The score that a child has come to."""
        try:
            answer = child.take().decode("utf-8", "replace")
        except ChildLost as error:
            self.children.remove(child)
            self._hope(problem if isinstance(error, ChildLate) else None)
            return Score(0.0, f"the reward {error}")
        self._hope(None)
        if answer.startswith("!"):
            return Score(0.0, one_line(answer[1:]))
        try:
            return Score(float.fromhex(answer))
        except ValueError:  # not ours: what follows on the line may not be either
            child.close()
            self.children.remove(child)
            return Score(0.0, "the reward wrote into the line to its own process")

    def _hope(self, late: Problem | None) -> None:
        """Count rewards that took too long; any other is a sign that the next may be in time."""
        if late is None:
            self.late.clear()
            return
        self.late.append(late.number)
        rewards, problems = HOPELESS
        if len(self.late) >= rewards and len(set(self.late)) >= problems:
            count = len(self.late)
            self.late.clear()
            raise BridgeError(
                f"{count} rewards in a row took more than {self.time_limit:g} s each; mend the "
                "task, or give a reward more time (reward_seconds), and the same command goes on"
            )


def _come(busy: Sequence[Child], patience: float | None) -> list[Child]:
    """Those that have something to say, or whose time is up; none after `patience` seconds."""
    if not busy:
        return []
    left = max(0.0, min(child.deadline for child in busy) - time.monotonic())
    said = wait([child.line for child in busy], left if patience is None else min(left, patience))
    now = time.monotonic()
    return [child for child in busy if child.line in said or child.deadline <= now]
