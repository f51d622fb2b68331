"""The metrics of `bridge.evaluation`: published values, brute force, scipy, and coverage."""

from fractions import Fraction
from itertools import combinations, permutations
from math import ceil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bridge.evaluation import intervals
from bridge.evaluation.intervals import Interval, bootstrap, paired
from bridge.evaluation.metrics import (
    at_least,
    best_of_k,
    g_pass_at_k,
    maj_at_k,
    mean_g_pass_at_k,
    pass_at_k,
)
from bridge.evaluation.voting import majority

TAUS = ("0", "0.25", "0.5", "0.55", "0.75", "1")


@st.composite
def outcomes(draw, most=7):
    """Responses, each with an answer and whether it is correct, and how many to choose."""
    n = draw(st.integers(1, most))
    answers = draw(st.lists(st.sampled_from(["a", "b", "c", "d", None]), min_size=n, max_size=n))
    correct = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    return answers, correct, draw(st.integers(1, n))


def over_subsets(n, k, value):
    """The mean over all ways to choose k of n."""
    chosen = list(combinations(range(n), k))
    return sum(Fraction(value(c)) for c in chosen) / len(chosen)


def test_published_values():
    # The documentation of Hugging Face's code_eval: two candidates, one of which passes.
    assert pass_at_k(np.array(1), 2, 1) == 0.5
    assert pass_at_k(np.array(1), 2, 2) == 1.0
    # The documentation and tests of scorio ("Don't pass@k", arXiv 2510.04265): two questions of
    # five trials, three and four of them correct.
    correct = np.array([3, 4])
    for got, want in (
        (pass_at_k(correct, 5, 1), 0.7),
        (pass_at_k(correct, 5, 2), 0.95),
        (g_pass_at_k(correct, 5, 2, 0.5), 0.95),
        (g_pass_at_k(correct, 5, 2, 1.0), 0.45),
        (g_pass_at_k(correct, 5, 3, 0.5), 0.85),
        (mean_g_pass_at_k(correct, 5, 2), 0.45),
        (mean_g_pass_at_k(correct, 5, 3), 1 / 6),
        (mean_g_pass_at_k(correct, 5, 1), 0.0),
    ):
        assert got.mean() == pytest.approx(want, rel=1e-14)


@given(outcomes(), st.sampled_from(TAUS))
def test_counts_against_enumeration(drawn, tau):
    _, correct, k = drawn
    n, count = len(correct), np.array(sum(correct))
    need = ceil(Fraction(tau) * k)

    def right(chosen):
        return sum(correct[i] for i in chosen)

    assert pass_at_k(count, n, k) == float(over_subsets(n, k, lambda c: right(c) >= 1))
    want = over_subsets(n, k, lambda c: right(c) >= max(need, 1))
    assert g_pass_at_k(count, n, k, tau) == float(want)
    above = ceil(Fraction(k, 2))
    want = over_subsets(n, k, lambda c: Fraction(2, k) * max(right(c) - above, 0))
    assert mean_g_pass_at_k(count, n, k) == pytest.approx(float(want), abs=1e-14)


@given(st.integers(1, 300), st.data())
def test_tails_against_scipy(n, data):
    k = data.draw(st.integers(1, n))
    j = data.draw(st.integers(0, k))
    correct = np.arange(n + 1)
    want = stats.hypergeom.sf(j - 1, n, correct, k)
    np.testing.assert_allclose(at_least(correct, n, k, j), want, rtol=1e-9, atol=1e-12)


def test_tau_is_the_decimal_that_it_is_written_as():
    assert ceil(0.55 * 100) == 56  # what floats make of it
    assert g_pass_at_k(np.array(55), 100, 100, 0.55) == 1
    assert g_pass_at_k(np.array(54), 100, 100, 0.55) == 0
    assert g_pass_at_k(np.array(1), 4, 4, 0) == pass_at_k(np.array(1), 4, 4) == 1


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=7), st.data())
def test_best_of_k_against_enumeration(rewards, data):
    n, k = len(rewards), data.draw(st.integers(1, len(rewards)))
    want = over_subsets(n, k, lambda c: max(rewards[i] for i in c))
    assert best_of_k(np.array(rewards, float), k) == pytest.approx(float(want), abs=1e-12)
    right = np.array(rewards) > 0
    assert best_of_k(right.astype(float), k) == pytest.approx(
        float(pass_at_k(right.sum(), n, k)), abs=1e-12
    )


@given(outcomes())
def test_maj_at_k_against_enumeration(drawn):
    answers, correct, k = drawn

    def credit(chosen):
        votes = [answers[i] for i in chosen if answers[i] is not None]
        top = max((votes.count(a) for a in votes), default=0)
        winners = [a for a in set(votes) if votes.count(a) == top]
        shares = [
            Fraction(sum(c for a, c in zip(answers, correct, strict=True) if a == w))
            / answers.count(w)
            for w in winners
        ]
        return sum(shares) / len(shares) if shares else 0

    assert maj_at_k(answers, correct, k) == float(over_subsets(len(answers), k, credit))


@given(outcomes(most=5))
def test_maj_at_k_is_the_mean_of_our_vote_over_the_orders_of_rows(drawn):
    answers, _, _ = drawn
    correct = [answer in ("a", "c") for answer in answers]  # alike for equal answers, as by a task
    orders = list(permutations(answers))
    said = [[f"The answer is {a}." if a else "" for a in order] for order in orders]
    won = sum(majority(texts).answer in ("a", "c") for texts in said)
    assert maj_at_k(answers, correct, len(answers)) == float(Fraction(won, len(orders)))


def test_maj_at_k_of_many_responses_is_exact():
    # 2 right of 3, drawn one at a time: a single vote wins; three of them: the majority.
    answers, correct = ["a"] * 40 + ["b"] * 20, [True] * 40 + [False] * 20
    assert maj_at_k(answers, correct, 1) == 2 / 3
    assert maj_at_k(answers, correct, 60) == 1
    want = stats.hypergeom.sf(1, 60, 40, 3)
    assert maj_at_k(answers, correct, 3) == pytest.approx(want, rel=1e-12)
    assert maj_at_k([None] * 4, [False] * 4, 2) == 0
    assert maj_at_k([str(i) for i in range(64)], [i == 7 for i in range(64)], 16) == pytest.approx(
        1 / 64, rel=1e-12
    )


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: pass_at_k(np.array(1), 4, 0),
        lambda: pass_at_k(np.array(1), 4, 5),
        lambda: pass_at_k(np.array(5), 4, 2),
        lambda: pass_at_k(np.array(-1), 4, 2),
        lambda: g_pass_at_k(np.array(1), 4, 2, 1.5),
        lambda: best_of_k(np.zeros(3), 4),
        lambda: maj_at_k([], [], 1),
        lambda: maj_at_k(["a"], [True, False], 1),
        lambda: bootstrap(np.zeros((1, 0))),
    ],
)
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError):
        wrong()


def test_intervals_are_scipys():
    rng = np.random.default_rng(3)
    values = np.stack([rng.random(60) < 0.1, rng.random(60) ** 6, rng.integers(0, 5, 60) / 4])
    for row, got in zip(values, bootstrap(values, resamples=40_000), strict=True):
        want = stats.bootstrap(
            (row,), np.mean, n_resamples=40_000, method="BCa", rng=np.random.default_rng(5)
        )
        # Each is a quantile of 40,000 draws of its own: their spread, from the draws themselves.
        error = 6 * _quantile_error(want.bootstrap_distribution)
        assert got.mean == row.mean()
        assert abs(got.low - want.confidence_interval.low) <= error
        assert abs(got.high - want.confidence_interval.high) <= error


def _quantile_error(draws):
    """The larger distance between quantiles one standard error of the level apart, at the tails,
    and the largest step between neighbouring values, since means of counts are discrete."""
    draws = np.sort(draws)
    se = np.sqrt(0.025 * 0.975 / len(draws))
    low = np.quantile(draws, [0.025 - se, 0.025 + se])
    high = np.quantile(draws, [0.975 - se, 0.975 + se])
    inner = np.unique(draws[(draws >= low[0]) & (draws <= high[1])])
    return max(np.ptp(low), np.ptp(high), np.diff(inner).max() / 6)


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.8])
def test_intervals_hold_the_truth_as_often_as_they_say(rate):
    rng = np.random.default_rng(11)
    trials, P = 600, 80
    # A metric of a group: a share of 4 rows, whose chance differs from problem to problem.
    chances = rng.beta(rate * 2, (1 - rate) * 2, (trials, P))
    found = bootstrap(rng.binomial(4, chances) / 4, resamples=1000)
    held = sum(i.low <= rate <= i.high for i in found) / trials
    # Five standard errors of a count of trials at the nominal rate.
    assert abs(held - 0.95) <= 5 * np.sqrt(0.95 * 0.05 / trials)


def test_intervals_are_a_function_of_values_and_seed(monkeypatch):
    values = np.random.default_rng(0).random((3, 50))
    first = bootstrap(values)
    assert bootstrap(values) == first != bootstrap(values, seed=1)
    [alone] = bootstrap(values[1:2])
    assert vars(alone) == pytest.approx(vars(first[1]), rel=1e-12)
    # Cut in pieces or not, the same problems are drawn.
    monkeypatch.setattr(intervals, "AT_ONCE", 777)
    for piecewise, whole in zip(bootstrap(values), first, strict=True):
        assert vars(piecewise) == pytest.approx(vars(whole), rel=1e-12)


def test_equal_values_leave_room_for_what_was_not_seen():
    for P in (1, 20, 500):
        [none, all_] = bootstrap(np.repeat([[0.0], [1.0]], P, axis=1))
        low = stats.binomtest(0, P).proportion_ci(method="exact")
        high = stats.binomtest(P, P).proportion_ci(method="exact")
        assert (none.low, none.high) == pytest.approx((low.low, low.high), abs=1e-12)
        assert (all_.low, all_.high) == pytest.approx((high.low, high.high), abs=1e-12)
    [same] = paired(np.full((1, 30), 0.5), np.full((1, 30), 0.5))
    assert same.low < 0 == same.mean < same.high and not same.excludes_zero
    assert bootstrap(np.full((1, 9), 7.0), bounds=None) == [Interval(7.0, 7.0, 7.0)]


def test_where_few_problems_differ_the_interval_is_clopper_and_pearsons():
    for P, few in ((300, range(4)), (12, range(4)), (3, range(2))):
        shares = [stats.binomtest(k, P).proportion_ci(method="exact") for k in few]
        for k, share in zip(few, shares, strict=True):
            values = np.zeros((1, P))
            values[0, :k] = 1
            [got], [turned] = bootstrap(values), bootstrap(1 - values)
            assert (got.low, got.high) == pytest.approx((share.low, share.high), abs=1e-12)
            assert (turned.low, turned.high) == pytest.approx(
                (1 - share.high, 1 - share.low), abs=1e-12
            )
            # Those that differ do so by next to nothing: others may by more.
            [got] = bootstrap(values / 12870)
            assert got.mean == pytest.approx(k / P / 12870, abs=1e-15)
            assert (got.low, got.high) == pytest.approx((0, share.high), abs=1e-12)
            [got] = paired(values / 3, np.zeros((1, P)))
            assert (got.low, got.high) == pytest.approx((-share.high, share.high), abs=1e-12)
    # One more, and a resample without any of them is rare: the bootstrap's own.
    values = np.zeros((1, 300))
    values[0, :4] = 1
    want = stats.bootstrap((values[0],), np.mean, method="BCa", rng=np.random.default_rng(1))
    [got] = bootstrap(values)
    # Quantiles of two sets of draws, of means of counts, may differ by one count.
    for ours, theirs in zip((got.low, got.high), want.confidence_interval, strict=True):
        assert round(abs(300 * (ours - theirs))) <= 1


def test_values_that_differ_by_rounding_are_equal():
    values = np.full((1, 40), 0.3)
    values[0, ::2] = 0.1 + 0.2
    [got], [same] = bootstrap(values), bootstrap(np.full((1, 40), 0.3))
    assert vars(got) == pytest.approx(vars(same), abs=1e-12)
    [difference] = paired(values, np.full((1, 40), 0.3))
    assert difference.low < -0.08 and difference.high > 0.08


def test_a_paired_difference_takes_the_problems_out():
    rng = np.random.default_rng(2)
    hardness = rng.random((1, 200))
    better = np.clip(hardness + 0.02 + 0.01 * rng.standard_normal((1, 200)), 0, 1)
    [difference] = paired(better, hardness)
    [a], [b] = bootstrap(better), bootstrap(hardness)
    assert difference.excludes_zero and difference.low > 0.015
    assert a.low < b.high  # which the two intervals apart would not have told
    [back] = paired(hardness, better)
    assert back.mean == -difference.mean and back.excludes_zero
