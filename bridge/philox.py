"""Philox4x32-10, the one random source of sampling and initialisation.

Counter-based (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a draw is a
pure function of (seed, counter), so a row's draw does not depend on what else is in the batch.
"""

import numpy as np

MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
MASK = np.uint64(0xFFFFFFFF)
SHIFT = np.uint64(32)


def philox4x32(counter, seed) -> np.ndarray:
    """Ten rounds of Philox4x32. `counter`: four uint32, which broadcast with each other and with
    `seed`, one uint64 or an array of them; returns uint32 `[..., 4]`."""
    seed = np.asarray(seed, np.uint64)
    c0, c1, c2, c3, seed = np.broadcast_arrays(
        *(np.asarray(c, dtype=np.uint64) for c in counter), seed
    )
    key0, key1 = seed & MASK, seed >> SHIFT
    for _ in range(10):
        p0, p1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (p1 >> SHIFT) ^ c1 ^ key0,
            p1 & MASK,
            (p0 >> SHIFT) ^ c3 ^ key1,
            p0 & MASK,
        )
        key0, key1 = (key0 + WEYL[0]) & MASK, (key1 + WEYL[1]) & MASK
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def uniforms(seed, step, row, prompt) -> np.ndarray:
    """One float32 uniform in [0, 1) a (step, row, prompt): the top 24 bits of the first word.
    All four broadcast."""
    word = philox4x32((step, row, prompt, 0), seed)[..., 0]
    return (word >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)
