"""What the synthetic tasks share: problems drawn from Philox, splits by a hash, a few words.

A problem is the first of the draws of (task, seed, split, number) whose prompt the hash puts into
that split: no prompt is in two splits, whatever the seed. They are small enough for a model of a
laptop, and know how one who tries at random would answer. No network, no file.
"""

from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from operator import index
from typing import Any, ClassVar, SupportsIndex

import numpy as np
from jaxtyping import UInt32

from bridge.errors import BridgeError, show
from bridge.philox import philox4x32
from bridge.tasks.problem import SPLITS, Problem, check_number

OPERATORS = "+-*"
STREAM = 4  # fourth word of the counter; sampling has 0, fresh blocks 1, training 2 and 3
SHARE = {"train": range(0, 8), "validation": range(8, 9), "test": range(9, 10)}  # tenths


class Synthetic:
    """A task of endless problems; a kind of task says what one is, and what a response is worth.

    A correct answer scores 1, any other text 0.
    """

    purpose: ClassVar[int]  # one a kind of task: none draws what another does
    name: str
    seed: int
    # A response to learn from: of a problem, a random generator, and options of the kind of task;
    # `lucky`: one that comes to a right answer.
    demonstrate: Callable[..., str]

    def draw(self, words: UInt32[np.ndarray, "4"]) -> tuple[str, Mapping[str, Any]]:
        """The prompt and the metadata of a problem, from random words."""
        raise NotImplementedError

    def read_answer(self, response: str) -> str | None:
        """What the response votes for; None where it gives no answer."""
        raise NotImplementedError

    def score(self, problem: Problem, response: str) -> float:
        """1 where the answer is right."""
        raise NotImplementedError

    def vocabulary(self) -> list[str]:
        """Every word that a prompt or a response is made of."""
        raise NotImplementedError

    def size(self, split: str) -> int | None:
        """Endless: the problems of a split come again."""
        return None

    def problem(self, split: str, number: int) -> Problem:
        """Problem `number` of a split: the first that belongs to it, of draws from
        (seed, split, number)."""
        check_number(self.name, None, split, number)
        attempt = 0
        while True:
            prompt, given = self.draw(self.words(attempt, number, SPLITS.index(split)))
            digest = sha256(prompt.encode()).digest()
            if int.from_bytes(digest[:4], "big") % 10 in SHARE[split]:
                return Problem(number, prompt, None, given)
            attempt += 1

    def words(self, first: Any, second: Any, third: int) -> UInt32[np.ndarray, "... 4"]:
        """Random words of this kind of task and its seed; `third` is below 256."""
        return philox4x32((first, second, third | self.purpose << 8, STREAM), self.seed)


def whole(name: str, value: Any, low: int = 0, high: int = 2**64 - 1) -> int:
    """An option that is a whole number in low..high; unless given, any seed (clause 6.1). Raises
    BridgeError for anything else."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise BridgeError(f"{name} must be a whole number in {low}..{high}, not {show(value)}")
    number = index(value)
    if not low <= number <= high:
        raise BridgeError(f"{name} must be in {low}..{high}, not {show(number)}")
    return number


def left_to_right(numbers: Sequence[int], operators: Sequence[str], modulus: int) -> list[int]:
    """What each operator comes to, from left to right, modulo m."""
    found, value = [], numbers[0]
    for operator, number in zip(operators, numbers[1:], strict=True):
        value = apply(value, operator, number, modulus)
        found.append(value)
    return found


def apply(value: int, operator: str, number: int, modulus: int) -> int:
    """One step modulo m."""
    match operator:
        case "+":
            value += number
        case "-":
            value -= number
        case _:
            value *= number
    return value % modulus


def digits(word: int, base: int, count: int) -> list[int]:
    """The lowest `count` digits of a random word, the lowest first."""
    found = []
    for _ in range(count):
        word, digit = divmod(word, base)
        found.append(digit)
    return found


def number_after(response: str, mark: str, below: int) -> str | None:
    """What stands after the last `mark`; None where that is no number from 0 to `below` - 1."""
    _, found, said = response.rpartition(mark)
    answer = said.strip()
    return answer if found and answer in map(str, range(below)) else None
