"""Cached decoding of interdependent rows (chapter 4).

A prompt is read once, at width 1, and its keys and values are shared by the rows of its group; each
row keeps those of its own timesteps. The Bridge block has no cache: it reads the rows that are
left. A row that ends leaves every array, and is computed no more; a group that comes is appended.

Axes: P slots of a prompt, R rows left, T places for own timesteps, K key heads, M query heads that
share one, d head width, V vocabulary.
"""

from collections.abc import Collection, Sequence

import numpy as np
from bridge.contract import Sampling
from bridge.decoding.inputs import check_advance, check_next_tokens, check_prompts
from bridge.decoding.rows import Rows
from bridge.decoding.uniforms import alike, seeds_of
from bridge.philox import uniforms

from bridge_example.model import Transformer, causal
from bridge_example.sampling import sample
from bridge_example.tape import Array, Var, log_softmax, softmax


class Decoder:
    """R rows, those of a prompt side by side; see `bridge.contract.Decoder`."""

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Array],
        widths: Sequence[int],
        max_new_tokens: int,
        prompt_ids: Sequence[int] | None = None,
    ) -> None:
        """Prefill (clause 4.2): the first groups come to a decoder that has none."""
        c = model.config
        self.model = model
        self.drawn: Array | None = None  # [R, 1], what was drawn last at this step
        self.rows = Rows.none()  # who is left, of which prompt, at which step
        # By prompt and layer: keys and values [P, K, d]. By layer: those of own timesteps.
        self.prefix: list[list[tuple[Array, Array]]] = []
        own = (2, 0, 0, c.num_key_value_heads, c.head_dim)  # [2, R, T, K, d]
        self.own = [np.zeros(own, np.float32) for _ in range(c.num_hidden_layers)]
        self.next_logits = np.zeros((0, c.vocab_size), np.float32)  # [R, V]
        self.admit(prompts, widths, max_new_tokens, prompt_ids)

    def admit(
        self,
        prompts: Sequence[Array],
        widths: Sequence[int],
        max_new_tokens: int,
        prompt_ids: Sequence[int] | None = None,
    ) -> None:
        """Groups that come (clause 4.5). Raises BridgeError for what clause 4.4 refuses."""
        check_prompts(self.model.config, prompts, widths, max_new_tokens)
        coming = Rows.of(prompts, widths, max_new_tokens, prompt_ids)
        read_once = [self._prefill(prompt) for prompt in prompts]
        self.prefix += [cache for cache, _ in read_once]
        logits = np.stack([logits for _, logits in read_once])[coming.group]
        self.next_logits = np.concatenate([self.next_logits, logits])
        self.rows, self.drawn = self.rows.joined(coming), None
        # The last token is never fed: a row has a timestep fewer of its own than it has tokens.
        R, T = len(self.rows), int(self.rows.limits.max())
        self.own = [grown(cache, R, T) for cache in self.own]

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

    def sample(self, sampling: Sampling | Sequence[Sampling]) -> Array:
        """Draw the next token of each row left: `[R]` int64. Does not advance."""
        rows, tokens = self.rows, np.zeros(len(self.rows), np.int64)
        seeds = seeds_of(sampling, len(rows))
        # A row keeps its numbers and its step, whatever happens to others: its counter (6.2).
        uniform = uniforms(seeds, rows.steps, rows.row_ids, rows.prompt_ids)
        for settings, some in alike(sampling):  # clause 6.9
            own = slice(None) if some is None else some
            tokens[own] = sample(self.next_logits[own], uniform[own], settings)
        self.drawn = tokens[:, None]
        return tokens.copy()

    def logprobs(self, tokens: Array, temperature: float = 1.0) -> Array:
        """The log-probability of one token a row as its next: `[R]` (clause 6.10)."""
        V = self.model.config.vocab_size
        tokens = check_next_tokens(V, len(self.rows), tokens, temperature)
        logp = log_softmax(Var(self.next_logits) * (1 / temperature)).value
        return logp[np.arange(len(tokens)), tokens]

    def sample_ahead(
        self, sampling: Sampling | Sequence[Sampling], steps: int, ends: Collection[int]
    ) -> Array:
        """One column (clause 4.6): NumPy has no device whose host must not be asked."""
        return self.sample(sampling)[:, None]

    def advance(
        self, tokens: Array | None = None, keep: Array | None = None, back: Array | None = None
    ) -> None:
        """Feed the rows where `keep [R]` one token each, and drop the others (clause 4.3). `back`
        can only be 0: of one column nothing was fed."""
        rows, V = self.rows, self.model.config.vocab_size
        kept, _ = check_advance(V, rows.group, rows.left, self.drawn, tokens, keep, back)
        if tokens is None:
            assert self.drawn is not None
            tokens = self.drawn[:, 0]
        if not kept.all():
            self._compact(np.flatnonzero(kept))
        if len(self.rows):
            self.next_logits = self._forward(np.asarray(tokens)[kept])
        self.rows, self.drawn = self.rows.fed(1), None

    def _compact(self, places: Array) -> None:
        """Only the rows at these places stay, and the prompts that they answer."""
        self.rows, prompts = self.rows.keep(places).compact()
        self.prefix = [self.prefix[prompt] for prompt in prompts]
        self.own = [cache[:, places] for cache in self.own]
        self.next_logits = self.next_logits[places]

    def _forward(self, tokens: Array) -> Array:
        """One timestep of every row left: logits `[R, V]` for the next."""
        active = np.ones((len(tokens), 1), bool)
        cells = self.model.cells(self.rows.group, active, self.rows.positions[:, None])
        h = self.model.layers(tokens[:, None], cells, self._attend)
        return self.model.logits(h[:, 0]).value

    def _attend(self, i: int, q: Var, k: Var, v: Var) -> Var:
        """Each row's one query over its prompt and its own timesteps, in one softmax.

        The rows of a group read the same keys and values of the prompt; nothing is copied to them.
        They have been fed as many timesteps; rows of other groups may not have.
        """
        windows = self.model.config.sliding_windows
        y = np.empty_like(q.value)
        for prompt, (prefix_k, prefix_v) in enumerate(layers[i] for layers in self.prefix):
            rows = np.flatnonzero(self.rows.group == prompt)
            P, T = len(prefix_k), int(self.rows.steps[rows[0]]) + 1
            self.own[i][:, rows, T - 1] = k.value[rows, 0], v.value[rows, 0]
            own_k, own_v = self.own[i][:, rows, :T]
            query = q.value[rows, 0] * q.shape[-1] ** -0.5  # [n, K, M, d]
            prefix = np.einsum("nkmd,pkd->nkmp", query, prefix_k)
            own = np.einsum("nkmd,ntkd->nkmt", query, own_k)
            behind = np.arange(P + T)[::-1]  # how many timesteps ago each slot was
            allowed = behind < ((windows[i] if windows else None) or P + T)
            p = softmax(Var(np.concatenate([prefix, own], -1)), allowed).value
            from_prefix = np.einsum("nkmp,pkd->nkmd", p[..., :P], prefix_v)
            y[rows, 0] = from_prefix + np.einsum("nkmt,ntkd->nkmd", p[..., P:], own_v)
        return Var(y)


def grown(cache: Array, rows: int, timesteps: int) -> Array:
    """A cache `[2, R, T, K, d]` with places for so many rows, and for as many timesteps or more."""
    _, R, T, _, _ = cache.shape
    more = (0, rows - R), (0, max(timesteps - T, 0))
    return np.pad(cache, ((0, 0), *more, (0, 0), (0, 0)))
