"""A group under way: what its rows have said, and what becomes of the tokens that they draw.

Knows requests and text, and no decoder. Several tokens of each row may come at once (clause 4.6);
where a row ends in a way that the decoder does not know of, what was drawn after it is dropped, and
the group goes back (clause 4.7), so that all is as if tokens came one at a time.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from bridge.decoding.events import Finished, Response, ResponseSet, Step, Token
from bridge.decoding.requests import Request
from bridge.decoding.stops import RowText
from bridge.text.tokenizer import Tokenizer


class Taken(NamedTuple):
    """What was made of the tokens that N rows drew, and how they go on."""

    events: list[Step]
    tokens: Int[np.ndarray, " N"]  # to feed next
    keep: Bool[np.ndarray, " N"]
    back: int  # timesteps
    said: int  # tokens that count, of all rows


@dataclass
class Row:
    """What one row has said."""

    number: int
    said: RowText
    tokens: list[int] = field(default_factory=list)
    reason: str = ""  # why it ended; empty while it runs


class Running:
    """The rows of one request."""

    def __init__(self, ticket: int, request: Request, tokenizer: Tokenizer | None) -> None:
        """`tokenizer`: None where there is no text."""
        self.ticket, self.request = ticket, request
        texts = request.stop.texts
        self.rows = [
            Row(n, RowText(tokenizer and tokenizer.streamer(), texts)) for n in range(request.width)
        ]
        self.left = self.rows  # that have not ended

    def take(self, drawn: Int[np.ndarray, "N k"], ends: Collection[int]) -> Taken:
        """Tokens of the rows left, of which the decoder has fed all but the last column. `ends`:
        ids at which it ended rows by itself, as it does at their limit."""
        events: list[Step] = []
        column, said, last = 0, 0, drawn.shape[1] - 1
        for column in range(last + 1):
            unforeseen = False
            for row, token in zip(self.left, drawn[:, column].tolist(), strict=True):
                if not row.reason:
                    said += 1
                    events += self._say(row, token)
                    limit = len(row.tokens) == self.request.max_new_tokens
                    unforeseen |= bool(row.reason) and token not in ends and not limit
            if unforeseen or all(row.reason for row in self.left):
                break
        keep = np.array([not row.reason for row in self.left])
        self.left = [row for row in self.left if not row.reason]
        return Taken(events, drawn[:, column], keep, last - column, said)

    def cancel(self) -> list[Step]:
        """End the rows that are left, where they are."""
        events: list[Step] = []
        for row in self.left:
            row.reason = "cancelled"
            events.append(Finished(self.ticket, row.number, row.reason, row.said.finish()))
        self.left = []
        return events

    def answers(self) -> ResponseSet:
        """What the rows said, once all have ended."""
        responses = [Response(row.said.text, row.tokens, row.reason) for row in self.rows]
        return ResponseSet(self.request.text, self.request.tokens, responses)

    def _say(self, row: Row, token: int) -> list[Step]:
        """Append one token to a row, and decide whether it ends."""
        request = self.request
        row.tokens.append(token)
        if token in request.eos_ids:
            row.reason = "eos"
            return [Finished(self.ticket, row.number, row.reason, row.said.finish())]
        special = token in request.stop.ids
        added = "" if special else row.said.push(token)
        if special or row.said.stopped:
            row.reason = "stop"
        elif len(row.tokens) >= request.max_new_tokens:
            row.reason = "length"
        if not row.reason:
            return [Token(self.ticket, row.number, token, added)]
        said = Token(self.ticket, row.number, token, added + row.said.finish())
        return [said, Finished(self.ticket, row.number, row.reason)]
