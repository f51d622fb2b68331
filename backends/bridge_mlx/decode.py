"""Cached decoding of interdependent rows (chapter 4).

A prompt is read once and its keys and values are shared by the rows of its group; what is kept is
in `cache`. The Bridge block has none: it reads the rows that are left. Nothing goes to the host but
drawn tokens, and every step is evaluated before the next is built on it, or beside that where steps
are drawn ahead.

Axes: G prompts, P prefix slots, R rows left, C places computed (a few of which may be of rows that
ended), N rows of the widest group, K key heads, M query heads that share one, d head width.
"""

import math
from collections.abc import Collection, Sequence

import mlx.core as mx
import numpy as np
from jaxtyping import Bool, Float, Int

from bridge.contract import Sampling
from bridge.decoding.inputs import check_advance, check_next_tokens, check_prompts
from bridge.decoding.rows import Rows, left_padded
from bridge.decoding.uniforms import Uniforms, seeds_of
from bridge_mlx.block import Sharing
from bridge_mlx.cache import Cache, KeysValues, Reads
from bridge_mlx.linear import embed
from bridge_mlx.losses import log_probability
from bridge_mlx.model import Transformer
from bridge_mlx.sampling import drawing


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
        """Prefill: the first groups come to a decoder that has none. Raises BridgeError for a
        prompt that is empty or, with `max_new_tokens`, goes past the context (clause 4.4), and for
        a width below 1."""
        self.windows = {layer.window for layer in model.layers}
        with mx.stream(model.device):
            self.model = model.merged()
            self.cache = Cache(model)
            self.next_logits = mx.zeros((0, model.config.vocab_size))
        self.admit(prompts, widths, max_new_tokens, prompt_ids)

    def admit(
        self,
        prompts: Sequence[np.ndarray],
        widths: Sequence[int],
        max_new_tokens: int,
        prompt_ids: Sequence[int] | None = None,
    ) -> None:
        """Groups that come (clauses 4.2 and 4.5). Raises BridgeError as `__init__` does."""
        check_prompts(self.model.config, prompts, widths, max_new_tokens)
        others = Rows.of(prompts, widths, max_new_tokens, prompt_ids)
        with mx.stream(self.model.device):
            self.model.rope.reserve(int(others.lengths.max()) + max_new_tokens)
            last, prefix = self._prefill(prompts)
            self.cache.join(prefix, others)
            came = mx.take(last, mx.array(others.group), axis=0)
            self.next_logits = mx.concatenate([self.next_logits, came])
            mx.eval(self.next_logits)
        self._settle()

    def _prefill(self, prompts: Sequence[np.ndarray]) -> tuple[mx.array, list[KeysValues]]:
        """Read each prompt once, at width 1: logits `[G, V]`, keys and values `[G, K, P, d]`."""
        model, (tokens, active, positions) = self.model, left_padded(prompts)
        prefix: list[KeysValues] = []

        def by_prompt(x: mx.array) -> mx.array:
            return x.reshape(*tokens.shape, *x.shape[1:])

        def keep(i: int, k: mx.array, v: mx.array) -> None:
            k, v = (mx.contiguous(by_prompt(x).swapaxes(1, 2)) for x in (k, v))
            prefix.append((k, v))

        cells = model.cells(tokens, np.arange(len(prompts)), active, positions)
        last = model.head(by_prompt(model.forward(cells, keep))[:, -1])
        mx.eval(last, prefix)
        return last, prefix

    def _settle(self) -> None:
        """Other rows are left from now on, and nothing is drawn of them."""
        rows = self.cache.rows
        self.uniforms = Uniforms(rows.row_ids, rows.prompt_ids, mx.array)
        self._forget()

    def _forget(self) -> None:
        self.drawn: Int[np.ndarray, "R k"] | None = None
        self.latest: mx.array | None = None  # the last column of `drawn`, on the device

    def logits(self) -> np.ndarray:
        """Next-token logits `[R, V]` of the rows left, float32."""
        return np.array(self.next_logits)

    def logprobs(self, tokens: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        """The log-probability of one token for each row left, as its next: `[R]` float32 (clause
        6.10). Raises BridgeError as `check_next_tokens` says."""
        rows = len(self.cache.rows)
        ids = check_next_tokens(self.model.config.vocab_size, rows, tokens, temperature)
        with mx.stream(self.model.device):
            return np.array(log_probability(self.next_logits, ids, temperature)[-1])

    def sample(self, sampling: Sampling | Sequence[Sampling]) -> np.ndarray:
        """Draw the next token of each row left: `[R]` int64. Does not advance."""
        return self.sample_ahead(sampling, 1, ())[:, 0]

    def sample_ahead(
        self, sampling: Sampling | Sequence[Sampling], steps: int, ends: Collection[int]
    ) -> np.ndarray:
        """Draw `[R, k]` int64 tokens (clause 4.6), k as asked unless no row has as many left.

        All of them are on the device before the host waits once. Each step is handed over as soon
        as it is built, so that no graph spans two.
        """
        rows, cache = self.cache.rows, self.cache
        if len(rows) == 0:
            self.drawn, self.latest = np.zeros((0, 1), np.int64), self.next_logits[:, 0]
            return self.drawn.copy()
        k = min(steps, int(rows.left.max()) + 1)
        with mx.stream(self.model.device):
            table, line = self.uniforms.at(rows.steps, seeds_of(sampling, len(rows)), k)
            draw = drawing(sampling)
            alive: mx.array | None = None  # None: all rows are
            tokens = draw(self.next_logits, table[line])
            columns = [tokens]
            if k > 1:
                self.model.rope.reserve(int(rows.positions.max()) + k)  # ended rows count on
                cache.begin_ahead(k - 1)
            for step in range(1, k):
                ended = _ended(tokens, ends, rows.left < step)
                if ended is not None:
                    alive = ~ended if alive is None else alive & ~ended
                self.next_logits = self._feed(tokens, alive)
                tokens = draw(self.next_logits, table[line + step])
                columns.append(tokens if alive is None else mx.where(alive, tokens, -1))
                mx.async_eval(tokens, columns[-1], self.next_logits, cache.ahead)
            self.drawn = np.array(mx.stack(columns, axis=1)).astype(np.int64)
            self.latest = tokens
            if k > 1:
                cache.end_ahead()
        return self.drawn.copy()

    def advance(
        self,
        tokens: np.ndarray | None = None,
        keep: np.ndarray | None = None,
        back: np.ndarray | None = None,
    ) -> None:
        """Go back (clause 4.7), and feed one token to each row kept, the others leave (clauses 4.1
        and 4.3)."""
        rows, cache = self.cache.rows, self.cache
        kept, back = check_advance(
            self.model.config.vocab_size, rows.group, rows.left, self.drawn, tokens, keep, back
        )
        places = np.flatnonzero(kept)
        with mx.stream(self.model.device):
            if tokens is not None:
                fed = mx.array(np.asarray(tokens)[places].astype(np.int32))
            else:
                assert self.latest is not None
                fed = self.latest if kept.all() else mx.take(self.latest, mx.array(places))
            cache.leave(places)
            if back.any():
                cache.go_back(back[places])
            if not kept.all():
                self._settle()
            self._forget()
            if len(places) == 0:
                self.next_logits = self.next_logits[:0]
                return
            cache.reserve(1)
            # What a step under way still reads would be copied, not written in place.
            mx.eval(self.next_logits)
            self.next_logits = self._feed(fed)
            mx.async_eval(self.next_logits, cache.own)

    def _feed(
        self, tokens: Int[mx.array, " R"], alive: Bool[mx.array, " R"] | None = None
    ) -> Float[mx.array, "R V"]:
        """One timestep of the rows left: logits for the next. Those not `alive` influence none."""
        model, cache = self.model, self.cache
        reads = {window: cache.reads(window) for window in self.windows}
        active = None if alive is None else cache.computed(alive)[:, None]
        sharing = Sharing.of(cache.grid, active, 1)
        rope = model.rope(cache.positions)
        h = embed(model.embed, cache.computed(tokens))
        for i, layer in enumerate(model.layers):
            q, k, v = layer.project(h, rope)
            cache.write(i, k, v)
            h = layer.finish(h, self._attend(i, q, reads[layer.window]))
            if layer.block is not None:
                h = layer.block(h, sharing)
        cache.fed()
        return model.head(cache.left(h))

    def _attend(
        self, i: int, q: Float[mx.array, "C heads d"], reads: Reads
    ) -> Float[mx.array, "C heads_d"]:
        """Each row's query over its group's prefix and its own timesteps, in one softmax.

        The prefix is read once a group, by the queries of all its rows together.
        """
        prefix_k, prefix_v = (x[:, :, reads.prefix] for x in self.cache.prefix[i])
        parts = list(self.cache.timesteps(i, reads))
        C, heads, d = q.shape
        K, P = prefix_k.shape[1:3]
        M = heads // K
        # Of the scale a power of two comes before the product, which float16 might not hold, and
        # rounds nothing; the rest, where d is no power of four, in float32.
        scale = 2.0 ** math.floor(math.log2(d**-0.5))
        rest = d**-0.5 / scale
        q = q.reshape(C, K, M, d) * scale
        prefix = self._to_prompts(q) @ prefix_k.swapaxes(-1, -2)
        if reads.of_prefix is not None:
            prefix = mx.where(reads.of_prefix, prefix, -mx.inf)
        own = [_scores(q, k, mask) for k, _, mask in parts]
        own = self._to_prompts(own[0] if len(own) == 1 else mx.concatenate(own, axis=-1))
        score = mx.concatenate([prefix, own], axis=-1).astype(mx.float32)
        score = score if rest == 1 else score * rest
        p = mx.softmax(score, axis=-1, precise=True).astype(q.dtype)
        of_prefix, of_own = mx.split(p, [P], axis=-1)
        y, of_own = self._to_rows(of_prefix @ prefix_v, M), self._to_rows(of_own, M)
        start = 0
        for _, v, _ in parts:
            end = start + v.shape[2]
            y = y + of_own[..., start:end] @ v
            start = end
        return y.reshape(C, heads * d)

    def _to_prompts(self, rows: Float[mx.array, "C K M X"]) -> Float[mx.array, "G K N_M X"]:
        """The rows of a prompt side by side, as what reads its keys together."""
        grid, (_, K, M, X) = self.cache.grid, rows.shape
        cells = grid.spread(rows).reshape(grid.groups, grid.width, K, M, X)
        return cells.swapaxes(1, 2).reshape(grid.groups, K, grid.width * M, X)

    def _to_rows(self, prompts: Float[mx.array, "G K N_M X"], M: int) -> mx.array:
        """`[C, K, M, X]`: what `_to_prompts` put side by side, apart again."""
        grid, (G, K, _, X) = self.cache.grid, prompts.shape
        cells = prompts.reshape(G, K, grid.width, M, X).swapaxes(1, 2)
        return grid.collect(cells.reshape(G * grid.width, K, M, X))


def _scores(
    q: Float[mx.array, "C K M d"], k: Float[mx.array, "C K T d"], mask: mx.array | None
) -> Float[mx.array, "C K M T"]:
    score = q @ k.swapaxes(-1, -2)
    return score if mask is None else mx.where(mask, score, -mx.inf)


def _ended(
    tokens: Int[mx.array, " R"], ends: Collection[int], at_limit: Bool[np.ndarray, " R"]
) -> Bool[mx.array, " R"] | None:
    """Which rows are over with these tokens; None: no row can be."""
    ended = None
    if ends:
        ended = mx.any(tokens[:, None] == mx.array(sorted(ends)), axis=1)
    if at_limit.any():
        limited = mx.array(at_limit)
        ended = limited if ended is None else ended | limited
    return ended
