"""What of a batch is computed once a group (clause 7.14), against a plain loop."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bridge.decoding.shared import SharedPlan


@given(st.data())
def test_every_active_cell_is_in_one_place_and_shared_where_all_rows_agree(data: st.DataObject):
    B, S = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    groups = rng.integers(0, 3, B)
    tokens, active = rng.integers(0, 2, (B, S)), rng.random((B, S)) < 0.8
    positions = rng.integers(0, 2, (B, S)) if data.draw(st.booleans()) else np.zeros((B, S), int)
    if data.draw(st.booleans()):  # rows that begin alike
        common = data.draw(st.integers(1, S))
        tokens[:, :common], active[:, :common] = tokens[:1, :common], active[:1, :common]
    plan = SharedPlan.of(tokens, groups, active, positions)

    def said(b: int, s: int) -> tuple:
        return (True, tokens[b, s], positions[b, s]) if active[b, s] else (False,)

    for b in range(B):
        rows = np.flatnonzero(groups == groups[b])
        end = max(int(np.flatnonzero(active[r])[-1]) + 1 if active[r].any() else 0 for r in rows)
        agreed = 0
        while agreed < end and len({said(r, agreed) for r in rows}) == 1:
            agreed += 1
        assert plan.lead[plan.grid.line[b]] == agreed
    flat = np.concatenate([plan.of_shared.ravel(), plan.of_alone.ravel()])
    assert plan.cells == (flat >= 0).sum() and len(np.unique(flat[flat >= 0])) == plan.cells
    for b, s in zip(*np.nonzero(active), strict=True):
        found = flat[plan.places[b, s]]
        where, at = divmod(found, S)
        assert at == s and groups[where] == groups[b] and said(where, s) == said(b, s)
        assert where == b or s < plan.lead[plan.grid.line[b]]


def test_a_row_by_itself_and_equal_rows_have_nothing_alone():
    tokens = np.array([[1, 2, 3], [4, 5, 6], [4, 5, 6]])
    plan = SharedPlan.of(tokens, np.array([7, 3, 3]), np.ones((3, 3), bool), tokens * 0)
    assert (plan.shared, plan.alone, plan.cells) == (3, 0, 6)
    assert plan.of_alone.shape == (3, 0)
