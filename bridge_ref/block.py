"""The Bridge block: attention whose sequence is the batch, at each timestep separately.

Axes: B rows, S timesteps, D model width, H heads, d head width. Weights are `[out, in]`.
"""

import numpy as np


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def allowed_rows(group: np.ndarray, active: np.ndarray) -> np.ndarray:
    """`allowed[b, b', s]`: same group, and both rows active at s (b' = b included)."""
    same_group = group[:, None] == group[None, :]
    return same_group[:, :, None] & active[:, None, :] & active[None, :, :]


def bridge_block(h, group, active, norm, q_proj, k_proj, v_proj, o_proj, *, num_heads, eps):
    """`h [B, S, D]` plus what each row reads from its group; inactive rows pass unchanged."""
    B, S, _ = h.shape
    x = rms_norm(h, norm, eps)
    q, k, v = ((x @ w.T).reshape(B, S, num_heads, -1) for w in (q_proj, k_proj, v_proj))
    allowed = allowed_rows(group, active)[:, :, :, None]
    score = np.einsum("bsnd,csnd->bcsn", q, k) / np.sqrt(q.shape[-1])
    score = np.where(allowed, score, -np.inf)
    # A row with nothing allowed is inactive: shift by 0 there, so that no inf - inf arises.
    peak = np.max(score, axis=1, keepdims=True)
    p = np.exp(score - np.where(np.isfinite(peak), peak, 0.0))
    p = p / np.maximum(p.sum(axis=1, keepdims=True), np.finfo(p.dtype).tiny)
    # Blocked rows are zeroed in v too: 0 * NaN must not leak across.
    mix = np.zeros_like(q)
    for b in range(B):
        seen = np.where(allowed[b][..., None], v, 0.0)
        mix[b] = np.einsum("csn,csnd->snd", p[b], seen)
    y = mix.reshape(B, S, -1) @ o_proj.T
    return h + np.where(active[:, :, None], y, 0.0)
