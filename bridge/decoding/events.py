"""What decoding tells of, as it happens, and the answers that remain.

Plain values: they know no model. A `prompt` is numbered in the order in which prompts were given,
which is the ticket that an engine gave for it.
"""

from dataclasses import asdict, dataclass
from typing import Any

from bridge.decoding.stats import Stats


@dataclass(frozen=True)
class Response:
    """One row's answer. `tokens` include the one that ended it. `text` is what they say, without
    special tokens, and up to the first stop text."""

    text: str
    tokens: list[int]
    finish_reason: str  # eos, stop or length; of a request that was taken back also cancelled


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
    """Some prompts have been read together, the first of them `first_prompt`."""

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
    """A row ended: `eos`, `stop` (a stop text or token), `length`, or `cancelled`. `text` is what
    was held back until then, where no Token came with the end (`eos`, `cancelled`). The texts of a
    row's events, in order, are its Response's text."""

    prompt: int
    row: int
    reason: str
    text: str = ""


@dataclass(frozen=True)
class Answered:
    """All rows of a prompt have ended."""

    prompt: int
    answers: ResponseSet


@dataclass(frozen=True)
class Done:
    """All prompts are answered."""

    sets: list[ResponseSet]
    stats: Stats

    @property
    def prefill_seconds(self) -> float:
        """Time of reading prompts."""
        return self.stats.prefill_seconds

    @property
    def decode_seconds(self) -> float:
        """Time of all else that the engine did."""
        return self.stats.decode_seconds

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens of all rows over the time of decoding."""
        tokens = sum(len(r.tokens) for s in self.sets for r in s.responses)
        return tokens / self.decode_seconds if self.decode_seconds else 0.0


Step = Started | Token | Finished | Answered  # of an engine
Event = Started | Token | Finished | Done  # of a stream
