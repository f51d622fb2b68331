"""One decoding timestep of all rows, in torch's operations, on any device (chapter 4).

`fused.py` computes the same on CPUs in float32. Attention over the prefix that rows share is by
Triton kernels where `shared_prefix.py` serves, and else by batched products: `ByProducts` says what
both compute.

Axes: G prompts, P prefix slots, R rows left, N rows of the widest group, T own timesteps, K key
heads, M query heads that share one, d head width, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridge_torch import shared_prefix
from bridge_torch.block import Grid, wide
from bridge_torch.cache import PaddedCache, Reach
from bridge_torch.packed import Packed
from bridge_torch.shared_prefix import Readers, Units

# Of a layer by number, its window, q `[R, heads, d]`, k and v `[R, kv_heads, d]`, to y
# `[R, heads * d]`; it keeps k and v, and reads those of before.
Attend = Callable[[int, int | None, Tensor, Tensor, Tensor], Tensor]


def step(weights: Packed, cache: PaddedCache, tokens: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
    """One timestep of every row left: logits for the next. The cache takes its keys and values."""
    rows, like = cache.rows, weights.like
    positions = torch.from_numpy(rows.positions).to(like.device)
    rope = weights.rope(positions, int((rows.positions + rows.left).max()), like.dtype)
    at = int(rows.steps[0]) if rows.in_step else torch.from_numpy(rows.steps).to(like.device)
    windows = {layer.window for layer in weights.layers}
    if shared_prefix.serves(like.device, like.dtype, weights.config.head_dim):
        steps = torch.full_like(positions, at) if isinstance(at, int) else at
        attend: Attend = ByKernels.of(
            cache, cache.readers, steps, int(rows.steps.max()) + 1, windows
        )
    else:
        attend = ByProducts(cache, cache.grid, at, {w: cache.reach(w) for w in windows})
    return forward(weights, tokens, rope, cache.grid, attend)


def forward(
    weights: Packed,
    tokens: Int[Tensor, " R"],
    rope: Float[Tensor, "two R d"],
    grid: Grid,
    attend: Attend,
    alive: Bool[Tensor, " R"] | None = None,
) -> Float[Tensor, "R V"]:
    """Logits after one timestep of R rows. Those not `alive` are inactive (None: all are)."""
    active = None if alive is None else alive[:, None]
    h = weights.look_up(tokens)
    for i, layer in enumerate(weights.layers):
        h = layer.attention(h, rope, partial(attend, i, layer.window))
        h = layer.feed_forward(h)
        if layer.block is not None:
            h = layer.block(h[:, None], grid, active)[:, 0]
    return weights.logits(h)


@dataclass(frozen=True)
class ByKernels:
    """What `ByProducts` computes, by the kernels of `shared_prefix.py`. All is on the device."""

    cache: PaddedCache
    at: Int[Tensor, " R"]
    units: Mapping[int | None, tuple[Units, Units]]  # by window

    @classmethod
    def of(
        cls,
        cache: PaddedCache,
        readers: Readers,
        steps: Int[Tensor, " R"],
        timesteps: int,
        windows: set[int | None],
    ) -> "ByKernels":
        """At timesteps `steps`, below `timesteps`."""
        slots = cache.prefix.shape[4]
        units = {w: readers.units(steps, w, slots, timesteps) for w in windows}
        return cls(cache, steps, units)

    def __call__(self, i: int, window: int | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.cache.put(i, k, v, self.at)
        return shared_prefix.attend(q, self.cache.prefix[i], self.cache.own[i], *self.units[window])


@dataclass(frozen=True)
class ByProducts:
    """Each row's query over its group's prefix and its own timesteps, this one too, in one softmax.
    The prefix is read once a group, by the queries of all its rows together."""

    cache: PaddedCache
    grid: Grid
    at: int | Int[Tensor, " R"]  # which timestep this is
    reach: Mapping[int | None, Reach]  # what of the cache is read, by window

    def __call__(
        self,
        i: int,
        window: int | None,
        q: Float[Tensor, "R heads d"],
        k: Float[Tensor, "R kv_heads d"],
        v: Float[Tensor, "R kv_heads d"],
    ) -> Float[Tensor, "R heads_d"]:
        cache, grid, (p0, t0, end, hidden) = self.cache, self.grid, self.reach[window]
        (R, _, d), G, N = q.shape, grid.groups, grid.width
        cache.put(i, k, v, self.at)
        prefix_k, prefix_v = cache.prefix[i, :, :G, :, p0:]
        own_k, own_v = cache.own[i, :, :R, :, t0:end]
        (K, P), T = prefix_k.shape[1:3], own_k.shape[2]

        # Products of views of three axes: half the time of four, for sizes as small as these.
        M = q.shape[1] // K
        q = q.reshape(R * K, M, d)
        cells = grid.spread(q.view(R, K * M * d)).view(G, N, K, M, d).transpose(1, 2)
        on_prefix = _scores(cells.reshape(G * K, N * M, d), prefix_k.flatten(0, 1))
        on_own = _scores(q, own_k.flatten(0, 1)).view(R, K, M, T)
        on_own = grid.spread(on_own).view(G, N, K, M, T).transpose(1, 2)
        score = torch.cat([on_prefix.view(G, K, N, M, P), on_own], -1)
        score = score.to(wide(score.dtype))
        if hidden is not None:
            score[..., : hidden.shape[1]].masked_fill_(hidden[:, None, None, None], float("-inf"))
        p = score.softmax(-1).to(q.dtype)
        from_prefix = p.view(G * K, N * M, -1)[..., :P].bmm(prefix_v.flatten(0, 1))
        y = from_prefix.view(G, K, N, M, d).transpose(1, 2).reshape(G * N, K * M * d)
        p = grid.collect(p[..., P:].transpose(1, 2).reshape(G * N, K, M, T))
        y = grid.collect(y).view(R * K, M, d).baddbmm(p.reshape(R * K, M, -1), own_v.flatten(0, 1))
        return y.view(R, K * M * d)


def _scores(q: Float[Tensor, "U n d"], k: Float[Tensor, "U S d"]) -> Float[Tensor, "U n S"]:
    """Scaled within the product: float16 may not hold what it is before (clause 5.4)."""
    return torch.baddbmm(q.new_zeros(()), q, k.transpose(1, 2), beta=0, alpha=q.shape[2] ** -0.5)
