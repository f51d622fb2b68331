"""Cached decoding of interdependent rows (chapter 4).

A prompt is read once and its keys and values are shared by the rows of its group; each row's own
timesteps are in a preallocated cache. The Bridge block has no cache: it reads the rows that are
left. Rows that end leave every array. Nothing goes to the host but drawn tokens, and every step is
evaluated before the next is built on it.

Axes: G prompts, P prefix slots, R rows left, N rows of the widest group, T own timesteps, K key
heads, M query heads that share one, d head width, D model width.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from jaxtyping import Float

from bridge.contract import Sampling
from bridge.decoding.inputs import check_advance, check_prompts
from bridge.decoding.rows import Rows, left_padded, lost_to_window
from bridge.decoding.uniforms import Uniforms, seeds_of
from bridge_mlx.block import Grid, rms_norm
from bridge_mlx.linear import embed
from bridge_mlx.model import Layer, Transformer, feed_forward
from bridge_mlx.sampling import sample

TIMESTEPS = 256  # reserved at a time: memory follows what rows have said, not what they may say

KeysValues = tuple[mx.array, mx.array]


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
        check_prompts(model.config, prompts, widths, max_new_tokens)
        self.model, self.step = model, 0
        self._settle(Rows.of(prompts, widths, max_new_tokens, prompt_ids))
        self.drawn: mx.array | None = None
        # The last token is never fed back, so one timestep fewer than there may be tokens.
        self.limit = max_new_tokens - 1
        model.rope.reserve(int(self.rows.lengths.max()) + max_new_tokens)
        with mx.stream(model.device):
            last = self._prefill(prompts)
            self.next_logits = mx.take(last, mx.array(self.rows.group), axis=0)
            shape = (len(self.rows), model.config.num_key_value_heads, 0, model.config.head_dim)
            empty = mx.zeros(shape, model.dtype)
            self.own = [(empty, empty) for _ in self.prefix]  # [R, K, T, d] each, by layer
            mx.eval(self.next_logits, self.prefix)

    def _prefill(self, prompts: Sequence[np.ndarray]) -> Float[mx.array, "G V"]:
        """Read each prompt once, at width 1."""
        model, (tokens, active, positions) = self.model, left_padded(prompts)
        self.prefix: list[KeysValues] = []  # [G, K, P, d] each, by layer

        def keep(i: int, k: mx.array, v: mx.array) -> None:
            self.prefix.append((mx.contiguous(k.swapaxes(1, 2)), mx.contiguous(v.swapaxes(1, 2))))

        cells = model.cells(np.arange(len(prompts)), active, positions)
        h = model.forward(mx.array(tokens, mx.int32), cells, keep)
        self.padding = None if active.all() else ~mx.array(active[:, None, None, :])
        return model.logits(h[:, -1])

    def _settle(self, rows: Rows) -> None:
        """These rows are left from now on."""
        self.rows, self.grid = rows, Grid.of(rows.group)
        self.uniforms = Uniforms(rows.row_ids, rows.prompt_ids, mx.array)

    def logits(self) -> np.ndarray:
        """Next-token logits `[R, V]` of the rows left, float32."""
        return np.array(self.next_logits)

    def sample(self, sampling: Sampling) -> np.ndarray:
        """Draw the next token of each row left: `[R]` int64. Does not advance."""
        if len(self.rows) == 0:
            self.drawn = self.next_logits[:, 0]
            return np.zeros(0, np.int64)
        with mx.stream(self.model.device):
            rows = self.rows
            table, line = self.uniforms.at(rows.steps, seeds_of(sampling, len(rows)))
            self.drawn = sample(self.next_logits, table[line], sampling)
            return np.array(self.drawn).astype(np.int64)

    def advance(self, tokens: np.ndarray | None = None, keep: np.ndarray | None = None) -> None:
        """Feed the rows where `keep [R]` one token each, and drop the others (clause 4.3)."""
        rows, V = self.rows, self.model.config.vocab_size
        drawn = None if self.drawn is None else np.array(self.drawn)[:, None]
        check_advance(V, rows.group, rows.left, drawn, tokens, keep, None)
        with mx.stream(self.model.device):
            if tokens is not None:
                fed = mx.array(np.asarray(tokens, np.int32))
            else:
                assert self.drawn is not None
                fed = self.drawn
            if keep is not None and not np.all(keep):
                kept = np.flatnonzero(keep)
                fed = mx.take(fed, mx.array(kept), axis=0)
                self._compact(kept)
            if len(self.rows):
                self._reserve()
                self.next_logits = self._forward(fed)
                # Starts on this step, so that no graph spans two.
                mx.async_eval(self.next_logits, self.own)
            self.rows, self.step, self.drawn = self.rows.fed(1), self.step + 1, None

    def _compact(self, kept: np.ndarray) -> None:
        """Only the rows at these places, ascending, stay; prompts without rows go too."""
        before = len(self.rows.lengths)
        rows, prompts = self.rows.keep(kept).compact()
        self._settle(rows)
        if len(rows) == 0:
            self.own, self.prefix = [], []
            self.next_logits = self.next_logits[:0]
            return
        left = mx.array(kept)
        self.own = [(mx.take(k, left, axis=0), mx.take(v, left, axis=0)) for k, v in self.own]
        if len(prompts) < before:
            left = mx.array(prompts)
            self.prefix = [
                (mx.take(k, left, axis=0), mx.take(v, left, axis=0)) for k, v in self.prefix
            ]
            if self.padding is not None:
                self.padding = mx.take(self.padding, left, axis=0)
        # Also what no later step may read: a window can lie past the prefix by now.
        mx.async_eval(self.own, self.prefix)

    def _reserve(self) -> None:
        """Room for this timestep in every row's cache."""
        config = self.model.config
        room = self.own[0][0].shape[2]
        if self.step < room:
            return
        more = min(TIMESTEPS, self.limit - room)
        shape = (len(self.rows), config.num_key_value_heads, more, config.head_dim)
        zeros = mx.zeros(shape, self.model.dtype)
        self.own = [
            (mx.concatenate([k, zeros], axis=2), mx.concatenate([v, zeros], axis=2))
            for k, v in self.own
        ]

    def _forward(self, tokens: mx.array) -> Float[mx.array, "R V"]:
        """One timestep of every row left: logits for the next."""
        model, eps = self.model, self.model.config.rms_norm_eps
        rope = model.rope(self.rows.positions)
        h = embed(model.embed, tokens)
        for i, layer in enumerate(model.layers):
            q, k, v = model.project(layer, rms_norm(h, layer.input_norm, eps), rope)
            own_k, own_v = self.own[i]
            # In place once evaluated: nothing else refers to the array before.
            own_k[:, :, self.step], own_v[:, :, self.step] = k, v
            h = h + layer.o(self._attend(i, layer, q))
            h = h + feed_forward(layer, rms_norm(h, layer.post_norm, eps))
            if layer.block is not None:
                h = layer.block(h[:, None], self.grid)[:, 0]
        return model.logits(h)

    def _attend(
        self, i: int, layer: Layer, q: Float[mx.array, "R heads d"]
    ) -> Float[mx.array, "R heads_d"]:
        """Each row's query over its group's prefix and its own timesteps, in one softmax.

        The prefix is read once a group, by the queries of all its rows together.
        """
        (prefix_k, prefix_v), (own_k, own_v) = self.prefix[i], self.own[i]
        R, K, _, d = own_k.shape
        T, P = self.step + 1, prefix_k.shape[2]
        p0, t0 = lost_to_window(layer.window, P, T)
        prefix_k, prefix_v = prefix_k[:, :, p0:], prefix_v[:, :, p0:]
        own_k, own_v = own_k[:, :, t0:T], own_v[:, :, t0:T]

        M = q.shape[1] // K
        q = q.reshape(R, K, M, d)
        prefix = self._to_prompts(q) @ prefix_k.swapaxes(-1, -2)
        if self.padding is not None:
            prefix = mx.where(self.padding[..., p0:], -mx.inf, prefix)
        own = self._to_prompts(q @ own_k.swapaxes(-1, -2))
        score = mx.concatenate([prefix, own], axis=-1).astype(mx.float32) * d**-0.5
        p = mx.softmax(score, axis=-1, precise=True).astype(q.dtype)
        of_prefix, of_own = mx.split(p, [P - p0], axis=-1)
        y = self._to_rows(of_prefix @ prefix_v, M) + self._to_rows(of_own, M) @ own_v
        return y.reshape(R, K * M * d)

    def _to_prompts(self, rows: Float[mx.array, "R K M X"]) -> Float[mx.array, "G K N_M X"]:
        """The rows of a prompt side by side, as what reads its keys together."""
        _, K, M, X = rows.shape
        cells = self.grid.spread(rows).reshape(self.grid.groups, self.grid.width, K, M, X)
        return cells.swapaxes(1, 2).reshape(self.grid.groups, K, self.grid.width * M, X)

    def _to_rows(self, prompts: Float[mx.array, "G K N_M X"], M: int) -> mx.array:
        """`[R, K, M, X]`: what `_to_prompts` put side by side, apart again."""
        G, K, _, X = prompts.shape
        cells = prompts.reshape(G, K, self.grid.width, M, X).swapaxes(1, 2)
        return self.grid.collect(cells.reshape(G * self.grid.width, K, M, X))
