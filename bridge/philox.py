"""Philox4x32-10, the one random source of sampling and initialisation.

Counter-based (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a draw is a
pure function of (seed, counter), so a row's draw does not depend on what else is in the batch.
"""

import numpy as np

MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (0x9E3779B9, 0xBB67AE85)
MASK = np.uint64(0xFFFFFFFF)
SHIFT = np.uint64(32)


def philox4x32(counter, seed: int) -> np.ndarray:
    """Ten rounds of Philox4x32. `counter`: four broadcastable uint32; returns uint32 `[..., 4]`."""
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(c, dtype=np.uint64) for c in counter))
    key0, key1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (p1 >> SHIFT) ^ c1 ^ np.uint64(key0),
            p1 & MASK,
            (p0 >> SHIFT) ^ c3 ^ np.uint64(key1),
            p0 & MASK,
        )
        key0, key1 = (key0 + WEYL[0]) & 0xFFFFFFFF, (key1 + WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def uniforms(seed: int, step, row, prompt) -> np.ndarray:
    """One float32 uniform in [0, 1) a (step, row, prompt): the top 24 bits of the first word."""
    word = philox4x32((step, row, prompt, 0), seed)[..., 0]
    return (word >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)
