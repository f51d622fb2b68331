"""Cached decoding of interdependent rows (chapter 4), as `bridge.contract.Decoder` asks.

A prompt is read once, alone, and its keys and values are shared by the rows of its group; from then
on each row has a cache of its own, a pair of arrays a layer. The Bridge block has no cache: it
reads the current timestep of the rows that are left.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from bridge.config import ModelConfig
from bridge.contract import Sampling
from bridge.decoding.inputs import check_advance, check_prompts
from bridge.errors import BridgeError
from bridge.philox import uniforms
from bridge_ref.attention import causal_allowed, self_attention
from bridge_ref.model import Tensors, decoder, head, window_of
from bridge_ref.ops import Cache
from bridge_ref.sampling import sample

# A layer's keys and values of one row, or of one prompt: `[T, kv, d]` each, position t at place t.
KeysValues = tuple[np.ndarray, np.ndarray]


class CachedDecoder:
    """R rows in the order of their prompts. Rows that are not kept are gone for good."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: Tensors,
        prompts: Sequence[Int[np.ndarray, " P"]],
        widths: Sequence[int],
        max_new_tokens: int,
        prompt_ids: Sequence[int] | None = None,
    ) -> None:
        """Prefill (clause 4.2). Raises BridgeError for a prompt that is empty or, with
        `max_new_tokens`, goes past the context (clause 4.4), and for a width below 1."""
        check_prompts(config, prompts, widths, max_new_tokens)
        self.config, self.tensors = config, tensors
        self.step, self.limit = 0, max_new_tokens - 1  # the last token is not fed
        numbers = range(len(prompts)) if prompt_ids is None else prompt_ids
        self.prompt = np.repeat(np.asarray(numbers, np.int64), widths)
        self.group = np.repeat(np.arange(len(prompts)), widths)
        self.row = np.concatenate([np.arange(width) for width in widths])
        self.drawn: np.ndarray | None = None
        # Rows share the prompt's arrays until `advance` gives each row longer ones.
        self.caches: list[list[KeysValues]] = []
        logits = []
        for prompt, width in zip(prompts, widths, strict=True):
            last, cache = prefill(config, tensors, np.asarray(prompt))
            self.caches += [cache] * width
            logits += [last] * width
        self.next_logits: np.ndarray = np.stack(logits)

    def logits(self) -> Float[np.ndarray, "R V"]:
        """Next-token logits of the rows left, wide."""
        return self.next_logits.copy()

    def sample(self, sampling: Sampling) -> Int[np.ndarray, " R"]:
        """Draw each row's next token by its own uniform (clauses 6.2 to 6.8)."""
        uniform = uniforms(sampling.seed, self.step, self.row, self.prompt)
        self.drawn = sample(
            self.next_logits,
            uniform,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
        )
        return self.drawn.copy()

    def advance(
        self,
        tokens: Int[np.ndarray, " R"] | None = None,
        keep: Bool[np.ndarray, " R"] | None = None,
    ) -> None:
        """Feed one token to each row kept (clauses 4.1 and 4.3)."""
        left, V = self.limit - self.step, self.config.vocab_size
        check_advance(V, len(self.row), left, tokens, keep)
        if tokens is None:
            tokens = self.drawn
        if tokens is None:
            raise BridgeError("advance: no tokens given and none drawn; call sample first")
        keep = np.ones(len(self.row), bool) if keep is None else np.asarray(keep, bool)
        self.prompt, self.group, self.row = self.prompt[keep], self.group[keep], self.row[keep]
        self.caches = [cache for cache, kept in zip(self.caches, keep, strict=True) if kept]
        self.step, self.drawn = self.step + 1, None
        if not keep.any():
            self.next_logits = self.next_logits[:0]
            return
        positions = np.array([[len(cache[0][0])] for cache in self.caches])
        extended: list[list[KeysValues]] = [[] for _ in self.caches]

        def attend(i: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, Cache]:
            """Each row's query reads its own cache, now one timestep longer."""
            rows = []
            for r, cache in enumerate(self.caches):
                keys, values = (
                    np.concatenate([past, new[r]])
                    for past, new in zip(cache[i], (k, v), strict=True)
                )
                extended[r].append((keys, values))
                allowed = seen_from(len(keys), window_of(self.config, i))
                y, _ = self_attention(q[r : r + 1], keys[None], values[None], allowed)
                rows.append(y)
            return np.concatenate(rows), ()

        fed = np.asarray(tokens, np.int64)[keep][:, None]
        everywhere = np.ones(fed.shape, bool)
        h, _ = decoder(self.config, self.tensors, fed, self.group, everywhere, positions, attend)
        self.caches = extended
        self.next_logits = head(self.config, self.tensors, h)[0][:, -1]


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
