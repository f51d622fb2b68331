"""Operator search: puzzles that are solved by trying, small enough for a model of a laptop.

Given numbers and a target, find an operator of + - * between each two, such that, from left to
right, ((a o b) o c) o d = t modulo m:

    prompt     3 5 2 7 = 11 ?
    response   + - * 8 6 4 no * + - 15 17 10 no ! + + -

A response may write out trials, each with its intermediate values and a verdict; what counts is the
answer after its last `!`. One trial is as good as another, so rows that try different operators and
see each other's verdicts know more than any of them alone. It has no network, no file and no
option that changes which split a puzzle is in.
"""

from collections.abc import Sequence
from hashlib import sha256
from itertools import product
from typing import NamedTuple

import numpy as np

from bridge.errors import BridgeError
from bridge.philox import philox4x32
from bridge.tasks.problem import SPLITS, Problem, check_number

OPERATORS = "+-*"
STREAM = 4  # fourth word of the counter; sampling has 0, fresh blocks 1, training 2 and 3
SHARE = {"train": range(0, 8), "validation": range(8, 9), "test": range(9, 10)}  # tenths


class Puzzle(NamedTuple):
    """Numbers from 1 to 9, and what they must come to."""

    numbers: tuple[int, ...]
    target: int

    @property
    def prompt(self) -> str:
        """As a model reads it."""
        return f"{' '.join(map(str, self.numbers))} = {self.target} ?"


class OperatorSearch:
    """The task, for one length and one modulus. A correct answer scores 1, any other text 0."""

    def __init__(self, numbers: int = 4, modulus: int = 19, seed: int = 0) -> None:
        """`numbers` a puzzle. `seed`: another one gives other puzzles, of the same splits."""
        if not 2 <= numbers <= 6:
            raise BridgeError(f"numbers must be in 2..6, not {numbers}")
        if not 5 <= modulus <= 97:
            raise BridgeError(f"modulus must be in 5..97, not {modulus}")
        self.numbers, self.modulus, self.seed = numbers, modulus, seed
        self.name = f"operator-search-{numbers}-mod-{modulus}"

    def size(self, split: str) -> int | None:
        """Endless: the puzzles of a split come again."""
        return None

    def problem(self, split: str, number: int) -> Problem:
        """Puzzle `number` of a split: the first that belongs to it, of draws from
        (seed, split, number)."""
        check_number(self.name, None, split, number)
        attempt = 0
        while True:
            puzzle = self._draw(attempt, number, SPLITS.index(split))
            digest = sha256(puzzle.prompt.encode()).digest()
            if int.from_bytes(digest[:4], "big") % 10 in SHARE[split]:
                break
            attempt += 1
        given = {"numbers": list(puzzle.numbers), "target": puzzle.target}
        return Problem(number, puzzle.prompt, None, given)

    def _draw(self, attempt: int, number: int, split: int) -> Puzzle:
        words = philox4x32((attempt, number, split, STREAM), self.seed).reshape(-1)
        numbers, code = [], int(words[0])
        for _ in range(self.numbers):
            code, digit = divmod(code, 9)
            numbers.append(digit + 1)
        chosen = self.candidates()[int(words[1]) % 3 ** (self.numbers - 1)]
        return Puzzle(tuple(numbers), self.values(numbers, chosen)[-1])

    def candidates(self) -> list[str]:
        """Every choice of operators: all that there is to try."""
        return ["".join(chosen) for chosen in product(OPERATORS, repeat=self.numbers - 1)]

    def values(self, numbers: Sequence[int], operators: str) -> list[int]:
        """What each operator comes to, from left to right, modulo m."""
        found, value = [], numbers[0]
        for operator, number in zip(operators, numbers[1:], strict=True):
            match operator:
                case "+":
                    value += number
                case "-":
                    value -= number
                case _:
                    value *= number
            value %= self.modulus
            found.append(value)
        return found

    def read_answer(self, response: str) -> str | None:
        """The operators after the last `!`, without spaces; None where they are not all there."""
        _, mark, said = response.rpartition("!")
        answer = "".join(said.split())
        complete = len(answer) == self.numbers - 1 and set(answer) <= set(OPERATORS)
        return answer if mark and complete else None

    def score(self, problem: Problem, response: str) -> float:
        """1 where the answer comes to the target."""
        answer, given = self.read_answer(response), problem.metadata
        return float(
            answer is not None and self.values(given["numbers"], answer)[-1] == given["target"]
        )

    def demonstrate(
        self, problem: Problem, trials: int, rng: np.random.Generator, lucky: bool = False
    ) -> str:
        """A response as one who tries at random gives it: `trials` different trials, then the
        first that came out right, or else a guess that was not among them. `lucky`: one trial,
        whichever, does come out right."""
        numbers, target = problem.metadata["numbers"], problem.metadata["target"]
        order = [self.candidates()[i] for i in rng.permutation(3 ** (self.numbers - 1))]
        if lucky:
            solved = [i for i, o in enumerate(order) if self.values(numbers, o)[-1] == target]
            here, there = int(rng.integers(trials)), solved[0]
            order[here], order[there] = order[there], order[here]
        words: list[object] = []
        answer = order[trials]
        for operators in reversed(order[:trials]):
            values = self.values(numbers, operators)
            right = values[-1] == target
            answer = operators if right else answer
            words = [*operators, *values, "yes" if right else "no", *words]
        return " ".join(map(str, [*words, "!", *answer]))

    def vocabulary(self) -> list[str]:
        """Every word that a prompt or a response is made of."""
        return [*map(str, range(max(10, self.modulus))), *OPERATORS, "=", "?", "yes", "no", "!"]


def operator_search(numbers: int = 4, modulus: int = 19, seed: int = 0) -> OperatorSearch:
    """The task by name: `bridge.tasks.search:operator_search`."""
    return OperatorSearch(numbers, modulus, seed)
