"""The host's attention (clauses 5.4 to 5.6): rotary positions, and texts that read themselves.

Decoders have attention of their own, over a cache (`decode.py`). Axes: R rows, S timesteps whose
queries ask, K those whose keys are read, the last S of which are the same; d head width.
"""

import mlx.core as mx
import numpy as np
from jaxtyping import Bool, Float, Int

from bridge.config import ModelConfig
from bridge.rope import rotation_tables
from bridge_mlx.block import fused

SCORES = 2**24  # that are in memory at once, unless a single timestep has more


class Rope:
    """Tables of cos and sin by position, from float64 on the host (clause 5.6).

    `mx.fast.rope` computes its angles in float32, which at position 30000 can be off by 1e-3;
    nor does it take a position a cell, or yarn's attention factor.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._grow(0)

    def _grow(self, length: int) -> None:
        tables = rotation_tables(self.config.rope, self.config.head_dim, length)
        self.tables = mx.array(tables.astype(np.float32))

    def reserve(self, length: int) -> None:
        """Make room for positions below `length`."""
        if length > self.tables.shape[1]:
            self._grow(-(-length // 256) * 256)

    def __call__(self, positions: Int[np.ndarray, "..."]) -> Float[mx.array, "two ... d"]:
        """cos and sin of positions below what was reserved."""
        return mx.take(self.tables, mx.array(positions.astype(np.int32)), axis=1)


def rotate(x: Float[mx.array, "... heads d"], rope: Float[mx.array, "two ... d"]) -> mx.array:
    """Turn each head by its position, in Hugging Face's layout of halves, in float32."""
    cos, sin = mx.expand_dims(rope, -2)
    left, right = mx.split(x, 2, axis=-1)
    return _turn(x, mx.concatenate([right, left], axis=-1), cos, sin)


@fused
def _turn(x: mx.array, swapped: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    return (x * cos + swapped * sin).astype(x.dtype)


def attend(
    q: Float[mx.array, "R S heads d"],
    k: Float[mx.array, "R K kv_heads d"],
    v: Float[mx.array, "R K kv_heads d"],
    mask: Bool[mx.array, "R one S K"] | None,
) -> Float[mx.array, "R S heads d"]:
    """What each query reads where the mask is true; None: of all keys up to its own timestep.

    Some timesteps at a time, whose scores the backward pass computes again: nothing of the size of
    a score matrix waits for it.
    """
    q, k, v = q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2)
    R, heads, S, d = q.shape
    before = k.shape[2] - S
    some = max(1, SCORES // (R * heads * k.shape[2]))
    parts = []
    for start in range(0, S, some):
        end = min(start + some, S)
        read = before + end
        allowed = "causal" if mask is None else mask[:, :, start:end, :read]

        def again(q, k, v, allowed=allowed):
            return mx.fast.scaled_dot_product_attention(q, k, v, scale=d**-0.5, mask=allowed)

        parts.append(mx.checkpoint(again)(q[:, :, start:end], k[:, :, :read], v[:, :, :read]))
    return (parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)).swapaxes(1, 2)
