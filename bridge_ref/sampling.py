"""Sampling: temperature, then top-k, top-p, min-p, then the inverse CDF in token order, float32.

Filters are stated without a sort order, so that ties mean the same on every backend.
"""

import numpy as np


def sampling_weights(
    logits: np.ndarray,
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> np.ndarray:
    """Unnormalised float32 weights `[B, V]` of the kept tokens, zero elsewhere; `temperature > 0`.

    top-k keeps every token whose logit is at least the k-th largest; top-p keeps a token where the
    probability of strictly likelier tokens is below `top_p`; min-p keeps at least `min_p * max`.
    """
    z = logits.astype(np.float32) / np.float32(temperature)
    w = np.exp(z - z.max(axis=-1, keepdims=True))
    if top_k is not None and top_k < w.shape[-1]:
        threshold = np.partition(z, -top_k, axis=-1)[:, [-top_k]]
        w = np.where(z >= threshold, w, np.float32(0))
    if top_p is not None:
        for row in w:  # rows apart: a clear statement of the rule, not a fast one
            descending = np.sort(row)[::-1]
            before = np.concatenate([[0], np.cumsum(descending / descending.sum())[:-1]])
            first = np.searchsorted(-descending, -row, side="left")  # the likelier tokens' count
            row[before[first] >= top_p] = 0
    if min_p is not None:
        w = np.where(w >= np.float32(min_p), w, np.float32(0))  # the largest weight is exp(0) = 1
    return w


def sample(logits: np.ndarray, uniform: np.ndarray, *, temperature: float, **filters) -> np.ndarray:
    """Token ids `[B]`: argmax (lowest id on ties) at temperature 0, else the lowest id whose
    cumulative weight exceeds `uniform [B]` times the total."""
    if temperature == 0:
        return np.argmax(logits, axis=-1)
    w = sampling_weights(logits, temperature=temperature, **filters)
    cumulative = np.cumsum(w, axis=-1, dtype=np.float32)
    above = cumulative > uniform[:, None].astype(np.float32) * cumulative[:, -1:]
    last_kept = w.shape[-1] - 1 - np.argmax(w[:, ::-1] > 0, axis=-1)
    # Rounding can leave no token above: then the last kept one.
    return np.where(above.any(axis=-1), np.argmax(above, axis=-1), last_kept)
