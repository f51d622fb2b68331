"""The Bridge block (chapter 3): attention whose sequence is the batch, a timestep at a time.

Also P-Match (clause 8.1), its baseline of equal size that reads nothing from other rows. Both add
to the residual stream of active cells and pass inactive ones through, whatever these hold.
Conventions as in `ops`. Axes: B rows, N rows of one group, S timesteps, D model width, H heads,
d head width, E = H d.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, Int

from bridge.config import BridgeConfig
from bridge_ref.attention import attention, attention_backward, join_heads, split_heads
from bridge_ref.ops import (
    Cache,
    linear,
    linear_backward,
    rms_norm,
    rms_norm_backward,
    silu,
    silu_backward,
)
from bridge_ref.precision import wide

Weights = Mapping[str, np.ndarray]


def allowed_rows(
    groups: Int[np.ndarray, " B"], active: Bool[np.ndarray, "B S"]
) -> Bool[np.ndarray, "B B S"]:
    """Clause 3.4: `allowed[b, b', s]`: same group, and both active at s (b' = b included)."""
    same_group = groups[:, None] == groups[None, :]
    return same_group[:, :, None] & active[:, None, :] & active[None, :, :]


def bridge_block(
    h: Float[np.ndarray, "B S D"],
    groups: Int[np.ndarray, " B"],
    active: Bool[np.ndarray, "B S"],
    weights: Weights,
    bridge: BridgeConfig,
) -> tuple[Float[np.ndarray, "B S D"], Cache]:
    """Clause 3.6: `h + y` where active, `h` elsewhere; y by `bridge.kind`.

    `weights` are the block's tensors by their names after `bridge.` (`norm.weight`, ...).
    """
    # The norm of a zeroed cell is zero: nothing of an inactive cell is left, not even NaN.
    seen = np.where(active[:, :, None], h, np.zeros((), h.dtype))
    x, norm_cache = rms_norm(seen, weights["norm.weight"], bridge.norm_eps)
    if bridge.kind == "attention":
        y, mix_cache = rows_attention(x, groups, active, weights, bridge.head_dim)
    else:
        y, mix_cache = row_mlp(x, weights)
    out = np.where(active[:, :, None], seen + y, h)
    return out, (active, norm_cache, bridge.kind, mix_cache, y)


def bridge_block_backward(
    dout: Float[np.ndarray, "B S D"], cache: Cache
) -> tuple[Float[np.ndarray, "B S D"], dict[str, np.ndarray]]:
    """`dh = dout`, plus what flows through y, across the rows of a group; and the weights'."""
    active, norm_cache, kind, mix_cache, _ = cache
    dy = np.where(active[:, :, None], dout, np.zeros((), dout.dtype))
    if kind == "attention":
        dx, grads = rows_attention_backward(dy, mix_cache)
    else:
        dx, grads = row_mlp_backward(dy, mix_cache)
    dseen, dnorm = rms_norm_backward(dx, norm_cache)
    dh = dout + np.where(active[:, :, None], dseen, np.zeros((), dout.dtype))
    return dh, {"norm.weight": dnorm, **grads}


def cell_ratios(cache: Cache) -> Float[np.ndarray, "B S"]:
    """Clause 3.9: `||y[b, s]|| / ||h[b, s]||`, wide, from what `bridge_block` gives for its
    backward; 0 at a cell whose h is 0, as it is where none is active."""
    _, (h, _, _), _, _, y = cache
    added, before = (np.linalg.norm(wide(z), axis=-1) for z in (y, h))
    return np.divide(added, before, out=np.zeros_like(before), where=before != 0)


def norm_ratio(cache: Cache) -> Float[np.ndarray, ""]:
    """Clause 3.9: the mean of `cell_ratios` over active cells; 0 where there is none."""
    ratio = cell_ratios(cache)[cache[0]]
    return ratio.sum() / max(ratio.size, 1)


def rows_attention(
    x: Float[np.ndarray, "B S D"],
    groups: Int[np.ndarray, " B"],
    active: Bool[np.ndarray, "B S"],
    weights: Weights,
    head_dim: int,
) -> tuple[Float[np.ndarray, "B S D"], Cache]:
    """Clauses 3.3 to 3.6: at each timestep, the rows of a group attend to each other.

    `q, k, v = x W^T`; `p[b, b', s] = softmax over allowed b' of <q[b, s], k[b', s]> / sqrt(d)`;
    `y[b, s] = concat over heads of (sum over b' of p[b, b', s] v[b', s]) W_O^T`.
    No positions and no causal mask: rows are exchangeable.
    """
    q, q_cache = linear(x, weights["q_proj.weight"])
    k, k_cache = linear(x, weights["k_proj.weight"])
    v, v_cache = linear(x, weights["v_proj.weight"])
    mixed, group_caches = np.zeros_like(q), []
    # A group at a time, so that other groups' rows are not even read.
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        allowed = allowed_rows(groups[rows], active[rows])
        q_group, k_group, v_group = (rows_last(split_heads(z[rows], head_dim)) for z in (q, k, v))
        y, cache = attention(q_group, k_group, v_group, allowed.transpose(2, 0, 1)[:, None])
        mixed[rows] = join_heads(rows_first(y))
        group_caches.append((rows, cache))
    y, o_cache = linear(mixed, weights["o_proj.weight"])
    return y, (q_cache, k_cache, v_cache, group_caches, o_cache, head_dim)


def rows_attention_backward(
    dy: Float[np.ndarray, "B S D"], cache: Cache
) -> tuple[Float[np.ndarray, "B S D"], dict[str, np.ndarray]]:
    """The steps of `rows_attention`, last to first."""
    q_cache, k_cache, v_cache, group_caches, o_cache, head_dim = cache
    dmixed, do_proj, _ = linear_backward(dy, o_cache)
    dq, dk, dv = (np.zeros_like(dmixed) for _ in range(3))
    for rows, attention_cache in group_caches:
        dgroup = rows_last(split_heads(dmixed[rows], head_dim))
        for dz, dz_group in zip(
            (dq, dk, dv), attention_backward(dgroup, attention_cache), strict=True
        ):
            dz[rows] = join_heads(rows_first(dz_group))
    dx_q, dq_proj, _ = linear_backward(dq, q_cache)
    dx_k, dk_proj, _ = linear_backward(dk, k_cache)
    dx_v, dv_proj, _ = linear_backward(dv, v_cache)
    return dx_q + dx_k + dx_v, {
        "q_proj.weight": dq_proj,
        "k_proj.weight": dk_proj,
        "v_proj.weight": dv_proj,
        "o_proj.weight": do_proj,
    }


def row_mlp(
    x: Float[np.ndarray, "B S D"], weights: Weights
) -> tuple[Float[np.ndarray, "B S D"], Cache]:
    """Clause 8.1, P-Match: `y = W_down silu(W_up x)`, with 2E inner units."""
    up, up_cache = linear(x, weights["up_proj.weight"])
    activated, silu_cache = silu(up)
    y, down_cache = linear(activated, weights["down_proj.weight"])
    return y, (up_cache, silu_cache, down_cache)


def row_mlp_backward(
    dy: Float[np.ndarray, "B S D"], cache: Cache
) -> tuple[Float[np.ndarray, "B S D"], dict[str, np.ndarray]]:
    """The steps of `row_mlp`, last to first."""
    up_cache, silu_cache, down_cache = cache
    dactivated, ddown_proj, _ = linear_backward(dy, down_cache)
    dx, dup_proj, _ = linear_backward(silu_backward(dactivated, silu_cache), up_cache)
    return dx, {"up_proj.weight": dup_proj, "down_proj.weight": ddown_proj}


def rows_last(x: Float[np.ndarray, "N S H d"]) -> Float[np.ndarray, "S H N d"]:
    """Rows as the sequence that attention reads, for each timestep and head."""
    return x.transpose(1, 2, 0, 3)


def rows_first(x: Float[np.ndarray, "S H N d"]) -> Float[np.ndarray, "N S H d"]:
    """Back to rows, timesteps, heads."""
    return x.transpose(2, 0, 1, 3)
