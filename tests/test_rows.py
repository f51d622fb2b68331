"""What backends plan in NumPy: grids, who leaves, padding, windows, draws, targets; by hand, and
against a plain loop over rows."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.contract import Batch
from bridge.decoding.inputs import positions_of
from bridge.decoding.rows import (
    GridPlan,
    Rows,
    causal_alone,
    left_padded,
    lost_to_window,
    only_active,
)
from bridge.decoding.targets import TargetCells, by_cell
from bridge.decoding.uniforms import STEPS, Uniforms
from bridge.philox import uniforms

GROUPS = st.lists(st.integers(-2, 4), min_size=1, max_size=12)
WIDTHS = st.lists(st.integers(1, 4), min_size=1, max_size=4)


def test_rows_in_any_order_lie_in_lines_of_their_groups():
    plan = GridPlan.of([7, -1, 7, 7, -1, 3])
    assert (plan.groups, plan.width) == (3, 3)
    assert plan.to_rows.tolist() == [0, 3, 1, 2, 4, 6]
    assert plan.filled.tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
    # An empty place reads its own group.
    assert plan.to_grid.tolist() == [0, 2, 3, 1, 4, 1, 5, 5, 5]
    assert not plan.full and not plan.as_they_lie


@pytest.mark.parametrize(
    "groups, as_they_lie",
    [
        ([0, 0, 1, 1], True),
        ([5, 5, 2, 2], True),  # whatever the names
        ([0, 1, 0, 1], False),
        ([0, 0, 1], False),
        ([4, 1, 2], True),
        ([], True),
    ],
)
def test_equal_groups_that_lie_together_are_their_grid(groups, as_they_lie):
    assert GridPlan.of(groups).as_they_lie is as_they_lie


@given(GROUPS, st.integers(0, 2), st.integers(0, 2))
def test_a_grid_is_a_loop_over_rows(groups, more_lines, more_places):
    lines = {}
    for row, group in enumerate(groups):
        lines.setdefault(group, []).append(row)
    plan = GridPlan.of(groups)
    assert (plan.groups, plan.width) == (len(lines), max(map(len, lines.values())))
    plan = plan.padded(plan.groups + more_lines, plan.width + more_places)
    to_grid, filled = plan.to_grid.reshape(plan.filled.shape), plan.filled
    assert filled.shape == (len(lines) + more_lines, max(map(len, lines.values())) + more_places)
    for line, rows in enumerate(lines.values()):
        assert to_grid[line, : len(rows)].tolist() == rows
        assert set(to_grid[line, len(rows) :].tolist()) <= {rows[0]}
        assert filled[line].tolist() == [place < len(rows) for place in range(plan.width)]
    assert not filled[len(lines) :].any()
    assert plan.to_grid[plan.to_rows].tolist() == list(range(len(groups)))
    assert plan.full == filled.all()
    assert plan.as_they_lie == (filled.all() and to_grid.ravel().tolist() == sorted(to_grid.flat))


@given(GROUPS, st.permutations(range(-2, 5)))
def test_a_groups_number_is_only_a_name(groups, names):
    renamed = GridPlan.of([names[group] for group in groups])
    assert renamed.to_rows.tolist() == GridPlan.of(groups).to_rows.tolist()


def test_rows_and_prompts_leave():
    prompts = [np.arange(n) for n in (5, 2, 3)]
    rows = Rows.of(prompts, [2, 1, 3], 6, [40, 7, 9])
    assert len(rows) == 6 and rows.group.tolist() == [0, 0, 1, 2, 2, 2]
    assert rows.row_ids.tolist() == [0, 1, 0, 0, 1, 2]
    assert rows.prompt_ids.tolist() == [40, 40, 7, 9, 9, 9]
    assert rows.steps.tolist() == [0] * 6 and rows.limits.tolist() == [5] * 6
    assert rows.in_step and rows.left.tolist() == [5] * 6
    later = rows.fed(4)
    assert later.positions.tolist() == [9, 9, 6, 7, 7, 7] and later.left.tolist() == [1] * 6
    assert not later.fed(np.array([0, 0, 1, 0, 0, 0])).in_step
    left = rows.keep(np.array([1, 3, 5]))
    assert left.group.tolist() == [0, 2, 2] and left.lengths.tolist() == [5, 2, 3]
    left, prompts_left = left.compact()
    assert prompts_left.tolist() == [0, 2]
    assert left.group.tolist() == [0, 1, 1] and left.lengths.tolist() == [5, 3]
    # A row keeps the numbers that it draws by.
    assert left.row_ids.tolist() == [1, 0, 2] and left.prompt_ids.tolist() == [40, 9, 9]
    none, prompts_left = left.keep(np.array([], int)).compact()
    assert len(none) == len(none.lengths) == len(prompts_left) == 0
    assert Rows.of(prompts, [1, 1, 1], 1).prompt_ids.tolist() == [0, 1, 2]


def test_groups_come_after_those_that_are_left():
    first = Rows.of([np.arange(5), np.arange(2)], [2, 1], 4).fed(2).keep(np.array([0, 2]))
    both = first.joined(Rows.of([np.arange(3)], [2], 9, [7]))
    assert both.group.tolist() == [0, 1, 2, 2] and both.lengths.tolist() == [5, 2, 3]
    assert both.row_ids.tolist() == [0, 0, 0, 1] and both.prompt_ids.tolist() == [0, 1, 7, 7]
    assert both.positions.tolist() == [7, 4, 3, 3] and both.left.tolist() == [1, 1, 8, 8]
    assert first.group.tolist() == [0, 1]  # is left as it was


@given(WIDTHS, st.data())
def test_who_leaves_changes_nothing_of_who_stays(widths, data):
    prompts = [np.arange(3 + 2 * g) for g in range(len(widths))]
    rows = Rows.of(prompts, widths, 1, [10 + g for g in range(len(widths))])
    staying = [(g, row) for g, width in enumerate(widths) for row in range(width)]
    still = list(range(len(widths)))
    for _ in range(3):
        keep = data.draw(st.lists(st.booleans(), min_size=len(staying), max_size=len(staying)))
        rows, prompts_left = rows.keep(np.flatnonzero(keep)).compact()
        staying = [one for one, kept in zip(staying, keep, strict=True) if kept]
        still = [still[place] for place in prompts_left]
        assert still == sorted({g for g, _ in staying})
        assert rows.lengths.tolist() == [3 + 2 * g for g in still]
        assert [still[g] for g in rows.group] == [g for g, _ in staying]
        assert rows.row_ids.tolist() == [row for _, row in staying]
        assert rows.prompt_ids.tolist() == [10 + g for g, _ in staying]
        assert rows.fed(2).positions.tolist() == [5 + 2 * g for g, _ in staying]


def test_prompts_are_padded_on_the_left():
    tokens, active, positions = left_padded([np.array([5, 6, 7]), np.array([8])], 4)
    assert tokens.tolist() == [[0, 5, 6, 7], [0, 0, 0, 8]]
    assert active.astype(int).tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]
    assert positions.tolist() == [[0, 0, 1, 2], [0, 0, 0, 0]]
    assert left_padded([np.array([5, 6]), np.array([8])]).tokens.tolist() == [[5, 6], [0, 8]]


def test_what_inactive_cells_hold_is_not_read():
    active = np.array([[True, False], [False, True]])
    assert only_active(np.array([[3, -9], [2**40, 4]]), active).tolist() == [[3, 0], [0, 4]]


@given(
    st.integers(1, 3),
    st.integers(1, 6),
    st.sampled_from([None, 1, 2, 3, 6]),
    st.randoms(use_true_random=False),
)
def test_a_causal_mask_is_enough_where_it_masks_the_same(B, S, window, random):
    drawn = np.random.default_rng(random.randrange(2**32))
    ends = drawn.integers(0, S + 1, (B, 1))
    active = np.arange(S) < ends if random.random() < 0.7 else drawn.random((B, S)) < 0.7
    positions = np.cumsum(active, axis=1) - 1 + drawn.integers(0, 3, (B, 1))
    positions = np.where(active, positions, drawn.integers(0, 99, (B, S)))
    read = [
        active[b, t] and (window is None or positions[b, s] - positions[b, t] < window)
        for b in range(B)
        for s in range(S)
        for t in range(s + 1)
        if active[b, s]
    ]
    assert causal_alone(active, positions, window) == all(read)


def test_padding_that_comes_last_needs_no_mask():
    ends = np.arange(5) < np.array([[5], [2], [0]])
    positions = np.where(ends, np.arange(5) + 40, 0)
    assert causal_alone(ends, positions, None) and causal_alone(ends, positions, 5)
    assert not causal_alone(ends, positions, 4) and not causal_alone(ends[:, ::-1], positions, None)


@given(st.integers(1, 6), st.integers(1, 9), st.sampled_from([None, 1, 2, 3, 5, 8, 40]))
def test_a_window_is_counted_back_from_the_present(slots, timesteps, window):
    """Clause 5.5: what is `window` or more places back is lost."""
    back = np.arange(slots + timesteps)[::-1]
    lost = np.zeros(len(back), bool) if window is None else back >= window
    want = int(lost[:slots].sum()), int(lost[slots:].sum())
    assert lost_to_window(window, slots, timesteps) == want


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=8),
    st.lists(st.integers(0, 2**32), min_size=1, max_size=3),
)
def test_draws_are_those_of_the_counter(steps, seeds):
    """Clause 6.2, whichever steps and seeds are asked for one after the other."""
    row_ids, prompt_ids = np.array([0, 1, 0]), np.array([4, 4, 9])
    tables = []

    def put(table):
        tables.append(table)
        return table

    held = Uniforms(row_ids, prompt_ids, put)
    for number, step in enumerate(steps):
        seed = seeds[number % len(seeds)]
        own = np.array([step, step, step + 3]), np.array([seed, seed, seed + 1], np.uint64)
        table, line = held.at(*own)
        counters = zip(*own, row_ids, prompt_ids, strict=True)
        want = [uniforms(int(s), t, row, prompt) for t, s, row, prompt in counters]
        assert table.dtype == np.float32 and table[line].tolist() == want
    apart = Uniforms(row_ids, prompt_ids, put)
    seed = np.full(3, 5, np.uint64)
    apart.at(np.array([4, 4, 9]), seed, 3)
    for now in ([6, 6, 11], [6, 6, 8], [1, 1, 8]):  # together, then each group its own way
        table, line = apart.at(np.array(now), seed, 3)
        for later in range(3):
            want = uniforms(5, np.array(now) + later, row_ids, prompt_ids)
            assert table[line + later].tolist() == want.tolist()
    many = Uniforms(row_ids, prompt_ids, put)
    tables.clear()
    for step in range(2 * STEPS + 1):
        many.at(np.full(3, step), np.full(3, 5, np.uint64))
    assert len(tables) == 3  # one for many steps


NAN = float("nan")
BATCH = Batch(
    tokens=np.array([[1, 2, 3], [4, 5, 0]]),
    groups=np.array([0, 0]),
    active=np.array([[True, True, True], [True, True, False]]),
    targets=np.array([[-1, 3, 9], [5, 8, -1]]),
    target_mask=np.array([[False, True, True], [False, True, False]]),
    advantages=np.array([0.5, -2.0]),
    old_logprobs=np.array([[NAN, -1, -2], [NAN, -3, NAN]]),
)


def test_a_loss_reads_the_cells_with_a_target():
    cells = TargetCells.of(BATCH)
    assert cells.rows.tolist() == [0, 0, 1] and cells.timesteps.tolist() == [1, 2, 1]
    assert cells.targets.tolist() == [3, 9, 8]
    assert cells.advantages is not None and cells.advantages.tolist() == [0.5, 0.5, -2.0]
    assert cells.old_logprobs is not None and cells.old_logprobs.tolist() == [-1, -2, -3]
    assert cells.ref_logprobs is None
    assert BATCH.tokens.reshape(-1)[cells.flat(3)].tolist() == [2, 3, 5]


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_what_is_found_at_targets_goes_back_to_their_cells(B, S, seed):
    rng = np.random.default_rng(seed)
    mask, values = rng.random((B, S)) < 0.6, rng.normal(size=(B, S)).astype(np.float32)
    active, ids = np.ones((B, S), bool), np.zeros((B, S), int)
    cells = TargetCells.of(Batch(ids, ids[:, 0], active, ids, mask, old_logprobs=values))
    assert cells.old_logprobs is not None
    back = by_cell(cells.old_logprobs, mask)
    assert back.dtype == np.float32
    for b in range(B):
        for s in range(S):
            assert back[b, s] == (values[b, s] if mask[b, s] else 0)


def test_a_batchs_positions_are_its_own_or_those_of_the_clause():
    assert positions_of(BATCH).tolist() == [[0, 1, 2], [0, 1, 1]]  # clause 2.4
    own = replace(BATCH, positions=np.full((2, 3), 7))
    assert positions_of(own).tolist() == [[7, 7, 7], [7, 7, 7]]
