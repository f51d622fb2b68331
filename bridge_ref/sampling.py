"""Sampling (chapter 6): temperature, then top-k, top-p, min-p, then the inverse CDF in token order.

Filters are stated without a sort order, so that ties mean the same on every backend. All of it is
in float32. Axes: R rows, V vocabulary.
"""

import numpy as np
from jaxtyping import Float, Int


def sampling_weights(
    logits: Float[np.ndarray, "R V"],
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Float[np.ndarray, "R V"]:
    """Unnormalised weights of the kept tokens, zero elsewhere; `temperature > 0`.

    Clause 6.3: `w = exp((logit - largest logit) / temperature)`. Clause 6.4: top-k keeps every
    token whose logit is at least the k-th largest. Clause 6.5: top-p keeps a token where strictly
    likelier ones, of those kept so far, have probability below `top_p` together. Clause 6.6: min-p
    keeps a token whose weight is at least `min_p` times the largest.
    """
    z = logits.astype(np.float32)
    z = z - z.max(axis=-1, keepdims=True)
    with np.errstate(over="ignore"):  # a temperature near 0 leaves the likeliest alone
        w = np.exp(z / np.float32(max(temperature, np.finfo(np.float32).tiny)))
    if top_k is not None and top_k < w.shape[-1]:
        threshold = np.partition(z, -top_k, axis=-1)[:, [-top_k]]
        w = np.where(z >= threshold, w, np.float32(0))
    if top_p is not None:
        for row in w:  # rows apart: a clear statement of the rule, not a fast one
            descending = np.sort(row)[::-1]
            before = np.concatenate([[0], np.cumsum(descending / descending.sum())[:-1]])
            likelier = np.searchsorted(-descending, -row, side="left")  # how many are
            row[before[likelier] >= top_p] = 0
    if min_p is not None:
        w = np.where(w >= np.float32(min_p), w, np.float32(0))  # the largest weight is exp(0) = 1
    return w


def sample(
    logits: Float[np.ndarray, "R V"],
    uniform: Float[np.ndarray, " R"],
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Int[np.ndarray, " R"]:
    """Next tokens, int64, from one uniform in [0, 1) a row (clause 6.2).

    Clause 6.7: the lowest id whose cumulative weight exceeds `uniform` times the total. Clause 6.8:
    at temperature 0 the id of the largest logit, the lowest on ties.
    """
    if temperature == 0:
        return np.argmax(logits, axis=-1)
    w = sampling_weights(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    cumulative = np.cumsum(w, axis=-1, dtype=np.float32)
    above = cumulative > uniform[:, None].astype(np.float32) * cumulative[:, -1:]
    last_kept = w.shape[-1] - 1 - np.argmax(w[:, ::-1] > 0, axis=-1)
    # Rounding can leave no token above: then the last kept one.
    return np.where(above.any(axis=-1), np.argmax(above, axis=-1), last_kept)
