"""Operator search: puzzles that can be solved, splits that share none, true demonstrations."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.errors import BridgeError
from bridge.tasks import SPLITS, Task, find_task
from bridge.tasks.search import OperatorSearch

NAME = "bridge.tasks.search:operator_search"


def test_it_is_found_by_name_and_is_a_task():
    task = find_task(NAME, modulus=13)
    assert isinstance(task, Task) and task.modulus == 13
    with pytest.raises(BridgeError, match=r"numbers must be in 2\.\.6, not 7"):
        find_task(NAME, numbers=7)


@pytest.mark.parametrize(
    ("name", "option", "wrong"),
    [
        (NAME, "seed", "abc"),
        (NAME, "numbers", 4.0),
        (NAME, "modulus", None),
        ("bridge.tasks.guess:guess_and_check", "guesses", "31"),
        ("bridge.tasks.guess:guess_and_check", "tables", [32]),
        ("bridge.tasks.guess:guess_and_check", "seed", True),
        ("bridge.tasks.chain:chain", "steps", {}),
        ("bridge.tasks.chain:chain", "seed", 1.5),
    ],
)
def test_an_option_of_another_type_is_refused_by_name(name, option, wrong):
    with pytest.raises(BridgeError, match=rf"^{option} must be a whole number in \d+\.\.\d+, not"):
        find_task(name, **{option: wrong})


def test_seeds_are_those_of_philox():
    assert OperatorSearch(seed=2**64 - 1).problem("test", 0) == OperatorSearch(
        seed=np.uint64(2**64 - 1)
    ).problem("test", 0)
    for seed in (-1, 2**64, 10**5000):
        with pytest.raises(BridgeError, match=r"seed must be in 0\.\.18446744073709551615, not"):
            OperatorSearch(seed=seed)


def by_python(numbers, operators, modulus):
    text = str(numbers[0])
    for operator, number in zip(operators, numbers[1:], strict=True):
        text = f"({text} {operator} {number})"
    return eval(text) % modulus


@given(st.integers(2, 5), st.integers(5, 40), st.sampled_from(SPLITS), st.integers(0, 10**6))
def test_every_puzzle_has_a_solution(numbers, modulus, split, number):
    task = OperatorSearch(numbers, modulus)
    problem = task.problem(split, number)
    assert problem == task.problem(split, number)
    found, target = problem.metadata["numbers"], problem.metadata["target"]
    right = [c for c in task.candidates() if by_python(found, c, modulus) == target]
    assert right
    for candidate in task.candidates():
        said = f"+ - 3 yes ! {' '.join(candidate)}"
        assert task.score(problem, said) == (candidate in right)


def test_no_puzzle_is_in_two_splits():
    task = OperatorSearch(2, 5)  # so few that all of them come
    seen = {split: {task.problem(split, n).prompt for n in range(400)} for split in SPLITS}
    assert all(seen.values())
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["validation"]
    assert not seen["test"] & seen["validation"]


@pytest.mark.parametrize("said", ["", "!", "! + +", "! + + + +", "! + x +", "+ + +", "! + + 1"])
def test_what_is_no_answer_scores_nothing(said):
    task = OperatorSearch()
    assert task.read_answer(said) is None
    assert task.score(task.problem("test", 0), said) == 0


@given(st.integers(0, 10**6), st.integers(0, 3))
def test_demonstrations_say_what_is_so(seed, trials):
    task = OperatorSearch()
    problem = task.problem("train", seed)
    numbers, target = problem.metadata["numbers"], problem.metadata["target"]
    said = task.demonstrate(problem, trials, np.random.default_rng(seed))
    words = said.split()
    assert set(words) | set(problem.prompt.split()) <= set(task.vocabulary())
    assert len(words) == 7 * trials + 4 and words[7 * trials] == "!"
    tried, right = [], []
    for at in range(0, 7 * trials, 7):
        operators, values = "".join(words[at : at + 3]), [int(w) for w in words[at + 3 : at + 6]]
        assert values == [by_python(numbers[: i + 2], operators[: i + 1], 19) for i in range(3)]
        assert words[at + 6] == ("yes" if values[-1] == target else "no")
        tried.append(operators)
        right += [operators] if values[-1] == target else []
    answer = task.read_answer(said)
    assert len(set(tried)) == trials
    assert answer == right[0] if right else answer not in tried
