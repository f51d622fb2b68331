"""What a task is: numbered problems in three splits, and a score for each response.

A problem is a function of task, split and number alone, so that whoever resumes or compares asks
the same. Nothing here knows models or tokens; whoever scores does it through a `Scorer`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from bridge.errors import BridgeError
from bridge.numbers.ranges import take
from bridge.text.chat import Message

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Problem:
    """One question. `answer` is what a correct response ends in, where there is one such text."""

    number: int  # within its split
    prompt: str | list[Message]  # text, or the messages of a chat
    answer: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """What a response is worth: finite, and 0 with the reason where it could not be scored."""

    value: float
    problem: str | None = None  # one line


@runtime_checkable
class Task(Protocol):
    """Where problems come from, and what responses are worth.

    A task may also have a `threshold`, the score from which on a response counts as correct; one
    without has 1.
    """

    name: str

    def size(self, split: str) -> int | None:
        """How many problems a split has; None: it is endless."""
        ...

    def problem(self, split: str, number: int) -> Problem:
        """Problem `number`, from 0, of a split: always the same, and in no other split.

        Raises BridgeError for an unknown split and a number outside of it.
        """
        ...

    def score(self, problem: Problem, response: str) -> float:
        """1 for a correct response; may be anything finite. It may also be slow, raise or worse:
        only a `Scorer` calls it."""
        ...

    def read_answer(self, response: str) -> str | None:
        """What the response votes for; None: it gives no answer. Quick, and never raises."""
        ...


class Scores(Protocol):
    """Who scores responses: a `Scorer`, or what stands in for it."""

    def score(self, pairs: Sequence[tuple[Problem, str]]) -> Sequence[Score]:
        """One score for each problem and response, in order; a reward that fails is one of 0 with
        its reason."""
        ...


def check_number(name: str, size: int | None, split: str, number: int) -> None:
    """Raise BridgeError unless a split is known and has a problem of that number."""
    check_split(split)
    if number < 0 or (size is not None and number >= size):
        has = f"0..{size - 1}" if size else "none" if size == 0 else "0 and above"
        raise BridgeError(f"{name}: problem {number} of {split} is not there (has: {has})")


def check_split(split: str) -> None:
    """Raise BridgeError unless a split is one of the three."""
    if split not in SPLITS:
        raise BridgeError(f"split {split!r} is not known; use one of {', '.join(SPLITS)}")


def check_threshold(threshold: Any) -> float:
    """The score from which on a response is correct. Raises BridgeError unless it is a number."""
    return take("threshold", threshold)
