"""A task for tiny random models, which say random bytes: some responses are right, and many agree.

The scorer works within the process, and can be told to die, as a process that is killed does.
"""

import os
import signal
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Problem:
    number: int
    prompt: Any
    answer: str | None
    metadata: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    value: float
    problem: str | None = None


class ToyTask:
    """A response answers with its first character's class; problem p asks for class p % 3."""

    name = "toy"

    def __init__(self, size=12, ask="what is {} of three?"):
        self.many, self.ask = size, ask

    def size(self, split):
        return self.many

    def problem(self, split, number):
        return Problem(number, self.ask.format(number) + "!" * (number % 4), str(number % 3))

    def read_answer(self, response):
        return str(ord(response[0]) % 3) if response else None

    def score(self, problem, response):
        return float(self.read_answer(response) == problem.answer)


class ToyScorer:
    """Scores by the task; dies without a word when the `kill_at`-th batch is to be scored."""

    def __init__(self, task, kill_at=None):
        self.task, self.kill_at, self.batches = task, kill_at, []

    def score(self, pairs):
        if len(self.batches) == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.batches.append([problem.number for problem, _ in pairs])
        return [Score(self.task.score(problem, response)) for problem, response in pairs]
