"""Drawing next tokens (chapter 6), in float32 throughout.

The uniforms come from `bridge.philox`, so that a row's draw depends on nothing but the seed and its
step, row and prompt. Axes: R rows, V vocabulary.
"""

import numpy as np
from bridge.contract import Sampling

from bridge_example.tape import Array


def sample(logits: Array, uniform: Array, sampling: Sampling) -> Array:
    """One token a row `[R]` int64, from `logits [R, V]` and `uniform [R]`."""
    if sampling.temperature == 0:  # clause 6.8; argmax takes the first of equals
        return logits.argmax(-1)
    w = weights(logits, sampling)
    cumulative = np.cumsum(w, -1)
    above = cumulative > uniform[:, None] * cumulative[:, -1:]
    last = w.shape[-1] - 1 - np.argmax(w[:, ::-1] > 0, -1)  # where rounding leaves none above
    return np.where(above.any(-1), above.argmax(-1), last)


def weights(z: Array, sampling: Sampling) -> Array:
    """Unnormalised weights of the kept tokens, 0 elsewhere (clauses 6.3 to 6.6): `[R, V]`."""
    z = z - z.max(-1, keepdims=True)
    with np.errstate(over="ignore"):  # a tiny temperature: the exponent is -inf, its weight 0
        w = np.exp(z / np.float32(max(sampling.temperature, np.finfo(np.float32).tiny)))
    if sampling.top_k is not None and sampling.top_k < w.shape[-1]:
        kth = np.partition(z, -sampling.top_k)[:, [-sampling.top_k]]
        w = np.where(z >= kth, w, 0)
    if sampling.top_p is not None:
        w = np.where(w >= nucleus_floor(w, sampling.top_p), w, 0)
    if sampling.min_p is not None:
        w = np.where(w >= np.float32(sampling.min_p), w, 0)  # the largest weight is 1
    return w


def nucleus_floor(w: Array, top_p: float) -> Array:
    """The smallest weight that top-p keeps, `[R, 1]`: the last in falling order before which the
    others hold less than `top_p` of the total. Equal weights stay or go together (clause 6.5)."""
    falling = -np.sort(-w, -1)
    up_to = np.cumsum(falling, -1)
    before = up_to - falling
    inside = before < np.float32(top_p) * up_to[:, -1:]
    return np.take_along_axis(falling, inside.sum(-1, keepdims=True) - 1, -1)
