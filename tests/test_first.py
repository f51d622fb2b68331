"""Published Philox vectors, and the block's first consequences."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.philox import philox4x32, uniforms
from bridge_ref.block import bridge_block


def test_philox_matches_the_published_vectors():
    # Random123's kat_vectors, philox4x32 10.
    assert philox4x32((0, 0, 0, 0), 0).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    assert philox4x32((ones,) * 4, 2**64 - 1).tolist() == [
        0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD,
    ]
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox4x32(pi, 0x299F31D0A4093822).tolist() == [
        0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1,
    ]


def test_uniforms_lie_in_the_unit_interval():
    u = uniforms(7, np.arange(1000), 0, 0)
    assert u.dtype == np.float32 and u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.05


def case(seed, B, S=3, D=6, heads=2):
    rng = np.random.default_rng(seed)
    h = rng.normal(size=(B, S, D))
    group, active = rng.integers(0, 2, B), rng.random((B, S)) < 0.7
    weights = [rng.normal(size=D)] + [rng.normal(size=s) for s in [(8, D)] * 3 + [(D, 8)]]
    return h, group, active, weights, dict(num_heads=heads, eps=1e-6)


@settings(derandomize=True, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_block_consequences(seed, B):
    h, group, active, weights, options = case(seed, B)
    out = bridge_block(h, group, active, *weights, **options)
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(out[~active], h[~active])
    fresh = bridge_block(h, group, active, *weights[:4], np.zeros_like(weights[4]), **options)
    np.testing.assert_array_equal(fresh, h)
    order = np.random.default_rng(seed).permutation(B)
    moved = bridge_block(h[order], group[order], active[order], *weights, **options)
    np.testing.assert_allclose(moved, out[order], rtol=1e-10, atol=1e-12)
    poisoned = np.where(active[:, :, None], h, np.nan)
    again = bridge_block(poisoned, group, active, *weights, **options)
    np.testing.assert_array_equal(again[active], out[active])
    twice = bridge_block(*(np.concatenate([a, a]) for a in (h, group, active)), *weights, **options)
    np.testing.assert_allclose(twice[:B], out, rtol=1e-10, atol=1e-12)
