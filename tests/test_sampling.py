"""The sampling rule (chapter 6) against hand-worked cases and a statement of it in plain loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.contract import Sampling
from bridge.registry import find_backend
from bridge_conformance.cases_ends import EndsCase
from bridge_ref.sampling import sample, sampling_weights

P = np.array([[0.5, 0.2, 0.2, 0.1]])
LOGITS = np.log(P)


def kept(**filters):
    return (sampling_weights(LOGITS, temperature=1.0, **filters)[0] > 0).tolist()


def test_filters_keep_ties_together():
    assert kept(top_k=1) == [True, False, False, False]
    assert kept(top_k=2) == [True, True, True, False]
    assert kept(top_p=0.4) == [True, False, False, False]
    assert kept(top_p=0.6) == [True, True, True, False]
    assert kept(min_p=0.3) == [True, True, True, False]


def test_top_p_counts_only_what_top_k_kept():
    # Of 0.5, 0.2, 0.2 the first has 5/9 = 0.56: below 0.58 the others stay.
    assert kept(top_k=3, top_p=0.58) == [True, True, True, False]
    assert kept(top_k=3, top_p=0.55) == [True, False, False, False]
    assert kept(top_p=0.55) == [True, True, True, False]


def test_inverse_cdf_in_token_order():
    u = np.array([0.0, 0.49, 0.51, 0.69, 0.71, 0.89, 0.91], np.float32)
    ids = sample(np.repeat(LOGITS, len(u), 0), u, temperature=1.0)
    assert ids.tolist() == [0, 0, 1, 1, 2, 2, 3]


def test_frequencies_match_the_tempered_distribution():
    u = (np.arange(100_000) / 100_000).astype(np.float32)
    ids = sample(np.repeat(LOGITS, len(u), 0), u, temperature=0.7)
    want = P[0] ** (1 / 0.7)
    np.testing.assert_allclose(np.bincount(ids) / len(u), want / want.sum(), atol=1e-4)


def test_temperature_zero_takes_the_lowest_id_on_ties():
    assert sample(np.array([[0.0, 2.0, 2.0]]), np.zeros(1), temperature=0).tolist() == [1]


@pytest.mark.parametrize("backend", ("numpy", "torch", "jax", "mlx"))
def test_only_a_temperature_of_0_is_greedy(backend):
    case = EndsCase(16, 0)  # after token 2, all tokens are equally likely
    tensors = case.tensors("float32")
    model = find_backend(backend).load(case.config, tensors, device="cpu", dtype="float32")
    decoder = model.prefill([np.array([2])], [16], 1)
    assert set(decoder.sample(Sampling(0.0))) == {0}
    same = decoder.sample(Sampling(1e-6))
    assert len(set(same)) > 5
    for temperature in (1e-50, 1e-40, 1e-30, 1.0):  # float32 has no 1e-50, and some flush 1e-40
        assert decoder.sample(Sampling(temperature)).tolist() == same.tolist()


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300])
def test_a_temperature_near_zero_is_finite(temperature):
    w = sampling_weights(np.array([[30.0, -1e4, 30.0, 29.0]]), temperature=temperature)
    assert w.tolist() == [[1, 0, 1, 0]]


def in_plain_loops(logits, temperature, top_k, top_p, min_p):
    """The ids that clauses 6.3 to 6.6 keep, with their probabilities, in float64."""
    weight = {t: np.exp((z - max(logits)) / temperature) for t, z in enumerate(logits)}
    if top_k is not None:
        kth = sorted(logits, reverse=True)[min(top_k, len(logits)) - 1]
        weight = {t: w for t, w in weight.items() if logits[t] >= kth}
    if top_p is not None:
        total = sum(weight.values())
        likelier = {t: sum(v for v in weight.values() if v > w) for t, w in weight.items()}
        weight = {t: w for t, w in weight.items() if likelier[t] / total < top_p}
    if min_p is not None:
        weight = {t: w for t, w in weight.items() if w >= min_p}
    total = sum(weight.values())
    return {t: w / total for t, w in weight.items()}


@given(
    # Steps of 1/4 make ties; the thresholds are no sums that these make.
    st.lists(st.integers(-20, 8), min_size=2, max_size=12),
    st.sampled_from([0.5, 1.0, 3.0]),
    st.none() | st.integers(1, 15),
    st.none() | st.sampled_from([0.111, 0.567, 0.913, 1.0]),
    st.none() | st.sampled_from([0.0123, 0.234, 1.0]),
    st.floats(0, 1, exclude_max=True, width=32),
)
def test_a_draw_is_what_plain_loops_give(steps, temperature, top_k, top_p, min_p, u):
    logits = np.array(steps) / 4
    want = in_plain_loops(logits.tolist(), temperature, top_k, top_p, min_p)
    filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    w = sampling_weights(logits[None], **filters)[0]
    assert np.flatnonzero(w).tolist() == list(want)
    np.testing.assert_allclose(w[list(want)] / w.sum(), list(want.values()), rtol=1e-5)
    token = int(sample(logits[None], np.array([u], np.float32), **filters)[0])
    below = sum(p for t, p in want.items() if t < token)
    assert token in want and below - 1e-5 <= u <= below + want[token] + 1e-5
