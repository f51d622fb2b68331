"""The one generation loop, for every backend: prompts in, a stream of events out.

Written on the contract: prefill once a prompt, then sample, stop, advance. It knows prompts, rows,
stop rules and batching; the backend knows tensors. A row that ends leaves the computation, and its
last token is never fed back (clause 2.3).
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from bridge.contract import BackendModel, Sampling
from bridge.decoding.inputs import check_context
from bridge.decoding.stops import NO_STOPS, RowText, Stops
from bridge.numbers.ranges import take
from bridge.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Response:
    """One row's answer. `tokens` include the one that ended it. `text` is what they say, without
    special tokens, and up to the first stop text."""

    text: str
    tokens: list[int]
    finish_reason: str  # eos, stop or length


@dataclass(frozen=True)
class ResponseSet:
    """The interdependent answers to one prompt, in row order."""

    prompt: str
    prompt_tokens: list[int]
    responses: list[Response]

    def to_json(self) -> dict[str, Any]:
        """Plain lists and strings."""
        return asdict(self)


@dataclass(frozen=True)
class Started:
    """A batch of prompts has been read, the first of them `first_prompt`."""

    prompt_tokens: list[int]  # lengths
    prefill_seconds: float
    first_prompt: int = 0


@dataclass(frozen=True)
class Token:
    """A row said `token`; `text` is what is certain now of its text and was not before, which may
    be nothing, or more than this token."""

    prompt: int
    row: int
    token: int
    text: str


@dataclass(frozen=True)
class Finished:
    """A row ended: `eos`, `stop` (a stop text or token) or `length`. `text` is what was held back
    until then, where no Token came with the end (`eos`). The texts of a row's events, in order, are
    its Response's text."""

    prompt: int
    row: int
    reason: str
    text: str = ""


@dataclass(frozen=True)
class Done:
    """All prompts are answered."""

    sets: list[ResponseSet]
    prefill_seconds: float
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens of all rows over the time of decoding."""
        tokens = sum(len(r.tokens) for s in self.sets for r in s.responses)
        return tokens / self.decode_seconds if self.decode_seconds else 0.0


Event = Started | Token | Finished | Done


@dataclass(frozen=True)
class Request:
    """A prompt as ids, the text it came from, and how many answers it gets. `prompt_id` is its
    number in the sampling counter (clause 6.2)."""

    text: str
    tokens: list[int]
    width: int
    prompt_id: int


@dataclass(frozen=True)
class Limits:
    """When rows end, and how many are decoded at once."""

    max_new_tokens: int
    eos_ids: frozenset[int]
    stop: Stops = NO_STOPS
    max_rows: int = 256


@dataclass
class _Row:
    prompt: int
    row: int
    said: RowText
    tokens: list[int] = field(default_factory=list)
    reason: str = ""


def run(
    model: BackendModel,
    requests: Sequence[Request],
    sampling: Sampling,
    limits: Limits,
    tokenizer: Tokenizer | None,
) -> Iterator[Event]:
    """Answer every request. Prompts share batches of up to `max_rows` rows; a row's draws and its
    group do not depend on that split."""
    sets: list[ResponseSet] = []
    prefill_seconds = decode_seconds = 0.0
    for first, batch in _batches(requests, limits.max_rows):
        start = time.perf_counter()
        decoder = model.prefill(
            [np.asarray(r.tokens, np.int64) for r in batch],
            [r.width for r in batch],
            limits.max_new_tokens,
            prompt_ids=[r.prompt_id for r in batch],
        )
        prefilled = time.perf_counter()
        yield Started([len(r.tokens) for r in batch], prefilled - start, first)
        rows = [
            _Row(first + g, n, RowText(tokenizer and tokenizer.streamer(), limits.stop.texts))
            for g, request in enumerate(batch)
            for n in range(request.width)
        ]
        left = rows
        while left:
            # Time spent in whoever reads the events is not ours to count.
            before = time.perf_counter()
            tokens = decoder.sample(sampling)
            events = [
                e
                for row, token in zip(left, tokens, strict=True)
                for e in _take(row, token, limits)
            ]
            keep = np.array([not row.reason for row in left])
            left = [row for row in left if not row.reason]
            if left:
                decoder.advance(tokens, keep)
            decode_seconds += time.perf_counter() - before
            yield from events
        prefill_seconds += prefilled - start
        sets += _collect(batch, rows)
    yield Done(sets, prefill_seconds, decode_seconds)


def _batches(requests: Sequence[Request], max_rows: int) -> Iterator[tuple[int, Sequence[Request]]]:
    first = 0
    while first < len(requests):
        end, rows = first + 1, requests[first].width
        while end < len(requests) and rows + requests[end].width <= max_rows:
            rows += requests[end].width
            end += 1
        yield first, requests[first:end]
        first = end


def _take(row: _Row, token: int, limits: Limits) -> list[Event]:
    """Append one token to a row, and decide whether it ends."""
    token = int(token)
    row.tokens.append(token)
    if token in limits.eos_ids:
        row.reason = "eos"
        return [Finished(row.prompt, row.row, row.reason, row.said.finish())]
    special = token in limits.stop.ids
    added = "" if special else row.said.push(token)
    if special or row.said.stopped:
        row.reason = "stop"
    elif len(row.tokens) >= limits.max_new_tokens:
        row.reason = "length"
    if not row.reason:
        return [Token(row.prompt, row.row, token, added)]
    said = Token(row.prompt, row.row, token, added + row.said.finish())
    return [said, Finished(row.prompt, row.row, row.reason)]


def _collect(batch: Sequence[Request], rows: list[_Row]) -> list[ResponseSet]:
    sets, start = [], 0
    for request in batch:
        own = rows[start : start + request.width]
        responses = [Response(row.said.text, row.tokens, row.reason) for row in own]
        sets.append(ResponseSet(request.text, request.tokens, responses))
        start += request.width
    return sets


def row_length(asked: int | None, prompts: Mapping[str, int], context: int) -> int:
    """How many tokens rows get: as asked, else 256, or what the longest prompt leaves of the
    context. `prompts`: tokens of each, by what to call it. Raises BridgeError for a length below 1,
    and for a prompt that it takes past the context (clause 4.4)."""
    longest = max(prompts, key=lambda name: prompts[name], default="")
    tokens = prompts.get(longest, 0)
    length = min(256, max(1, context - tokens)) if asked is None else take("max_new_tokens", asked)
    check_context(longest, tokens, length, context)
    return length


def check_sampling(
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    seed: int,
) -> Sampling:
    """A Sampling whose numbers are in range; BridgeError names the one that is not."""
    return Sampling(
        take("temperature", temperature),
        None if top_k is None else take("top_k", top_k),
        None if top_p is None else take("top_p", top_p),
        None if min_p is None else take("min_p", min_p),
        take("seed", seed),
    )
