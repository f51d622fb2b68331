"""Batches, advantages, learning rates, the order of data: what of training needs no model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from training_toys import computed

from bridge.contract import SFT
from bridge.decoding.inputs import check_batch, default_positions, micro_batches
from bridge.errors import BridgeError
from bridge.training import grpo
from bridge.training.batches import Group, make_batch, pack
from bridge.training.grpo import group_advantages
from bridge.training.schedule import learning_rate, permutation, problem_number, stream_seed
from bridge_ref import losses
from mutations import harness

P, Q, A, B, C, D, E, F, G, EOS = range(1, 11)
FIGURE = Group([P, Q], [[A, B, C, EOS], [D, EOS], [E, F, G]])  # clause 2.5


def test_a_group_is_the_worked_figure_of_the_spec():
    batch = make_batch([FIGURE])
    assert batch.tokens.tolist() == [[P, Q, A, B, C], [P, Q, D, 0, 0], [P, Q, E, F, 0]]
    active = [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    assert batch.active.astype(int).tolist() == active
    assert batch.targets.tolist() == [[0, A, B, C, EOS], [0, D, EOS, 0, 0], [0, E, F, G, 0]]
    mask = [[0, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0, 1, 1, 1, 0]]
    assert batch.target_mask.astype(int).tolist() == mask
    assert batch.groups.tolist() == [0, 0, 0]
    assert default_positions(batch.active)[0].tolist() == [0, 1, 2, 3, 4]


def test_what_rows_share_counts_once():
    assert (FIGURE.shared, FIGURE.alone, FIGURE.cells) == (2, 3, 2 + 3 * 3)
    alike = Group([P, Q], [[A, B, C], [A, B, D]])  # a last token is a target alone
    assert (alike.shared, alike.alone, alike.cells) == (4, 0, 4)
    longer = Group([P, Q], [[A, B, C], [A, B]])  # and after it a row is no longer as active
    assert (longer.shared, longer.alone, longer.cells) == (3, 1, 5)
    assert Group([P], [[A, B, C]]).cells == 3
    eight = Group([P] * 512, [[row] * 128 for row in range(8)])
    assert eight.cells == 512 + 8 * 127
    both = pack([eight, FIGURE], 2 * 512 + 11 * 127)
    assert len(both) == 1 and computed(both[0]) == 2 * 512 + 11 * 127
    assert len(pack([eight, FIGURE], 2 * 512 + 11 * 127 - 1)) == 2


TOKENS = st.lists(st.integers(1, 30) | st.just(1), min_size=1, max_size=9)
GROUPS = st.lists(
    st.builds(Group, TOKENS, st.lists(TOKENS, min_size=1, max_size=4)), min_size=1, max_size=9
)


@given(GROUPS, st.integers(1, 200))
def test_packing_keeps_groups_whole_and_every_token_once(groups, budget):
    groups = [replace(g, advantages=np.arange(g.rows) + i / 16) for i, g in enumerate(groups)]
    if max(group.cells for group in groups) > budget:
        with pytest.raises(BridgeError, match="a group is never split"):
            pack(groups, budget)
        return
    batches = pack(groups, budget)
    micro_batches(batches, SFT(), 31)  # what every backend refuses: a split group is one
    assert all(computed(batch) <= budget for batch in batches)
    assert [computed(make_batch([group])) for group in groups] == [g.cells for g in groups]
    found = {}
    for batch in batches:
        check_batch(batch, SFT(), 31)
        for number in np.unique(batch.groups):
            rows = np.flatnonzero(batch.groups == number)
            found[int(number)] = rows, batch
    assert sorted(found) == list(range(len(groups)))
    for number, (rows, batch) in found.items():
        group = groups[number]
        assert batch.advantages is not None
        assert batch.advantages[rows].tolist() == group.advantages.tolist()
        for row, response in zip(rows, group.responses, strict=True):
            said = [*group.prompt, *response]
            assert batch.tokens[row][batch.active[row]].tolist() == said[:-1]
            assert batch.targets[row][batch.target_mask[row]].tolist() == list(response)
            first = len(group.prompt) - 1
            wanted = np.arange(batch.tokens.shape[1])
            inside = (wanted >= first) & (wanted < first + len(response))
            assert (batch.target_mask[row] == inside).all()


def test_long_and_short_groups_are_not_padded_together():
    short, long = (Group([1], [[row] * n for row in range(4)]) for n in (2, 50))
    batches = pack([short, long] * 4, 4 * (1 + 49 * 4))
    padding = sum((~batch.active).sum() for batch in batches)
    assert len(batches) == 2 and padding == 0


def test_a_group_above_the_budget_is_refused_by_name():
    group = Group([1, 2], [[row] * 9 for row in range(4)], name="problem 7")
    message = (
        "problem 7: its 4 rows of up to 10 tokens, of which 2 are computed once for all, are 34 "
        "cells, above micro_batch_tokens 33"
    )
    with pytest.raises(BridgeError, match=message):
        pack([group], 33)
    assert len(pack([group], 34)) == 1


@pytest.mark.parametrize("group", [Group([], [[1]]), Group([1], [[1], []])])
def test_what_has_no_tokens_is_refused(group):
    with pytest.raises(BridgeError, match="empty prompt or response"):
        make_batch([group])


def test_advantages_are_those_of_the_golden_vectors():
    assert harness.of_advantages(group_advantages) == []


PLANTED = [
    ("centred / apart.std() if normalise_std else unscaled", "unscaled"),
    ("apart.std()", "apart.std(ddof=1)"),
    ("apart.std()", "(apart.std() + 1e-4)"),
    ("rows = groups == group", "rows = groups >= 0"),
    ("equal(rewards[rows])", "np.ptp(rewards[rows]) == 0"),
    ("equal(rewards[rows])", "np.allclose(rewards[rows], rewards[rows][0])"),
    ("(r - r.min()) / spread", "r - r.min()"),
    ("scaled(rewards[rows])", "(np.round(rewards[rows], 12), 0)"),
]


@pytest.mark.parametrize("old, new", PLANTED)
def test_the_golden_vectors_catch_wrong_advantages(old, new):
    assert grpo.__file__ is not None
    source = Path(grpo.__file__).read_text()
    assert source.count(old) == 1
    names: dict = {}
    exec(compile(source.replace(old, new), "planted", "exec"), names)
    assert harness.of_advantages(names["group_advantages"])


REWARDS = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from([0.0, 1.0, 0.5, -2.25, 1e-9])), min_size=1
)


@given(REWARDS, st.booleans())
def test_advantages_are_the_references(pairs, normalise):
    groups, rewards = (np.array(column) for column in zip(*pairs, strict=True))
    ours = group_advantages(rewards, groups, normalise)
    reference = losses.group_advantages(rewards, groups, normalise)
    assert ours.tobytes() == reference.tobytes()
    for group in np.unique(groups):
        own = rewards[groups == group]
        if own.min() == own.max():
            assert not ours[groups == group].any()


def test_learning_rates_by_hand():
    def rates(schedule, **more):
        return [learning_rate(s, 6, 1.0, schedule, warmup=2, **more) for s in range(6)]

    assert rates("constant") == [0.5, 1, 1, 1, 1, 1]
    assert rates("linear") == [0.5, 1, 1, 0.75, 0.5, 0.25]
    assert rates("linear", end=0.2) == pytest.approx([0.5, 1, 1, 0.8, 0.6, 0.4])
    half = np.sqrt(0.5)
    cosine = [0.5, 1, 1, (1 + half) / 2, 0.5, (1 - half) / 2]
    assert rates("cosine") == pytest.approx(cosine)
    assert rates("cosine", end=1.0) == pytest.approx([0.5, 1, 1, 1, 1, 1])
    assert learning_rate(5, 5, 1.0, "linear", warmup=9) == pytest.approx(6 / 9)


@given(st.integers(1, 50), st.integers(0, 2**64 - 1))
def test_every_problem_comes_once_an_epoch_in_an_order_of_its_own(size, seed):
    epochs = [[problem_number(size, seed, e * size + i) for i in range(size)] for e in range(3)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    if size > 12:
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_endless_problems_start_where_the_seed_says():
    first = [problem_number(None, seed, 0) for seed in range(50)]
    assert len(set(first)) == 50 and max(first) < 2**24
    assert [problem_number(None, 7, i) for i in range(4)] == [first[7] + i for i in range(4)]


def test_streams_of_a_seed_are_apart():
    seeds = {stream_seed(seed, use, n) for seed in range(4) for use in range(4) for n in range(4)}
    assert len(seeds) == 64 and all(0 <= seed < 2**64 for seed in seeds)
    assert permutation(100, 0, 5, 0).tolist() != permutation(100, 0, 6, 0).tolist()


def test_a_permutation_is_what_it_was():
    """Data order must not change with NumPy or this code: a run resumed elsewhere would differ."""
    assert permutation(8, 3, 0, 0).tolist() == [2, 4, 0, 1, 3, 6, 5, 7]
    assert stream_seed(0, 0, 0) == 12535102004024821012
