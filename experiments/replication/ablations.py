"""Other ways for rows to read each other, for torch: what is changed while a context is open.

`self-excluded`: a row reads the others of its group, and itself only where it is alone. A prompt is
still read at width 1, since identical others hold what the row itself does (clause 4.2).
`cut-gradients`: the same numbers, but no gradient flows into another row.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from unittest.mock import patch

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bridge_torch import block, fused
from bridge_torch.block import Grid, wide


def changed(mixing: str | None) -> AbstractContextManager[None]:
    """Every model of torch mixes its rows in that way while this is open; None: as always."""
    return nullcontext() if mixing is None else _patched(mixing)


@contextmanager
def _patched(mixing: str) -> Iterator[None]:
    def mix(
        parts: Sequence[Float[Tensor, "R S _"]],
        H: int | None,
        grid: Grid,
        active: Bool[Tensor, "R S"] | None,
    ) -> Float[Tensor, "R S E"]:
        if H is None:  # P-Match does not mix
            return mixed_always(parts, H, grid, active)
        return read(parts, H, grid, active, mixing)

    mixed_always = block.mix
    # The fused step of decoding has a mixing of its own; without it, the block's is used.
    with patch.object(block, "mix", mix), patch.object(fused, "kernels", lambda: None):
        yield


def read(
    parts: Sequence[Float[Tensor, "R S E"]],
    H: int,
    grid: Grid,
    active: Bool[Tensor, "R S"] | None,
    mixing: str,
) -> Float[Tensor, "R S E"]:
    """Clauses 3.3 to 3.5, but for what the mixing changes."""
    S, G, N = parts[0].shape[1], grid.groups, grid.width
    cells = (grid.spread(part).view(G, N, S, H, -1) for part in parts)
    q, k, v = (cell.permute(0, 2, 3, 1, 4) for cell in cells)  # each [G, S, H, N, d]
    there = torch.ones(G, N, S, dtype=torch.bool, device=q.device)
    if active is not None:
        there = grid.spread(active).view(G, N, S)
    if grid.filled is not None:
        there = there & grid.filled[:, :, None]
    allowed = there.transpose(1, 2)[:, :, None, None, :].expand(G, S, 1, N, N)
    own = torch.eye(N, dtype=torch.bool, device=q.device)
    if mixing == "self-excluded":
        allowed = allowed & ~own
        allowed = allowed | (own & ~allowed.any(-1, keepdim=True))
        score = q @ k.transpose(-1, -2)
    else:
        allowed = allowed | own
        score = torch.where(own, (q * k).sum(-1, keepdim=True), q @ k.detach().transpose(-1, -2))
    score = score.to(wide(score.dtype)) * q.shape[-1] ** -0.5
    p = score.masked_fill(~allowed, float("-inf")).softmax(-1).to(v.dtype)
    if mixing == "self-excluded":
        mixed = p @ v
    else:
        diagonal = p.diagonal(dim1=-2, dim2=-1)[..., None]
        mixed = p @ v.detach() + diagonal * (v - v.detach())
    return grid.collect(mixed.permute(0, 3, 1, 2, 4).reshape(G * N, S, -1))
