"""Cached decoding of interdependent rows (chapter 4).

A prompt is read once, at width 1, and its keys and values are shared by the rows of its group; each
row keeps those of its own timesteps. The Bridge block has no cache: it reads the rows that are
left. A row that ends leaves every array, and is computed no more.

Axes: P slots of a prompt, R rows left, T own timesteps, K key heads, M query heads that share one,
d head width, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
from bridge.contract import Sampling
from bridge.decoding.inputs import check_advance, check_prompts
from bridge.philox import uniforms

from bridge_example.model import Transformer, causal
from bridge_example.sampling import sample
from bridge_example.tape import Array, Var, softmax


class Decoder:
    """R rows in the order of their prompts; see `bridge.contract.Decoder`."""

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Array],
        widths: Sequence[int],
        max_new_tokens: int,
        prompt_ids: Sequence[int] | None = None,
    ) -> None:
        """Prefill (clause 4.2). Raises BridgeError for what clause 4.4 refuses."""
        c = model.config
        check_prompts(c, prompts, widths, max_new_tokens)
        self.model, self.step, self.drawn = model, 0, None
        self.prompt = np.repeat(np.arange(len(prompts)), widths)  # [R]
        self.length = np.array([len(prompt) for prompt in prompts])[self.prompt]  # [R]
        # A row keeps these two numbers whatever happens to others: they are its counter (6.2).
        self.row_number = np.concatenate([np.arange(width) for width in widths])
        numbers = np.arange(len(prompts)) if prompt_ids is None else np.asarray(prompt_ids)
        self.prompt_number = numbers[self.prompt]
        # By prompt and layer: keys and values [P, K, d]. The last token is never fed, so a row has
        # one timestep fewer of its own than it may have tokens.
        read_once = [self._prefill(prompt) for prompt in prompts]
        self.prefix = [cache for cache, _ in read_once]
        self.next_logits = np.stack([logits for _, logits in read_once])[self.prompt]  # [R, V]
        own = (len(self.prompt), max(max_new_tokens - 1, 0), c.num_key_value_heads, c.head_dim)
        self.own = [np.zeros((2, *own), np.float32) for _ in range(c.num_hidden_layers)]

    def _prefill(self, prompt: Array) -> tuple[list[tuple[Array, Array]], Array]:
        """One prompt as a group of one row: each layer's keys and values, and its last logits."""
        active, cache = np.ones((1, len(prompt)), bool), []
        positions = np.arange(len(prompt))[None]
        attend = causal(active, positions, self.model.config.sliding_windows)

        def keep(i: int, q: Var, k: Var, v: Var) -> Var:
            cache.append((k.value[0], v.value[0]))
            return attend(i, q, k, v)

        cells = self.model.cells(np.zeros(1, np.int64), active, positions)
        h = self.model.layers(np.asarray(prompt)[None], cells, keep)
        return cache, self.model.logits(h[0, -1]).value

    def logits(self) -> Array:
        """Next-token logits `[R, V]` of the rows left."""
        return self.next_logits.copy()

    def sample(self, sampling: Sampling) -> Array:
        """Draw the next token of each row left: `[R]` int64. Does not advance."""
        uniform = uniforms(sampling.seed, self.step, self.row_number, self.prompt_number)
        self.drawn = sample(self.next_logits, uniform, sampling)
        return self.drawn.copy()

    def advance(self, tokens: Array | None = None, keep: Array | None = None) -> None:
        """Feed the rows where `keep [R]` one token each, and drop the others (clause 4.3)."""
        left, V = self.own[0].shape[2] - self.step, self.model.config.vocab_size
        drawn = None if self.drawn is None else self.drawn[:, None]
        every = np.full(len(self.prompt), left)
        check_advance(V, self.prompt, every, drawn, tokens, keep, None)
        tokens = np.asarray(self.drawn if tokens is None else tokens)
        rows = np.arange(len(self.prompt)) if keep is None else np.flatnonzero(keep)
        if len(rows) < len(self.prompt):
            self._compact(rows)
        self.next_logits = self._forward(tokens[rows]) if len(rows) else self.next_logits[:0]
        self.step, self.drawn = self.step + 1, None

    def _compact(self, rows: Array) -> None:
        """Only the rows at these places stay."""
        self.prompt, self.length = self.prompt[rows], self.length[rows]
        self.row_number, self.prompt_number = self.row_number[rows], self.prompt_number[rows]
        self.own = [cache[:, rows] for cache in self.own]

    def _forward(self, tokens: Array) -> Array:
        """One timestep of every row left: logits `[R, V]` for the next."""
        active = np.ones((len(tokens), 1), bool)
        cells = self.model.cells(self.prompt, active, (self.length + self.step)[:, None])
        h = self.model.layers(tokens[:, None], cells, self._attend)
        return self.model.logits(h[:, 0]).value

    def _attend(self, i: int, q: Var, k: Var, v: Var) -> Var:
        """Each row's one query over its prompt and its own timesteps, in one softmax.

        The rows of a group read the same keys and values of the prompt; nothing is copied to them.
        """
        windows, T = self.model.config.sliding_windows, self.step + 1
        self.own[i][0, :, T - 1], self.own[i][1, :, T - 1] = k.value[:, 0], v.value[:, 0]
        y = np.empty_like(q.value)
        for prompt in np.unique(self.prompt):
            rows = self.prompt == prompt
            query = q.value[rows, 0] * q.shape[-1] ** -0.5  # [n, K, M, d]
            prefix_k, prefix_v = self.prefix[prompt][i]
            own_k, own_v = self.own[i][:, rows, :T]
            P = len(prefix_k)
            prefix = np.einsum("nkmd,pkd->nkmp", query, prefix_k)
            own = np.einsum("nkmd,ntkd->nkmt", query, own_k)
            behind = np.arange(P + T)[::-1]  # how many timesteps ago each slot was
            allowed = behind < ((windows[i] if windows else None) or P + T)
            p = softmax(Var(np.concatenate([prefix, own], -1)), allowed).value
            from_prefix = np.einsum("nkmp,pkd->nkmd", p[..., :P], prefix_v)
            y[rows, 0] = from_prefix + np.einsum("nkmt,ntkd->nkmd", p[..., P:], own_v)
        return Var(y)
