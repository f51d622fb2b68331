"""The reference with shared timesteps computed once is the reference row by row (clause 7.14).

In float64, to a rounding: loss, every gradient, logits and norm ratios, of groups that begin alike
and of groups that do not, with padding, gaps, windows, given positions and low-rank updates.
"""

import numpy as np
import pytest
from hypothesis import given

from bridge.config import tensor_shapes
from bridge.decoding.inputs import positions_of
from bridge.decoding.shared import SharedPlan
from bridge_conformance import strategies, worst
from bridge_ref import model, once
from bridge_ref.losses import loss

CASES = strategies.shared_cases() | strategies.lora_cases()


def close(got: np.ndarray, want: np.ndarray, scale: float, what: str) -> None:
    assert got.shape == want.shape, what
    assert np.abs(got - want).max(initial=0) <= 1e-12 * scale, what


def compare(case) -> None:
    config, tensors = case.rows.model.config, case.rows.model.tensors("float64")
    logits, _ = model.forward(config, tensors, *case.rows.arguments)
    batch = case.batch(logits)
    cells = (batch.tokens, batch.groups, batch.active, positions_of(batch))
    found = []
    for way in (model, once):
        logits, cache = way.forward(config, tensors, *cells)
        metrics, dlogits = loss(case.objective, logits, batch)
        grads = way.backward(config, dlogits, cache)
        ratios = way.norm_ratios(config, tensors, *cells)
        found.append((logits[batch.active], metrics, grads, ratios))
    (logits, metrics, grads, ratios), (got_logits, got_metrics, got_grads, got_ratios) = found
    close(got_logits, logits, max(1, np.abs(logits).max()), "logits")
    close(got_ratios, ratios, max(1, ratios.max(initial=0)), "norm ratios")
    assert got_metrics == pytest.approx(metrics, rel=1e-12, abs=1e-12)
    assert set(got_grads) == set(grads) == set(tensor_shapes(config))
    scale = 1 + max(np.abs(grad).max() for grad in grads.values())
    for name, grad in grads.items():
        close(got_grads[name], grad, scale, name)


@given(case=CASES)
def test_once_is_row_by_row(case):
    compare(case)


@pytest.mark.parametrize("case", worst.SHARED)
def test_once_is_row_by_row_where_it_is_worst(case):
    compare(case)
    rows = case.rows
    plan = SharedPlan.of(rows.tokens, rows.groups, rows.active, rows.positions)
    assert sorted(plan.lead) == [0, 4, 7, 11, 11] and (plan.shared, plan.alone) == (11, 12)
