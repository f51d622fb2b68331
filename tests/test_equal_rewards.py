"""What "equal" is for rewards, up to rounding and of any size (clause 7.6), wherever they are read:
advantages, the log's figures, thresholds, samples, an evaluation's intervals."""

from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from training_stops import run, toy_run
from training_toys import Sums

from bridge.contract import GRPO, Batch
from bridge.decoding.events import Response
from bridge.decoding.inputs import check_batch
from bridge.errors import BridgeError
from bridge.evaluation.intervals import Interval, bootstrap, paired
from bridge.numbers.rewards import equal, mean, reaches, std
from bridge.tasks import Problem
from bridge.training import grpo
from bridge.training.log import read_log
from bridge.training.rollouts import Rollout, summary
from bridge.training.sft import _line
from bridge_ref import losses

BOTH = pytest.mark.parametrize("group_advantages", [grpo.group_advantages, losses.group_advantages])
ROOT = 2**0.5

# By hand: rewards of a group, advantages, and advantages that are only centred.
WORKED = {
    "sums in another order": ([0.3, 0.1 + 0.2], [0, 0], [0, 0]),
    "three such": ([0.6, 0.1 + 0.2 + 0.3, 0.3 + 0.2 + 0.1], [0, 0, 0], [0, 0, 0]),
    "negative": ([-0.3, -0.1 - 0.2], [0, 0], [0, 0]),
    "of a scale": ([3e199, 1e199 + 2e199], [0, 0], [0, 0]),
    "zeros of both signs": ([0.0, -0.0], [0, 0], [0, 0]),
    "one row": ([5.0], [0], [0]),
    "the largest equal spread": ([1.0, 1 - 2.0**-46], [0, 0], [0, 0]),
    "the next": ([1.0, 1 - 2.0**-46 - 2.0**-53], [1, -1], [129 * 2.0**-54, -129 * 2.0**-54]),
    "a digit that counts": ([0.5, 0.5 + 1e-9], [-1, 1], [-5e-10, 5e-10]),
    "plain": ([1.0, 0.0, 0.0, 1.0], [1, -1, -1, 1], [0.5, -0.5, -0.5, 0.5]),
    "tiny": ([1e-200, 0.0], [1, -1], [5e-201, -5e-201]),
    "the least": ([5e-324, 0.0], [1, -1], None),
    "tiny beside 0": ([0.0, 0.0, 3e-310], [-1 / ROOT, -1 / ROOT, ROOT], None),
    "huge": ([1e300, -1e300, 0.0], [1.5**0.5, -(1.5**0.5), 0], [1e300, -1e300, 0]),
    "the largest": ([1.7e308, -1.7e308], [1, -1], [1.7e308, -1.7e308]),
    "huge and small": ([1e300, 1.0, -1.0], [ROOT, -1 / ROOT, -1 / ROOT], None),
}


@pytest.mark.filterwarnings("error")
@BOTH
@pytest.mark.parametrize("name", WORKED)
def test_advantages_by_hand(group_advantages, name):
    rewards, want, centred = WORKED[name]
    groups = np.zeros(len(rewards), np.int64)
    got = group_advantages(np.array(rewards), groups)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-15)
    assert [a == 0 for a in got] == [a == 0 for a in want]
    got = group_advantages(np.array(rewards), groups, normalise_std=False)
    if centred is not None:
        np.testing.assert_allclose(got, centred, rtol=1e-6, atol=0)
    assert equal(np.array(rewards)) == (not any(want))


@BOTH
@pytest.mark.parametrize(
    "parts", [(0.1, 0.2, 0.3, 0.4), (0.7, 0.2, 0.1), (1 / 3, 1 / 7, 1e-3, 9.1)]
)
def test_the_same_parts_in_any_order_teach_nothing(group_advantages, parts):
    rewards = np.array([sum(order) for order in permutations(parts)])
    assert len(set(rewards)) > 1
    assert not group_advantages(rewards, np.zeros(len(rewards), int)).any()
    scattered = np.append(rewards, rewards.mean() + 1)  # beside one that differs they are as one
    got = group_advantages(scattered, np.zeros(len(scattered), int))
    n = len(rewards)
    np.testing.assert_allclose(got, [-1 / n**0.5] * n + [n**0.5], rtol=1e-12)


REWARDS = st.lists(st.floats(-1, 1, allow_subnormal=False), min_size=2, max_size=6)


@given(REWARDS, st.integers(-960, 960), st.booleans())
def test_advantages_do_not_depend_on_the_scale_of_rewards(rewards, exponent, normalise):
    r = np.array(rewards)
    r[np.abs(r) < 1e-9] = 0
    groups = np.zeros(len(r), np.int64)
    for function in (grpo.group_advantages, losses.group_advantages):
        want = function(r, groups, normalise)
        got = function(np.ldexp(r, exponent), groups, normalise)
        np.testing.assert_array_equal(got, want if normalise else np.ldexp(want, exponent))
        assert np.isfinite(got).all()


@BOTH
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_reward_that_is_not_finite_is_named(group_advantages, value):
    with pytest.raises(BridgeError, match=f"^reward {value} of row 2 is not finite"):
        group_advantages(np.array([0.0, 1.0, value, 1.0]), np.array([0, 0, 1, 1]))


def test_advantages_that_float32_lacks_are_named():
    cells = np.ones((2, 1), np.int64)
    batch = Batch(cells, np.zeros(2, int), cells > 0, cells, cells > 0)
    for value, shown in ((np.nan, "nan"), (np.inf, "inf"), (-1e39, r"-1e\+39")):
        with pytest.raises(BridgeError, match=f"advantages holds {shown} in row 1.*rewards"):
            check_batch(replace(batch, advantages=np.array([1.0, value])), GRPO(), 4)
    unread = np.array([[True], [False]])
    check_batch(replace(batch, advantages=np.array([1.0, np.nan]), target_mask=unread), GRPO(), 4)


def test_figures_of_rewards():
    assert mean(np.array([1.7e308, 1.7e308])) == 1.7e308 and std(np.array([1.5e308] * 3)) == 0
    assert std(np.array([1e-200, -1e-200])) == pytest.approx(1e-200, rel=1e-12)
    assert std(np.array([1e300, -1e300])) == pytest.approx(1e300, rel=1e-12)
    assert std(np.array([0.3, 0.1 + 0.2])) == 0 and equal(np.array([]))
    drawn = np.random.default_rng(0).normal(size=9)
    assert mean(drawn) == drawn.mean() and std(drawn) == drawn.std()


def rollout(*rewards):
    said = Response("7", [8], "eos")
    return Rollout(Problem(0, "?"), [1], [said] * len(rewards), np.array(rewards), [])


def test_a_step_counts_them_as_it_learns_from_them():
    found = summary([rollout(0.3, 0.1 + 0.2), rollout(0.7 + 0.2 + 0.1, 0.0)], 1.0)
    assert found["equal_groups"] == 1
    assert 0.7 + 0.2 + 0.1 < 1 and found["accuracy"] == 0.25
    assert _line(rollout(0.7 + 0.2 + 0.1, 0.5), 1.0)["responses"] == ["7"]


def test_what_reaches_a_threshold():
    below = 1 - 2.0**-45
    assert reaches([0.7 + 0.2 + 0.1, 1, below, 2], 1).tolist() == [True, True, False, True]
    assert reaches([-0.1 - 0.2, -0.3, -0.31], -0.3).tolist() == [True, True, False]
    assert reaches([0.0, -1e-300], 0.0).tolist() == [True, False]


class Parts(Sums):
    """Worth the same to all: its parts, in an order by the response."""

    def score(self, problem, response):
        return 0.1 + 0.2 + 0.3 if ord((response or "a")[0]) % 2 else 0.3 + 0.2 + 0.1


class Scaled(Sums):
    """What is right is worth one amount, and what is wrong nothing."""

    def __init__(self, amount):
        super().__init__()
        self.amount = amount

    def score(self, problem, response):
        return self.amount * (len(response) % 2)


@pytest.fixture
def settings(toy_model, tmp_path):
    return replace(toy_run(toy_model, tmp_path / "run"), steps=1, eval_every=0, width=8)


def steps_of(settings):
    return [r for r in read_log(Path(settings.out) / "log.jsonl") if r["kind"] == "step"]


@pytest.mark.usefixtures("one_thread")
def test_a_run_learns_nothing_from_rounding(settings):
    assert 0.1 + 0.2 + 0.3 != 0.3 + 0.2 + 0.1
    run(replace(settings, drop_equal=True), task=Parts())
    [step] = steps_of(settings)
    assert step["equal_groups"] == step["dropped_groups"] == 2 and step["updates"] == 0


@pytest.mark.usefixtures("one_thread")
def test_a_run_does_not_depend_on_the_scale_of_its_rewards(settings):
    found = []
    for i, amount in enumerate((1.0, 2.0**-700, 2.0**1000)):
        here = replace(settings, out=f"{settings.out}{i}")
        run(here, task=Scaled(amount))
        [step] = steps_of(here)
        found.append((step["loss"], step["grad_norm"], step["reward_mean"] / amount))
        assert step["grad_norm"] > 0
    assert found[0] == found[1] == found[2]


TOO_LARGE = {
    1e60: r"problem \d+: its rewards, such as .*e\+60, are too far apart for advantages",
    1e12: r"step 1: grad_norm .* is above .*; advantages reach .*: scale the reward down",
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("amount", TOO_LARGE)
def test_rewards_too_large_without_std_are_blamed(settings, amount):
    with pytest.raises(BridgeError, match=TOO_LARGE[amount]) as error:
        run(replace(settings, normalise_std=False), task=Scaled(amount))
    assert "lower lr" not in str(error.value) and "\n" not in str(error.value)


def test_paired_differences_that_are_rounding_are_none():
    """Of numbers of any size: the last digits of a large score are no difference."""
    rng = np.random.default_rng(3)
    for size in (1.0, 1e6, 1e-9, 1e200):
        scores = size * rng.uniform(1, 2, size=(1, 30))
        moved = scores * (1 + rng.choice([-1, 0, 1], size=30) * 2.0**-52)
        [got] = paired(scores, moved, bounds=None)
        assert got.low == got.high == got.mean and abs(got.mean) < 1e-15 * size
        [real] = paired(scores * 1.001, moved, bounds=None)
        assert real.excludes_zero and real.mean == pytest.approx(0.0015 * size, rel=0.1)


def test_intervals_do_not_depend_on_the_scale_of_values():
    values = np.random.default_rng(4).normal(1, 0.3, size=(1, 25))
    [want] = bootstrap(values, bounds=None)
    for exponent in (-700, -40, 0, 1000):
        [got] = bootstrap(np.ldexp(values, exponent), bounds=None)
        scaled = (np.ldexp(x, exponent) for x in (want.mean, want.low, want.high))
        assert got == Interval(*map(float, scaled))
    assert want.low < want.mean < want.high
