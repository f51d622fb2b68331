"""Guess and check: one right guess a problem, splits that share no prompt, true demonstrations."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.errors import BridgeError
from bridge.tasks import SPLITS, Task, find_task
from bridge.tasks.guess import GuessAndCheck

NAME = "bridge.tasks.guess:guess_and_check"


def test_it_is_found_by_name_and_is_a_task():
    task = find_task(NAME, tables=9)
    assert isinstance(task, Task) and task.tables == 9
    with pytest.raises(BridgeError, match=r"guesses must be in 11\.\.97, not 98"):
        find_task(NAME, guesses=98)
    with pytest.raises(BridgeError, match=r"tables must be in 8\.\.256, not 7"):
        find_task(NAME, tables=7)


@given(st.integers(11, 40), st.integers(8, 64), st.sampled_from(SPLITS), st.integers(0, 10**6))
def test_every_problem_has_one_right_guess(guesses, tables, split, number):
    task = GuessAndCheck(guesses, tables)
    problem = task.problem(split, number)
    assert problem == task.problem(split, number)
    table, target = problem.metadata["table"], problem.metadata["target"]
    assert problem.prompt == f"{table} {target} ?"
    scores = [task.score(problem, f"3 {target} no = {guess}") for guess in range(guesses)]
    assert sum(scores) == 1 and task.results[table, int(np.argmax(scores))] == target


def test_tables_are_permutations_in_orders_of_their_own():
    one, other = GuessAndCheck(31, 64), GuessAndCheck(31, 64, seed=1)
    assert (np.sort(one.results, axis=1) == np.arange(31)).all()
    assert len({tuple(row) for row in one.results.tolist()}) == 64
    assert (one.results != other.results).any()
    # A guess says nothing about its result: over the tables it comes to each about as often.
    counts = np.bincount(GuessAndCheck(11, 256).results[:, 4], minlength=11)
    assert ((counts - 256 / 11) ** 2).sum() / (256 / 11) < 29.6  # chi squared, 10 degrees: 0.1 %


def test_no_prompt_is_in_two_splits_and_all_splits_have_some_at_the_smallest_size():
    task = GuessAndCheck(11, 8)
    seen = {split: {task.problem(split, n).prompt for n in range(400)} for split in SPLITS}
    assert all(seen.values())
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["validation"]
    assert not seen["test"] & seen["validation"]


def test_a_scorer_can_take_it_along():
    task = GuessAndCheck()
    before = task.results.tolist()
    assert pickle.loads(pickle.dumps(task)).results.tolist() == before


@pytest.mark.parametrize("said", ["", "=", "5", "= 5 no", "= 31", "= -1", "= 05", "= 5 6", "= x"])
def test_what_is_no_answer_scores_nothing(said):
    task = GuessAndCheck()
    assert task.read_answer(said) is None
    assert task.score(task.problem("test", 0), said) == 0


@given(st.integers(0, 10**6), st.integers(1, 5), st.booleans())
def test_demonstrations_say_what_is_so(seed, trials, lucky):
    task = GuessAndCheck()
    problem = task.problem("train", seed)
    said = task.demonstrate(problem, trials, np.random.default_rng(seed), lucky)
    *words, mark, answer = said.split()
    assert mark == "=" and {*words, answer, *problem.prompt.split()} <= set(task.vocabulary())
    table, target = problem.metadata["table"], problem.metadata["target"]
    right = words.count("no") * 3 != len(words)
    tried, results = words[::3], words[1::3]
    assert [int(r) for r in results] == [task.results[table, int(g)] for g in tried]
    assert words[2::3] == ["no"] * (len(tried) - right) and len(set(tried)) == len(tried)
    assert [int(r) == target for r in results] == [False] * (len(tried) - right) + [True] * right
    assert task.score(problem, said) or not lucky
    if right:
        assert answer == tried[-1] and task.score(problem, said) == 1
    else:
        assert len(tried) == trials and answer not in tried


def test_one_who_guesses_at_random_is_right_as_often_as_there_are_guesses():
    task = GuessAndCheck()
    rng = np.random.default_rng(0)
    problems = [task.problem("train", n) for n in range(2000)]
    right = sum(task.score(p, task.demonstrate(p, 4, rng)) for p in problems)
    expected, spread = 2000 * 5 / 31, np.sqrt(2000 * 5 / 31 * 26 / 31)
    assert abs(right - expected) < 4 * spread  # 4 guesses that are checked, and one that is not
