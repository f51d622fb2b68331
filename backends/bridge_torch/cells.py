"""What layers need to know of a batch beside its hidden states: which cells read which, and where.

Here of a batch `[B, S]` whose cells are all computed, of which some may be inactive: what prefill
and a lent module read. `pieces.py` has the same of what rows share computed once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridge.config import ModelConfig
from bridge.decoding.rows import causal_alone, only_active
from bridge.rope import rotation_tables
from bridge_torch import block
from bridge_torch.block import Grid, cleared, wide


class Rope:
    """Tables of cos and sin by position, from float64 on the host (clause 5.6)."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.tables = torch.empty(2, 0, config.head_dim)

    def __call__(
        self, positions: Int[Tensor, "..."], end: int, dtype: torch.dtype
    ) -> Float[Tensor, "two ... d"]:
        """cos and sin of positions below `end`, in float32 or wider."""
        device, dtype = positions.device, wide(dtype)
        if (self.tables.device, self.tables.dtype) != (device, dtype):
            self.tables = self.tables.new_empty(2, 0, self.tables.shape[-1])
        if end > self.tables.shape[1]:
            length = -(-end // 256) * 256
            tables = rotation_tables(self.config.rope, self.config.head_dim, length)
            self.tables = torch.from_numpy(tables).to(device, dtype)
        rows = self.tables.index_select(1, positions.reshape(-1))
        return rows.reshape(2, *positions.shape, self.tables.shape[-1])


def rotate(x: Float[Tensor, "... heads d"], rope: Float[Tensor, "two ... d"]) -> Tensor:
    """Turn each head by its position, in Hugging Face's layout of halves."""
    cos, sin = rope.unsqueeze(-2)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


@dataclass(frozen=True)
class Cells:
    """What the layers need to know of a batch beside its hidden states; made once a call."""

    grid: Grid
    rope: Float[Tensor, "two B S d"]
    active: Bool[Tensor, "B S"] | None  # None: all are
    masks: Mapping[int | None, Bool[Tensor, "B one S S"] | None]  # by window; None: causal

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        rope: Rope,
        weight: Tensor,
        groups: np.ndarray,
        active: np.ndarray,
        positions: np.ndarray,
    ) -> "Cells":
        """Masks, rope and the grid of a batch `[B, S]`, for a model with such a `weight`. Masks are
        `[B, 1, S, S]` where one is needed; a batch whose padding comes last, inside every window,
        needs none."""
        S, device = active.shape[1], weight.device
        positions = only_active(positions, active)
        place = torch.tensor(positions, dtype=torch.int64, device=device)
        on = None if active.all() else torch.tensor(active, device=device)
        masks: dict[int | None, Tensor | None] = {}
        for window in set(config.sliding_windows or (None,)):
            if causal_alone(active, positions, window):
                masks[window] = None
                continue
            mask = torch.ones(S, S, dtype=torch.bool, device=device).tril()[None]
            if on is not None:
                mask = mask & on[:, None, :]
            if window is not None:
                mask = mask & (place[:, :, None] - place[:, None, :] < window)
            # Every cell may read itself, so that no softmax is empty; inactive ones give 0 below.
            eye = torch.eye(S, dtype=torch.bool, device=device)
            masks[window] = (mask | eye).unsqueeze(1)
        turns = rope(place, int(positions.max(initial=0)) + 1, weight.dtype)
        return cls(Grid.of(groups, device), turns, on, masks)

    def attend(
        self,
        q: Float[Tensor, "B S heads d"],
        k: Float[Tensor, "B S kv_heads d"],
        v: Float[Tensor, "B S kv_heads d"],
        window: int | None,
    ) -> Float[Tensor, "B S heads_d"]:
        """Self-attention of a layer."""
        return attend(q, k, v, self, window)

    def cleared(self, x: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        """Zeros where a cell is not active."""
        return cleared(x, self.active)

    def mixing(self, x: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        """The cells that read others of their timestep: all."""
        return x

    def mix(self, parts: Sequence[Float[Tensor, "B S _"]], H: int | None) -> Float[Tensor, "B S E"]:
        """Attention of a block within timesteps; see `block.mix`."""
        return block.mix(parts, H, self.grid, self.active)


def attend(
    q: Float[Tensor, "B S heads d"],
    k: Float[Tensor, "B S kv_heads d"],
    v: Float[Tensor, "B S kv_heads d"],
    cells: Cells,
    window: int | None,
) -> Float[Tensor, "B S heads_d"]:
    """Causal attention over active cells inside the window (clauses 5.4 and 5.5)."""
    mask = cells.masks[window]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    shared = q.shape[1] // k.shape[1]
    # Of CUDA's kernels flash takes no mask and no float32, and the one that takes both no heads
    # that share keys: the maths one would be left, which has all scores in memory at once.
    if shared > 1 and q.is_cuda and (mask is not None or q.dtype == torch.float32):
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
    )
    return cleared(out.transpose(1, 2).flatten(2), cells.active)
