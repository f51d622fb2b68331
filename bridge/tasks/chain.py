"""Chains of arithmetic: no search, but steps that can go wrong, each on top of the one before.

From left to right, modulo m; a response writes what each step comes to, and the last value again:

    prompt     3 * 5 - 9 + 2 * 7 ?
    response   15 6 8 18 ! 18

It is the counterpart of the tasks of trial and error: there, what one row has found is news to the
others; here a row that makes no slip needs nobody. Rows that see each other could still correct
one that has slipped, since they seldom slip at the same step.
"""

from typing import Any

import numpy as np

from bridge.tasks.problem import Problem
from bridge.tasks.synthetic import (
    OPERATORS,
    Synthetic,
    apply,
    digits,
    left_to_right,
    number_after,
    whole,
)


class Chain(Synthetic):
    """The task, for a number of steps. The right last value scores 1, any other text 0."""

    purpose = 2

    def __init__(self, steps: int = 6, modulus: int = 19, seed: int = 0) -> None:
        """`steps` of a chain. `seed`: another one gives other chains, of the same splits."""
        self.steps = whole("steps", steps, 2, 9)
        self.modulus = whole("modulus", modulus, 5, 97)
        self.seed = whole("seed", seed)
        self.name = f"chain-{self.steps}-mod-{self.modulus}"

    def draw(self, words: np.ndarray) -> tuple[str, dict[str, Any]]:
        """Numbers from 1 to 9, and an operator between each two."""
        first, *others = (digit + 1 for digit in digits(int(words[0]), 9, self.steps + 1))
        operators = [OPERATORS[digit] for digit in digits(int(words[1]), 3, self.steps)]
        said = [first, *(w for pair in zip(operators, others, strict=True) for w in pair), "?"]
        given = {"numbers": [first, *others], "operators": "".join(operators)}
        return " ".join(map(str, said)), given

    def values(self, problem: Problem) -> list[int]:
        """What each step comes to."""
        given = problem.metadata
        return left_to_right(given["numbers"], given["operators"], self.modulus)

    def read_answer(self, response: str) -> str | None:
        """The word after the last `!`; None where that is no value."""
        return number_after(response, "!", self.modulus)

    def score(self, problem: Problem, response: str) -> float:
        """1 where the answer is the last value."""
        return float(self.read_answer(response) == str(self.values(problem)[-1]))

    def demonstrate(
        self, problem: Problem, slip: float, rng: np.random.Generator, lucky: bool = False
    ) -> str:
        """A response as a careless one gives it: each step comes to some other value with
        probability `slip`, and the chain goes on from there. `lucky`: without a slip."""
        numbers, operators = problem.metadata["numbers"], problem.metadata["operators"]
        value, found = numbers[0], []
        for operator, number in zip(operators, numbers[1:], strict=True):
            value = apply(value, operator, number, self.modulus)
            if not lucky and rng.random() < slip:
                value = (value + int(rng.integers(1, self.modulus))) % self.modulus
            found.append(value)
        return " ".join(map(str, [*found, "!", value]))

    def vocabulary(self) -> list[str]:
        """Every word that a prompt or a response is made of."""
        return [*map(str, range(max(10, self.modulus))), *OPERATORS, "?", "!"]


def chain(steps: int = 6, modulus: int = 19, seed: int = 0) -> Chain:
    """The task by name: `bridge.tasks.chain:chain`."""
    return Chain(steps, modulus, seed)
