"""Softmax attention over an allowed set, and the host's self-attention, with exact backward.

One primitive serves twice: in the host its sequence is a row's timesteps, in the Bridge block it is
the rows of a group. Conventions as in `ops`. Axes: Q queries, K keys, H heads, d head width.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

from bridge_ref.ops import Cache
from bridge_ref.precision import matmul, rounded, wide


def masked_softmax(
    score: Float[np.ndarray, "... Q K"], allowed: Bool[np.ndarray, "... #Q K"]
) -> Float[np.ndarray, "... Q K"]:
    """Clause 3.5: `exp(score) / sum of exp(score)` over the allowed keys, 0 at the others.

    A query with nothing allowed gets zeros. Computed in the dtype of `score`, which is wide.
    """
    peak = np.max(np.real(score), axis=-1, keepdims=True, where=allowed, initial=-np.inf)
    peak = np.where(np.isfinite(peak), peak, 0)  # nothing allowed: no inf - inf
    weight = np.where(allowed, np.exp(np.where(allowed, score - peak, 0)), 0)
    total = np.sum(weight, axis=-1, keepdims=True)
    return weight / np.where(total == 0, 1, total)


def attention(
    q: Float[np.ndarray, "*heads Q d"],
    k: Float[np.ndarray, "*heads K d"],
    v: Float[np.ndarray, "*heads K d"],
    allowed: Bool[np.ndarray, "..."],
) -> tuple[Float[np.ndarray, "*heads Q d"], Cache]:
    """Clauses 3.3 to 3.5 and 5.4: `p = softmax(q k^T / sqrt(d) where allowed)`, `y = p v`.

    `allowed` broadcasts to `[*heads, Q, K]`.
    """
    scale = 1 / np.sqrt(q.shape[-1]).item()
    score = wide(matmul(q, np.swapaxes(k, -1, -2))) * scale
    p = rounded(masked_softmax(score, allowed), q.dtype)
    return matmul(p, v), (q, k, v, p, scale)


def attention_backward(
    dy: Float[np.ndarray, "*heads Q d"], cache: Cache
) -> tuple[
    Float[np.ndarray, "*heads Q d"],
    Float[np.ndarray, "*heads K d"],
    Float[np.ndarray, "*heads K d"],
]:
    """`dp = dy v^T`, `dscore = p (dp - sum(p dp))`, `dq = dscore k / sqrt(d)`,
    `dk = dscore^T q / sqrt(d)`, `dv = p^T dy`."""
    q, k, v, p, scale = cache
    dp = wide(matmul(dy, np.swapaxes(v, -1, -2)))
    dscore = wide(p) * (dp - np.sum(wide(p) * dp, axis=-1, keepdims=True))
    dscore = rounded(dscore * scale, q.dtype)
    dv = matmul(np.swapaxes(p, -1, -2), dy)
    return matmul(dscore, k), matmul(np.swapaxes(dscore, -1, -2), q), dv


def causal_allowed(
    active: Bool[np.ndarray, "B S"], positions: Int[np.ndarray, "B S"], window: int | None
) -> Bool[np.ndarray, "B S S"]:
    """Clauses 2.3, 5.4 and 5.5: query s may read key s' of its own row where `s' <= s`, both are
    active, and `position[s] - position[s'] < window`."""
    S = active.shape[1]
    allowed = np.tril(np.ones((S, S), bool)) & active[:, :, None] & active[:, None, :]
    if window is not None:
        allowed &= positions[:, :, None] - positions[:, None, :] < window
    return allowed


def self_attention(
    q: Float[np.ndarray, "B Q H d"],
    k: Float[np.ndarray, "B K kv d"],
    v: Float[np.ndarray, "B K kv d"],
    allowed: Bool[np.ndarray, "B Q K"],
) -> tuple[Float[np.ndarray, "B Q H*d"], Cache]:
    """Clause 5.4: attention along a row, a row and head at a time; heads in order, joined.

    Query head n reads key head `n // (H / kv)` (grouped-query attention).
    """
    share = q.shape[2] // k.shape[2]
    q = np.swapaxes(q, 1, 2)
    k, v = (np.repeat(np.swapaxes(x, 1, 2), share, axis=1) for x in (k, v))
    y, cache = attention(q, k, v, allowed[:, None])
    return join_heads(np.swapaxes(y, 1, 2)), (share, cache)


def self_attention_backward(
    dy: Float[np.ndarray, "B Q H*d"], cache: Cache
) -> tuple[
    Float[np.ndarray, "B Q H d"], Float[np.ndarray, "B K kv d"], Float[np.ndarray, "B K kv d"]
]:
    """A key head's gradient is the sum over the query heads that read it."""
    share, attention_cache = cache
    d = attention_cache[0].shape[-1]
    dq, dk, dv = attention_backward(np.swapaxes(split_heads(dy, d), 1, 2), attention_cache)

    def shared(dx: np.ndarray) -> np.ndarray:
        B, H, K, d = dx.shape
        summed = wide(dx).reshape(B, H // share, share, K, d).sum(axis=2)
        return np.swapaxes(rounded(summed, dx.dtype), 1, 2)

    return np.swapaxes(dq, 1, 2), shared(dk), shared(dv)


def split_heads(x: Float[np.ndarray, "B S H*d"], d: int) -> Float[np.ndarray, "B S H d"]:
    """The last axis as heads of width d."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // d, d)


def join_heads(x: Float[np.ndarray, "B S H d"]) -> Float[np.ndarray, "B S H*d"]:
    """Heads side by side."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])
