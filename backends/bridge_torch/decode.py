"""Cached decoding of interdependent rows (chapter 4).

A prompt is read once and its keys and values are shared by the rows of its group. A step is a
function of packed weights, a cache and tokens: the plain one of `step.py`, or the fused one of
`fused.py`, which computes the same. A decoder keeps the weights that it began with. Nothing goes to
the host but drawn tokens.

Axes: G prompts, P prefix slots, R rows left, K key heads, d head width, D model width,
V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridge.contract import Sampling
from bridge.decoding.inputs import check_advance, check_next_tokens, check_prompts
from bridge.decoding.rows import Rows
from bridge.decoding.uniforms import Uniforms, seeds_of
from bridge_torch import ahead, fused, shared_prefix
from bridge_torch.ahead import Ahead
from bridge_torch.block import wide
from bridge_torch.cache import Cache, PaddedCache, RaggedCache
from bridge_torch.linear import FEW
from bridge_torch.loss import at_targets
from bridge_torch.packed import Packed
from bridge_torch.sampling import draws_of, sample_rows
from bridge_torch.step import step

PAYS = 64  # tokens, from which on laying the weights out for few rows takes less than it saves
CELLS = 2048  # of prompts that are read at once, unless one has more: enough for any device's GEMMs


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
        """Prefill (clause 4.2): the first groups come to a decoder that has none. Raises
        BridgeError for what clause 4.4 refuses."""
        self.weights, like = weights, weights.like
        self.forward: Callable[[Packed, Any, Tensor], Tensor]  # a step over the rows of the cache
        self.cache: Cache
        if fused.serves(like.device.type, like.dtype):
            self.forward, self.cache = fused.step, RaggedCache.empty(weights.config, like)
        else:
            self.forward, self.cache = step, PaddedCache.empty(weights.config, like)
        self.ahead: Ahead | None = None
        if ahead.serves(like.device):
            captures = shared_prefix.serves(like.device, like.dtype, weights.config.head_dim)
            self.ahead = Ahead(weights, captures)
        self.next_logits = like.new_empty(0, len(weights.embed), dtype=wide(like.dtype))
        # What rows are fed, and nobody has asked what it gives: a table may begin with it.
        self.fed: Int[Tensor, " R"] | None = None
        self.admit(prompts, widths, max_new_tokens, prompt_ids)

    @torch.inference_mode()
    def admit(
        self,
        prompts: Sequence[np.ndarray],
        widths: Sequence[int],
        max_new_tokens: int,
        prompt_ids: Sequence[int] | None = None,
    ) -> None:
        """Groups that come (clauses 4.2 and 4.5)."""
        check_prompts(self.weights.config, prompts, widths, max_new_tokens)
        self._settle()
        rows = Rows.of(prompts, widths, max_new_tokens, prompt_ids)
        cache, places = self.cache.joined(rows)
        if len(cache.rows) > FEW or max_new_tokens >= PAYS:
            self.weights.suit(len(cache.rows))
        last = prefill(self.weights, prompts, places)
        group = torch.from_numpy(rows.group).to(last.device)
        self.next_logits = torch.cat([self.next_logits, last.index_select(0, group)])
        self.cache = cache
        self._rows_changed()

    def _rows_changed(self) -> None:
        """Rows have come or left: what is known of them one by one is of others."""
        rows, device = self.cache.rows, self.next_logits.device
        self.uniforms: Uniforms[Tensor] = Uniforms(
            rows.row_ids, rows.prompt_ids, lambda table: torch.from_numpy(table).to(device)
        )
        self._forget()

    def _forget(self) -> None:
        self.drawn: Int[np.ndarray, "R k"] | None = None  # at this step, on the host
        self.next_tokens: Int[Tensor, " R"] | None = None  # the last of them, on the device

    def logits(self) -> np.ndarray:
        """Next-token logits `[R, V]` of the rows left, float32 or wider."""
        self._settle()
        return self.next_logits.cpu().numpy().copy()

    @torch.inference_mode()
    def logprobs(self, tokens: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        """The log-probability of one token for each row left (clause 6.10)."""
        V, rows = self.weights.config.vocab_size, len(self.cache.rows)
        ids = check_next_tokens(V, rows, tokens, temperature)
        self._settle()
        on_device = torch.from_numpy(ids).to(self.next_logits.device)
        return at_targets(self.next_logits, on_device, temperature)[1].cpu().numpy()

    @torch.inference_mode()
    def sample(self, sampling: Sampling | Sequence[Sampling]) -> np.ndarray:
        """Draw the next token of each row left: `[R]` int64. Does not advance."""
        self._settle()
        rows, logits = self.cache.rows, self.next_logits
        table, line = self.uniforms.at(rows.steps, seeds_of(sampling, len(rows)))
        self.next_tokens = sample_rows(logits, table[line], draws_of(sampling, logits.device))
        self.drawn = self.next_tokens.cpu().numpy()[:, None]
        return self.drawn[:, 0].copy()

    @torch.inference_mode()
    def sample_ahead(
        self, sampling: Sampling | Sequence[Sampling], steps: int, ends: Collection[int]
    ) -> np.ndarray:
        """As clause 4.6 says; one column where the host is asked after every token."""
        rows, logits, due = self.cache.rows, self.next_logits, int(self.fed is not None)
        k = min(steps, int(rows.left.max(initial=0)) + 1 - due)
        if self.ahead is None or k == 1 or not len(rows):
            return self.sample(sampling)[:, None]
        assert isinstance(self.cache, PaddedCache)
        table, line = self.uniforms.at(rows.steps + due, seeds_of(sampling, len(rows)), k)
        draws, uniforms = draws_of(sampling, logits.device), table[line : line + k]
        drawn, logits = self.ahead(self.cache, draws, uniforms, ends, logits, self.fed)
        self.cache.rows, self.fed = rows.fed(k - 1 + due), None
        self.next_logits, self.next_tokens = logits, drawn[-1]
        self.drawn = drawn.cpu().numpy().T.copy()
        return self.drawn.copy()

    @torch.inference_mode()
    def advance(
        self,
        tokens: np.ndarray | None = None,
        keep: np.ndarray | None = None,
        back: np.ndarray | None = None,
    ) -> None:
        """Go back (clause 4.7), drop the rows that are not kept, and feed one token to each of the
        others (clause 4.3)."""
        self._settle()
        rows, V, device = self.cache.rows, self.weights.config.vocab_size, self.next_logits.device
        kept, back = check_advance(V, rows.group, rows.left, self.drawn, tokens, keep, back)
        fed = self.next_tokens
        if tokens is not None:
            fed = torch.tensor(tokens, dtype=torch.int64, device=device)
        assert fed is not None
        if back.any():
            self.cache.back(back)
        if not kept.all():
            places = np.flatnonzero(kept)
            self.cache.keep(places)
            fed = fed.index_select(0, torch.from_numpy(places).to(device))
            self.next_logits = self.next_logits[: len(places)]
            self._rows_changed()
        self._forget()
        self.fed = fed if len(fed) else None
        if self.ahead is None:
            self._settle()

    @torch.inference_mode()
    def _settle(self) -> None:
        """Take the timestep that is due."""
        if self.fed is not None:
            self.next_logits = self.forward(self.weights, self.cache, self.fed)
            self.cache.rows, self.fed = self.cache.rows.fed(1), None


@torch.inference_mode()
def prefill(
    weights: Packed,
    prompts: Sequence[np.ndarray],
    places: Sequence[Float[Tensor, "L two K P d"]],
) -> Float[Tensor, "G V"]:
    """Read each prompt once, at width 1: keys and values to their places, and the logits of each
    prompt's next token."""
    lengths = np.array([len(prompt) for prompt in prompts])
    batches = list(_batches(lengths))
    last = [_read(weights, [prompts[g] for g in b], [places[g] for g in b]) for b in batches]
    asked = torch.from_numpy(np.argsort(np.concatenate(batches))).to(weights.embed.device)
    return weights.logits(torch.cat(last).index_select(0, asked))


def _batches(lengths: Int[np.ndarray, " G"]) -> Iterator[Int[np.ndarray, " some"]]:
    """Prompts to read at once, of like lengths: no more cells than `CELLS`, or one prompt."""
    order, first = np.argsort(-lengths, kind="stable"), 0
    while first < len(order):
        count = max(1, CELLS // int(lengths[order[first]]))
        yield order[first : first + count]
        first += count


def _read(weights: Packed, prompts: list[np.ndarray], places: list[Tensor]) -> Float[Tensor, "G D"]:
    """One batch of prompts: the hidden states of their last tokens."""
    lengths, device = np.array([len(prompt) for prompt in prompts]), weights.embed.device
    positions = np.tile(np.arange(lengths.max()), (len(prompts), 1))
    active = positions < lengths[:, None]
    tokens = np.zeros_like(positions)
    tokens[active] = np.concatenate(prompts)

    def keep(i: int, k: Tensor, v: Tensor) -> None:
        for g, place in enumerate(places):
            place[i, 0] = k[g, : lengths[g]].transpose(0, 1)
            place[i, 1] = v[g, : lengths[g]].transpose(0, 1)

    cells = weights.cells(np.arange(len(prompts)), active, positions)
    h = weights.read(torch.from_numpy(tokens).to(device), cells, keep)
    return h[torch.arange(len(prompts), device=device), torch.from_numpy(lengths - 1).to(device)]
