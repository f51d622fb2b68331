"""Chains: what their steps come to, splits that share none, slips as often as asked."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.errors import BridgeError
from bridge.tasks import SPLITS, Task, find_task
from bridge.tasks.chain import Chain
from bridge.tasks.guess import GuessAndCheck
from bridge.tasks.search import OperatorSearch

NAME = "bridge.tasks.chain:chain"


def test_it_is_found_by_name_and_is_a_task():
    task = find_task(NAME, steps=3)
    assert isinstance(task, Task) and task.steps == 3
    with pytest.raises(BridgeError, match=r"steps must be in 2\.\.9, not 1"):
        find_task(NAME, steps=1)
    with pytest.raises(BridgeError, match=r"modulus must be in 5\.\.97, not 4"):
        find_task(NAME, modulus=4)


def by_python(prompt, modulus):
    """The value of each step, from the prompt's text."""
    first, *rest = re.findall(r"\d+|[-+*]", prompt)
    found, text = [], first
    for operator, number in zip(rest[::2], rest[1::2], strict=True):
        text = f"({text} {operator} {number})"
        found.append(eval(text) % modulus)
    return found


@given(st.integers(2, 9), st.integers(5, 40), st.sampled_from(SPLITS), st.integers(0, 10**6))
def test_the_last_value_is_the_answer(steps, modulus, split, number):
    task = Chain(steps, modulus)
    problem = task.problem(split, number)
    assert problem == task.problem(split, number)
    values = by_python(problem.prompt, modulus)
    assert len(values) == steps and task.values(problem) == values
    for value in range(modulus):
        assert task.score(problem, f"3 ! {value}") == (value == values[-1])


def test_no_chain_is_in_two_splits():
    task = Chain(2, 5)
    seen = {split: {task.problem(split, n).prompt for n in range(2000)} for split in SPLITS}
    assert all(seen.values())
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["validation"]
    assert not seen["test"] & seen["validation"]


@pytest.mark.parametrize("said", ["", "!", "5", "! 5 6", "! 19", "! -1", "! 05", "! x"])
def test_what_is_no_answer_scores_nothing(said):
    task = Chain()
    assert task.read_answer(said) is None
    assert task.score(task.problem("test", 0), said) == 0


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.3, 1.0]), st.booleans())
def test_each_step_of_a_demonstration_goes_on_from_the_one_before(seed, slip, lucky):
    task = Chain()
    problem = task.problem("train", seed)
    said = task.demonstrate(problem, slip, np.random.default_rng(seed), lucky)
    *values, mark, answer = said.split()
    assert {*said.split(), *problem.prompt.split()} <= set(task.vocabulary())
    assert mark == "!" and answer == values[-1] and len(values) == 6
    first, *rest = problem.prompt.split()[:-1]
    slips, value = 0, int(first)
    for operator, number, shown in zip(rest[::2], rest[1::2], values, strict=True):
        slips += eval(f"{value} {operator} {number}") % 19 != int(shown)
        value = int(shown)
    assert slips == 0 if lucky or slip == 0 else slips == 6 if slip == 1 else True
    assert task.score(problem, said) or slips


def test_slips_are_as_many_as_asked():
    task, rng = Chain(), np.random.default_rng(0)
    problems = [task.problem("train", n) for n in range(1000)]
    kept = sum(task.demonstrate(p, 0.1, rng).split()[0] == str(task.values(p)[0]) for p in problems)
    assert abs(kept - 900) < 4 * np.sqrt(1000 * 0.1 * 0.9)


def test_no_kind_of_task_draws_what_another_does():
    kinds = OperatorSearch(), GuessAndCheck(), Chain()
    drawn = [kind.words(attempt, 7, split).tolist() for kind in kinds for attempt in (0, 1)
             for split in (0, 1, 2)]  # fmt: skip
    assert len({tuple(words) for words in drawn}) == len(drawn)
