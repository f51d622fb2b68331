"""Cached decoding of interdependent rows (chapter 4).

A prompt is read once and its keys and values are shared by the rows of its group; each row's own
timesteps are in a preallocated cache. The Bridge block has no cache: it reads the rows that are
left. Rows that end leave every tensor, in place. Nothing goes to the host but drawn tokens.

Axes: G prompts, P prefix slots, R rows left, N rows of the widest group, T own timesteps, K key
heads, M query heads that share one, d head width, D model width.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bridge.contract import Sampling
from bridge.decoding.inputs import check_advance, check_prompts
from bridge.errors import BridgeError
from bridge_torch.block import Grid, rms_norm, wide
from bridge_torch.fused import FusedStep
from bridge_torch.model import Layer, Transformer, feed_forward
from bridge_torch.sampling import Uniforms, sample


class Decoder:
    """R rows in the order of their prompts; see `bridge.contract.Decoder`."""

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[np.ndarray],
        widths: Sequence[int],
        max_new_tokens: int,
        prompt_ids: Sequence[int] | None = None,
    ) -> None:
        """Prefill (clause 4.2). Raises BridgeError for a prompt that is empty or, with
        `max_new_tokens`, goes past the context (clause 4.4), and for a width below 1."""
        config = model.config
        check_prompts(config, prompts, widths, max_new_tokens)
        self.model, self.step = model, 0
        self.lengths = np.array([len(prompt) for prompt in prompts])
        self.group = np.repeat(np.arange(len(prompts)), widths)
        self.grid = Grid.of(self.group, model.device)
        numbers = range(len(prompts)) if prompt_ids is None else prompt_ids
        rows = np.concatenate([np.arange(width) for width in widths])
        prompt_of_row = np.repeat(np.asarray(numbers, np.int64), widths)
        self.uniforms = Uniforms(rows, prompt_of_row, model.device)
        self.drawn: Tensor | None = None
        model.rope.reserve(int(self.lengths.max()) + max_new_tokens)

        last = self._prefill(prompts)
        spread = torch.from_numpy(self.group).to(model.device)
        self.next_logits = last.index_select(0, spread)
        L, R, K = config.num_hidden_layers, len(self.group), config.num_key_value_heads
        # The last token is never fed back, so one timestep fewer than there may be tokens.
        self.limit = max_new_tokens - 1
        self.own = torch.empty(
            (L, 2, R, K, max(self.limit, 1), config.head_dim),
            device=model.device,
            dtype=model.dtype,
        )
        self.fused = FusedStep.of(self)

    @torch.inference_mode()
    def _prefill(self, prompts: Sequence[np.ndarray]) -> Float[Tensor, "G V"]:
        """Read each prompt once, at width 1. Shorter ones are padded on the left, so that a slot's
        distance from the end is the same for all."""
        model, config = self.model, self.model.config
        G, P = len(prompts), int(self.lengths.max())
        tokens = np.zeros((G, P), np.int64)
        active = np.arange(P) >= P - self.lengths[:, None]
        for row, prompt in zip(tokens, prompts, strict=True):
            row[P - len(prompt) :] = prompt
        positions = np.maximum(np.arange(P) - (P - self.lengths[:, None]), 0)
        L, K, d = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        self.prefix = torch.empty((L, 2, G, K, P, d), device=model.device, dtype=model.dtype)

        def keep(i: int, k: Tensor, v: Tensor) -> None:
            self.prefix[i, 0], self.prefix[i, 1] = k.transpose(1, 2), v.transpose(1, 2)

        cells = model.cells(np.arange(G), active, positions)
        h = model.forward(torch.from_numpy(tokens).to(model.device), cells, keep)
        padding = None if active.all() else ~torch.from_numpy(active).to(model.device)
        self.padding = None if padding is None else padding[:, None, None, None, :]
        return model.logits(h[:, -1])

    def logits(self) -> np.ndarray:
        """Next-token logits `[R, V]` of the rows left, float32 or wider."""
        return self.next_logits.cpu().numpy().copy()

    @torch.inference_mode()
    def sample(self, sampling: Sampling) -> np.ndarray:
        """Draw the next token of each row left: `[R]` int64. Does not advance."""
        uniform = self.uniforms.at(self.step, sampling.seed)
        self.drawn = sample(self.next_logits, uniform, sampling)
        return self.drawn.cpu().numpy().copy()

    @torch.inference_mode()
    def advance(self, tokens: np.ndarray | None = None, keep: np.ndarray | None = None) -> None:
        """Feed the rows where `keep [R]` one token each, and drop the others (clause 4.3)."""
        left, V = self.limit - self.step, self.model.config.vocab_size
        check_advance(V, len(self.group), left, tokens, keep)
        device = self.model.device
        if tokens is not None:
            fed = torch.tensor(tokens, dtype=torch.int64, device=device)
        elif self.drawn is not None:
            fed = self.drawn
        else:
            raise BridgeError("advance: no tokens given and none drawn; call sample first")
        if keep is not None and not np.all(keep):
            rows = np.flatnonzero(keep)
            fed = fed.index_select(0, torch.from_numpy(rows).to(device))
            self._compact(rows)
        if len(self.group) == 0:
            self.next_logits = self.next_logits[:0]
        else:
            self.next_logits = (self.fused or self._forward)(fed)
        self.step, self.drawn = self.step + 1, None

    def _compact(self, rows: np.ndarray) -> None:
        """Only the rows at these places, ascending, stay; prompts without rows go too."""
        for new, old in enumerate(rows):
            if new != old:
                self.own[:, :, new, :, : self.step] = self.own[:, :, old, :, : self.step]
        prompts, self.group = np.unique(self.group[rows], return_inverse=True)
        if len(prompts) < len(self.lengths):
            left = torch.from_numpy(prompts).to(self.model.device)
            self.lengths, self.prefix = self.lengths[prompts], self.prefix.index_select(2, left)
            if self.padding is not None:
                self.padding = self.padding.index_select(0, left)
        self.uniforms.keep(rows)
        self.grid = Grid.of(self.group, self.model.device)

    def _forward(self, tokens: Tensor) -> Float[Tensor, "R V"]:
        """One timestep of every row left: logits for the next."""
        model, eps = self.model, self.model.config.rms_norm_eps
        positions = torch.from_numpy(self.lengths[self.group] + self.step).to(model.device)
        rope = model.rope(positions)
        h = F.embedding(tokens, model.embed)
        for i, layer in enumerate(model.layers):
            q, k, v = model.project(layer, rms_norm(h, layer.input_norm, eps), rope)
            R = len(h)
            self.own[i, 0, :R, :, self.step] = k
            self.own[i, 1, :R, :, self.step] = v
            h = layer.o.add_to(h, self._attend(i, layer, q))
            h = feed_forward(layer, h, rms_norm(h, layer.post_norm, eps))
            if layer.block is not None:
                h = layer.block(h[:, None], self.grid)[:, 0]
        return model.logits(h)

    def _attend(
        self, i: int, layer: Layer, q: Float[Tensor, "R heads d"]
    ) -> Float[Tensor, "R heads_d"]:
        """Each row's query over its group's prefix and its own timesteps, in one softmax.

        The prefix is read once a group, by the queries of all its rows together.
        """
        grid, R, d = self.grid, len(q), q.shape[-1]
        G, N, K, T, P = (
            grid.groups,
            grid.width,
            self.own.shape[3],
            self.step + 1,
            self.prefix.shape[4],
        )
        # A window leaves out the same slots and timesteps for every row: it is counted back from
        # the present one, and the prefixes end at the same slot.
        lost = 0 if layer.window is None else max(0, P + T - layer.window)
        p0, t0 = min(lost, P), max(0, lost - P)
        prefix_k, prefix_v = self.prefix[i, 0, :, :, p0:], self.prefix[i, 1, :, :, p0:]
        own_k, own_v = self.own[i, 0, :R, :, t0:T], self.own[i, 1, :R, :, t0:T]

        # bmm on views of three axes: half the time of matmul on four, for sizes as small as these.
        M = q.shape[1] // K
        q = q.reshape(R * K, M, d)
        cells = grid.spread(q.view(R, K * M * d)).view(G, N, K, M, d).transpose(1, 2)
        prefix = cells.reshape(G * K, N * M, d).bmm(prefix_k.flatten(0, 1).transpose(1, 2))
        own = q.bmm(own_k.flatten(0, 1).transpose(1, 2)).view(R, K, M, T - t0)
        own = grid.spread(own).view(G, N, K, M, T - t0).transpose(1, 2)
        score = torch.cat([prefix.view(G, K, N, M, P - p0), own], -1)
        score = score.to(wide(score.dtype)).mul_(d**-0.5)
        if self.padding is not None:
            score[..., : P - p0].masked_fill_(self.padding[..., p0:], float("-inf"))
        p = score.softmax(-1).to(q.dtype)
        from_prefix = p.view(G * K, N * M, -1)[..., : P - p0].bmm(prefix_v.flatten(0, 1))
        y = from_prefix.view(G, K, N, M, d).transpose(1, 2).reshape(G * N, K * M * d)
        p = grid.collect(p[..., P - p0 :].transpose(1, 2).reshape(G * N, K, M, T - t0))
        y = grid.collect(y).view(R * K, M, d).baddbmm(p.reshape(R * K, M, -1), own_v.flatten(0, 1))
        return y.view(R, K * M * d)
