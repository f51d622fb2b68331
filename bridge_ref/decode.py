"""Cached decoding of interdependent rows (chapter 4), as `bridge.contract.Decoder` asks.

A prompt is read once, alone, and its keys and values are shared by the rows of its group; from then
on each row has a cache of its own, a pair of arrays a layer. The Bridge block has no cache: it
reads the current timestep of the rows that are left.
"""

from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from bridge.config import ModelConfig
from bridge.contract import Sampling
from bridge.decoding.inputs import check_advance, check_next_tokens, check_prompts
from bridge.decoding.rows import Rows
from bridge.decoding.uniforms import alike, seeds_of
from bridge.errors import BridgeError
from bridge.philox import uniforms
from bridge_ref.attention import causal_allowed, self_attention
from bridge_ref.model import Tensors, decoder, head, window_of
from bridge_ref.ops import Cache, log_softmax
from bridge_ref.sampling import sample

# A layer's keys and values of one row, or of one prompt: `[T, kv, d]` each, position t at place t.
KeysValues = tuple[np.ndarray, np.ndarray]


class CachedDecoder:
    """R rows, those of a prompt side by side. Rows that are not kept are gone for good."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: Tensors,
        prompts: Sequence[Int[np.ndarray, " P"]],
        widths: Sequence[int],
        max_new_tokens: int,
        prompt_ids: Sequence[int] | None = None,
    ) -> None:
        """Prefill (clause 4.2): the first groups come to a decoder that has none. Raises
        BridgeError for what clause 4.4 refuses."""
        self.config, self.tensors = config, tensors
        self.rows = Rows.none()
        self.caches: list[list[KeysValues]] = []  # of each row, by layer
        self.next_logits: np.ndarray = np.zeros((0, config.vocab_size))
        self.drawn: np.ndarray | None = None  # [R, k], what was drawn at this step
        self.admit(prompts, widths, max_new_tokens, prompt_ids)

    def admit(
        self,
        prompts: Sequence[Int[np.ndarray, " P"]],
        widths: Sequence[int],
        max_new_tokens: int,
        prompt_ids: Sequence[int] | None = None,
    ) -> None:
        """Groups that come (clause 4.5): each prompt is read alone, and its rows, which are all at
        their step 0, stand after those left. What was drawn is forgotten."""
        self._must_not_be_ahead("admit")
        check_prompts(self.config, prompts, widths, max_new_tokens)
        logits = []
        for prompt, width in zip(prompts, widths, strict=True):
            last, cache = prefill(self.config, self.tensors, np.asarray(prompt))
            # Rows share the prompt's arrays until a step gives each row longer ones.
            self.caches += [cache] * width
            logits += [last] * width
        self.rows = self.rows.joined(Rows.of(prompts, widths, max_new_tokens, prompt_ids))
        before = self.next_logits.astype(logits[0].dtype)
        self.next_logits = np.concatenate([before, np.stack(logits)])
        self.drawn = None

    def logits(self) -> Float[np.ndarray, "R V"]:
        """Next-token logits of the rows left, wide."""
        return self.next_logits.copy()

    def sample(self, sampling: Sampling | Sequence[Sampling]) -> Int[np.ndarray, " R"]:
        """Draw each row's next token by its own uniform and settings (clauses 6.2 to 6.9)."""
        self._must_not_be_ahead("sample")
        tokens = self._draw(sampling)
        self.drawn = tokens[:, None]
        return tokens.copy()

    def _draw(self, sampling: Sampling | Sequence[Sampling]) -> Int[np.ndarray, " R"]:
        """One token a row, each at its own step; of rows that have ended too, to be left out."""
        rows, tokens = self.rows, np.zeros(len(self.rows), np.int64)
        seeds = seeds_of(sampling, len(rows))
        uniform = uniforms(seeds, rows.steps, rows.row_ids, rows.prompt_ids)
        for settings, alike_rows in alike(sampling):
            own = slice(None) if alike_rows is None else alike_rows
            tokens[own] = sample(
                self.next_logits[own],
                uniform[own],
                temperature=settings.temperature,
                top_k=settings.top_k,
                top_p=settings.top_p,
                min_p=settings.min_p,
            )
        return tokens

    def sample_ahead(
        self, sampling: Sampling | Sequence[Sampling], steps: int, ends: Collection[int]
    ) -> Int[np.ndarray, "R k"]:
        """Steps ahead (clause 4.6): draw, and feed the rows that have not ended, until `steps`
        columns are drawn or no row is left to feed."""
        self._must_not_be_ahead("sample_ahead")
        columns = [self._draw(sampling)]
        alive = np.ones(len(self.rows), bool)
        while len(columns) < steps:
            # `left`: of a row that draws its last token, no timestep is left to be fed (2.3).
            alive = alive & ~np.isin(columns[-1], list(ends)) & (self.rows.left > 0)
            if not alive.any():
                break
            self._feed(columns[-1], alive)
            columns.append(np.where(alive, self._draw(sampling), -1))
        self.drawn = np.stack(columns, axis=1)
        return self.drawn.copy()

    def logprobs(
        self, tokens: Int[np.ndarray, " R"], temperature: float = 1.0
    ) -> Float[np.ndarray, " R"]:
        """Clause 6.10: `log softmax(logits / temperature)` of one token a row, wide."""
        self._must_not_be_ahead("logprobs")
        tokens = check_next_tokens(self.config.vocab_size, len(self.rows), tokens, temperature)
        logp, _ = log_softmax(self.next_logits / temperature)
        return logp[np.arange(len(tokens)), tokens]

    def advance(
        self,
        tokens: Int[np.ndarray, " R"] | None = None,
        keep: Bool[np.ndarray, " R"] | None = None,
        back: Int[np.ndarray, " R"] | None = None,
    ) -> None:
        """Go back (clause 4.7), and feed one token to each row kept (clauses 4.1 and 4.3)."""
        rows, V = self.rows, self.config.vocab_size
        kept, back = check_advance(V, rows.group, rows.left, self.drawn, tokens, keep, back)
        if tokens is None:
            assert self.drawn is not None
            tokens = self.drawn[:, -1]
        places = np.flatnonzero(kept)
        self.rows, _ = rows.fed(-back).keep(places).compact()
        # A row has the keys and values of the positions before its next one, and no others. One
        # that ended ahead was fed no further, so going back to its end takes nothing from it.
        self.caches = [
            [(k[:length], v[:length]) for k, v in self.caches[place]]
            for place, length in zip(places, self.rows.positions, strict=True)
        ]
        self.next_logits, self.drawn = self.next_logits[places], None
        self._feed(np.asarray(tokens, np.int64)[places], np.ones(len(places), bool))

    def _must_not_be_ahead(self, what: str) -> None:
        """Rows that have ended are there until `advance` drops them or goes back (clause 10.1)."""
        if self.drawn is not None and self.drawn.shape[1] > 1:
            raise BridgeError(f"{what}: tokens were drawn ahead; call advance first")

    def _feed(self, tokens: Int[np.ndarray, " R"], alive: Bool[np.ndarray, " R"]) -> None:
        """One timestep, at which the rows not `alive` are not there (clause 4.3): nothing of them
        changes but the step that they are counted at, which is the same for all of a group."""
        there = np.flatnonzero(alive)
        group, positions = self.rows.group[there], self.rows.positions[there]
        self.rows = self.rows.fed(1)
        if not len(there):
            return
        extended: list[list[KeysValues]] = [[] for _ in there]

        def attend(i: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, Cache]:
            """Each row's query reads its own cache, now one timestep longer."""
            y = []
            for r, row in enumerate(there):
                keys, values = (
                    np.concatenate([past, new[r]])
                    for past, new in zip(self.caches[row][i], (k, v), strict=True)
                )
                extended[r].append((keys, values))
                allowed = seen_from(len(keys), window_of(self.config, i))
                y.append(self_attention(q[r : r + 1], keys[None], values[None], allowed)[0])
            return np.concatenate(y), ()

        fed, active = tokens[there][:, None], np.ones((len(there), 1), bool)
        cells = (group, active, positions[:, None])
        h, _ = decoder(self.config, self.tensors, fed, *cells, attend)
        self.next_logits[there] = head(self.config, self.tensors, h)[0][:, -1]
        for row, cache in zip(there, extended, strict=True):
            self.caches[row] = cache


def prefill(
    config: ModelConfig, tensors: Tensors, prompt: Int[np.ndarray, " P"]
) -> tuple[Float[np.ndarray, " V"], list[KeysValues]]:
    """Clause 4.2: one prompt at width 1, which is what every row of its group would compute.

    Gives the logits after its last token, and keys and values by layer.
    """
    cache: list[KeysValues] = []
    active = np.ones((1, len(prompt)), bool)
    positions = np.arange(len(prompt))[None]

    def attend(i: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, Cache]:
        cache.append((k[0], v[0]))
        allowed = causal_allowed(active, positions, window_of(config, i))
        return self_attention(q, k, v, allowed)

    groups = np.zeros(1, np.int64)
    h, _ = decoder(config, tensors, prompt[None], groups, active, positions, attend)
    return head(config, tensors, h[:, -1:])[0][0, 0], cache


def seen_from(length: int, window: int | None) -> Bool[np.ndarray, "one one T"]:
    """Which of `length` cached timesteps the last one may read (clause 5.5)."""
    distance = length - 1 - np.arange(length)
    return (distance < (length if window is None else window))[None, None]
