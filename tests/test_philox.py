"""Philox4x32-10 against its published vectors, and the uniforms made of it (clauses 6.1, 6.2)."""

import numpy as np

from bridge.philox import philox4x32, uniforms


def test_philox_matches_the_published_vectors():
    # Random123's kat_vectors, philox4x32 10.
    assert philox4x32((0, 0, 0, 0), 0).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = philox4x32((0xFFFFFFFF,) * 4, 2**64 - 1)
    assert ones.tolist() == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = philox4x32((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822)
    assert pi.tolist() == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_uniforms_lie_in_the_unit_interval():
    u = uniforms(7, np.arange(1000), 0, 0)
    assert u.dtype == np.float32 and u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.05


def test_a_draw_does_not_depend_on_what_else_is_drawn():
    table = uniforms(2**63 + 1, np.arange(5)[:, None, None], np.arange(3)[:, None], np.arange(4))
    assert len(np.unique(table)) == table.size
    for step, row, prompt in np.ndindex(table.shape):
        assert uniforms(2**63 + 1, step, row, prompt) == table[step, row, prompt]
