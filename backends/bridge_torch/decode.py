"""Cached decoding of interdependent rows (chapter 4).

A prompt is read once and its keys and values are shared by the rows of its group. A step is a
function of packed weights, a cache and tokens: the plain one here, or the fused one of `fused.py`,
which computes the same. A decoder keeps the weights that it began with. Nothing goes to the host
but drawn tokens.

Axes: G prompts, P prefix slots, R rows left, N rows of the widest group, T own timesteps, K key
heads, M query heads that share one, d head width, D model width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridge.contract import Sampling
from bridge.decoding.inputs import check_advance, check_prompts
from bridge.decoding.rows import Rows, left_padded, lost_to_window
from bridge.decoding.uniforms import Uniforms, seeds_of
from bridge_torch import fused
from bridge_torch.block import wide
from bridge_torch.cache import Cache
from bridge_torch.packed import Packed
from bridge_torch.sampling import sample

Step = Callable[[Packed, Cache, Tensor], Tensor]


class Decoder:
    """R rows in the order of their prompts; see `bridge.contract.Decoder`."""

    def __init__(
        self,
        weights: Packed,
        prompts: Sequence[np.ndarray],
        widths: Sequence[int],
        max_new_tokens: int,
        prompt_ids: Sequence[int] | None = None,
    ) -> None:
        """Prefill (clause 4.2). Raises BridgeError for a prompt that is empty or, with
        `max_new_tokens`, goes past the context (clause 4.4), and for a width below 1."""
        check_prompts(weights.config, prompts, widths, max_new_tokens)
        self.weights, device = weights, weights.embed.device
        self.forward: Step = step
        if fused.serves(device.type, weights.embed.dtype):
            self.forward = fused.step
        prefix, active, last = prefill(weights, prompts)
        rows = Rows.of(prompts, widths, max_new_tokens, prompt_ids)
        # The last token is never fed back, so one timestep fewer than there may be tokens.
        self.limit = max_new_tokens - 1
        self.cache = Cache.of(prefix, active, rows, self.limit)
        self.next_logits = last.index_select(0, torch.from_numpy(rows.group).to(device))
        self.uniforms = self._uniforms()
        self.drawn: Tensor | None = None

    def logits(self) -> np.ndarray:
        """Next-token logits `[R, V]` of the rows left, float32 or wider."""
        return self.next_logits.cpu().numpy().copy()

    @torch.inference_mode()
    def sample(self, sampling: Sampling) -> np.ndarray:
        """Draw the next token of each row left: `[R]` int64. Does not advance."""
        rows = self.cache.rows
        table, line = self.uniforms.at(rows.steps, seeds_of(sampling, len(rows)))
        self.drawn = sample(self.next_logits, table[line], sampling)
        return self.drawn.cpu().numpy().copy()

    @torch.inference_mode()
    def advance(self, tokens: np.ndarray | None = None, keep: np.ndarray | None = None) -> None:
        """Feed the rows where `keep [R]` one token each, and drop the others (clause 4.3)."""
        cache, V, device = self.cache, self.weights.config.vocab_size, self.next_logits.device
        drawn = None if self.drawn is None else self.drawn.cpu().numpy()[:, None]
        check_advance(V, cache.rows.group, cache.rows.left, drawn, tokens, keep, None)
        if tokens is not None:
            fed = torch.tensor(tokens, dtype=torch.int64, device=device)
        else:
            assert self.drawn is not None
            fed = self.drawn
        if keep is not None and not np.all(keep):
            kept = np.flatnonzero(keep)
            fed = fed.index_select(0, torch.from_numpy(kept).to(device))
            cache.compact(kept)
            self.uniforms = self._uniforms()
        if len(cache.rows) == 0:
            self.next_logits = self.next_logits[:0]
        else:
            self.next_logits = self.forward(self.weights, cache, fed)
        cache.rows, cache.step, self.drawn = cache.rows.fed(1), cache.step + 1, None

    def _uniforms(self) -> Uniforms[Tensor]:
        """Of the rows left, whose numbers stay theirs."""
        rows, device = self.cache.rows, self.next_logits.device
        return Uniforms(rows.row_ids, rows.prompt_ids, lambda t: torch.from_numpy(t).to(device))


@torch.inference_mode()
def prefill(
    weights: Packed, prompts: Sequence[np.ndarray]
) -> tuple[Float[Tensor, "L two G K P d"], Bool[np.ndarray, "G P"], Float[Tensor, "G V"]]:
    """Read each prompt once, at width 1: keys and values by slot, which slots hold a token, and
    the logits of each prompt's next one."""
    config, device = weights.config, weights.embed.device
    tokens, active, positions = left_padded(prompts)
    G, P = tokens.shape
    L, K, d = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    prefix = weights.embed.new_empty(L, 2, G, K, P, d)

    def keep(i: int, k: Tensor, v: Tensor) -> None:
        prefix[i, 0], prefix[i, 1] = k.transpose(1, 2), v.transpose(1, 2)

    cells = weights.cells(np.arange(G), active, positions)
    h = weights.read(torch.from_numpy(tokens).to(device), cells, keep)
    return prefix, active, weights.logits(h[:, -1])


def step(weights: Packed, cache: Cache, tokens: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
    """One timestep of every row left: logits for the next. The cache takes its keys and values."""
    positions = torch.from_numpy(cache.rows.positions).to(tokens.device)
    rope = weights.rope(positions, cache.end, weights.embed.dtype)
    h = F.embedding(tokens, weights.embed)
    for i, layer in enumerate(weights.layers):
        h = layer.attention(h, rope, partial(_attend, cache, i, layer.window))
        h = layer.feed_forward(h)
        if layer.block is not None:
            h = layer.block(h[:, None], cache.grid)[:, 0]
    return weights.logits(h)


def _attend(
    cache: Cache,
    i: int,
    window: int | None,
    q: Float[Tensor, "R heads d"],
    k: Float[Tensor, "R kv_heads d"],
    v: Float[Tensor, "R kv_heads d"],
) -> Float[Tensor, "R heads_d"]:
    """Each row's query over its group's prefix and its own timesteps, this one too, in one softmax.

    The prefix is read once a group, by the queries of all its rows together.
    """
    (R, _, d), (_, _, _, K, P, _), T = q.shape, cache.prefix.shape, cache.step + 1
    grid, prefix, own = cache.grid, cache.prefix[i], cache.own[i, :, :R]
    G, N = grid.groups, grid.width
    own[0, :, :, cache.step] = k
    own[1, :, :, cache.step] = v
    p0, t0 = lost_to_window(window, P, T)
    prefix_k, prefix_v = prefix[0, :, :, p0:], prefix[1, :, :, p0:]
    own_k, own_v = own[0, :, :, t0:T], own[1, :, :, t0:T]

    # bmm on views of three axes: half the time of matmul on four, for sizes as small as these.
    M = q.shape[1] // K
    q = q.reshape(R * K, M, d)
    cells = grid.spread(q.view(R, K * M * d)).view(G, N, K, M, d).transpose(1, 2)
    on_prefix = cells.reshape(G * K, N * M, d).bmm(prefix_k.flatten(0, 1).transpose(1, 2))
    on_own = q.bmm(own_k.flatten(0, 1).transpose(1, 2)).view(R, K, M, T - t0)
    on_own = grid.spread(on_own).view(G, N, K, M, T - t0).transpose(1, 2)
    score = torch.cat([on_prefix.view(G, K, N, M, P - p0), on_own], -1)
    score = score.to(wide(score.dtype)).mul_(d**-0.5)
    if cache.padding is not None:
        score[..., : P - p0].masked_fill_(cache.padding[..., p0:], float("-inf"))
    p = score.softmax(-1).to(q.dtype)
    from_prefix = p.view(G * K, N * M, -1)[..., : P - p0].bmm(prefix_v.flatten(0, 1))
    y = from_prefix.view(G, K, N, M, d).transpose(1, 2).reshape(G * N, K * M * d)
    p = grid.collect(p[..., P - p0 :].transpose(1, 2).reshape(G * N, K, M, T - t0))
    y = grid.collect(y).view(R * K, M, d).baddbmm(p.reshape(R * K, M, -1), own_v.flatten(0, 1))
    return y.view(R, K * M * d)
