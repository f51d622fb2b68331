"""Operator search: puzzles that are solved by trying, small enough for a model of a laptop.

Given numbers and a target, find an operator of + - * between each two, such that, from left to
right, ((a o b) o c) o d = t modulo m:

    prompt     3 5 2 7 = 8 ?
    response   + - * 8 6 4 no - - - 17 15 8 yes ! - - -

A response may write out trials, each with its intermediate values and a verdict; what counts is the
answer after its last `!`. One trial is as good as another, so rows that try different operators and
see each other's verdicts know more than any of them alone.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from bridge.tasks.problem import Problem
from bridge.tasks.synthetic import OPERATORS, Synthetic, digits, left_to_right, whole


class OperatorSearch(Synthetic):
    """The task, for one length and one modulus. A correct answer scores 1, any other text 0."""

    purpose = 0

    def __init__(self, numbers: int = 4, modulus: int = 19, seed: int = 0) -> None:
        """`numbers` a puzzle. `seed`: another one gives other puzzles, of the same splits."""
        self.numbers = whole("numbers", numbers, 2, 6)
        self.modulus = whole("modulus", modulus, 5, 97)
        self.seed = whole("seed", seed)
        self.name = f"operator-search-{self.numbers}-mod-{self.modulus}"

    def draw(self, words: np.ndarray) -> tuple[str, dict[str, Any]]:
        """Numbers from 1 to 9, and what some choice of operators makes of them."""
        numbers = [digit + 1 for digit in digits(int(words[0]), 9, self.numbers)]
        chosen = self.candidates()[int(words[1]) % 3 ** (self.numbers - 1)]
        target = self.values(numbers, chosen)[-1]
        prompt = f"{' '.join(map(str, numbers))} = {target} ?"
        return prompt, {"numbers": numbers, "target": target}

    def candidates(self) -> list[str]:
        """Every choice of operators: all that there is to try."""
        return ["".join(chosen) for chosen in product(OPERATORS, repeat=self.numbers - 1)]

    def values(self, numbers: Sequence[int], operators: str) -> list[int]:
        """What each operator comes to, from left to right, modulo m."""
        return left_to_right(numbers, operators, self.modulus)

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
