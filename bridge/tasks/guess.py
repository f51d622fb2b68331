"""Guess and check: a lock with many keys, of which one row can try only a few.

A table says what each guess comes to, f(a, g), in random order; asked is the guess that comes to b:

    prompt     17 5 ?
    response   22 8 no 3 30 no 11 5 = 11

A response tries guesses, writes what each comes to, and says `no`, or `=` and the guess as soon as
one comes to b: rows end at different times. One whose guesses all fail ends with `= g`, untried. No
row can know more than its guesses told it; rows that see another's `=` can say the same.
"""

from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int

from bridge.tasks.problem import SPLITS, Problem
from bridge.tasks.synthetic import Synthetic, number_after, whole


class GuessAndCheck(Synthetic):
    """The task, for a number of tables and of guesses. A right guess scores 1, any other text 0.

    Which prompts are for testing does not depend on f, and f(a, .) is a random permutation: what
    training says of other b gives the answer to none of them.
    """

    purpose = 1

    def __init__(self, guesses: int = 31, tables: int = 32, seed: int = 0) -> None:
        """`guesses` there are, and as many results, in each table. `seed`: of tables too."""
        self.guesses = whole("guesses", guesses, 11, 97)
        self.tables = whole("tables", tables, 8, 256)
        self.seed = whole("seed", seed)
        self.name = f"guess-and-check-{self.guesses}"

    @cached_property
    def results(self) -> Int[np.ndarray, "tables guesses"]:
        """f(a, g): each row is a permutation."""
        table, guess = np.indices((self.tables, self.guesses))
        words = self.words(guess, table, len(SPLITS)).astype(np.uint64)
        return np.argsort(words[..., 0] << np.uint64(32) | words[..., 1], axis=1, kind="stable")

    def draw(self, words: np.ndarray) -> tuple[str, dict[str, Any]]:
        """A table, and a result."""
        table, target = int(words[0]) % self.tables, int(words[1]) % self.guesses
        return f"{table} {target} ?", {"table": table, "target": target}

    def read_answer(self, response: str) -> str | None:
        """The word after the last `=`; None where that is no guess."""
        return number_after(response, "=", self.guesses)

    def score(self, problem: Problem, response: str) -> float:
        """1 where the answer comes to the target."""
        answer, given = self.read_answer(response), problem.metadata
        return float(
            answer is not None and self.results[given["table"], int(answer)] == given["target"]
        )

    def demonstrate(
        self, problem: Problem, trials: int, rng: np.random.Generator, lucky: bool = False
    ) -> str:
        """A response as one who guesses at random gives it: up to `trials` different guesses, and
        an untried one if all of them fail. `lucky`: one of them, whichever, does not."""
        results = self.results[problem.metadata["table"]]
        order = rng.permutation(self.guesses).tolist()
        right = int(np.flatnonzero(results == problem.metadata["target"])[0])
        if lucky:
            here, there = int(rng.integers(trials)), order.index(right)
            order[here], order[there] = order[there], order[here]
        words: list[object] = []
        for guess in order[:trials]:
            words += [guess, results[guess]]
            if guess == right:
                return " ".join(map(str, [*words, "=", guess]))
            words.append("no")
        return " ".join(map(str, [*words, "=", order[trials]]))

    def vocabulary(self) -> list[str]:
        """Every word that a prompt or a response is made of."""
        return [*map(str, range(max(self.guesses, self.tables))), "?", "no", "="]


def guess_and_check(guesses: int = 31, tables: int = 32, seed: int = 0) -> GuessAndCheck:
    """The task by name: `bridge.tasks.guess:guess_and_check`."""
    return GuessAndCheck(guesses, tables, seed)
