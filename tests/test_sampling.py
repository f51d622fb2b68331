"""The sampling rule against hand-worked cases and brute force."""

import numpy as np

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
