"""Where a row's text ends: at texts that the user named, or at special tokens, which have no text.

The text before a stop is the beginning of what the tokenizer makes of the row's tokens, and what is
given token by token adds up to it: what may yet become a stop is held back until it is decided.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from bridge.decoding.prompts import to_python
from bridge.errors import BridgeError, show
from bridge.files.utf8 import is_text
from bridge.text.streaming import TextStream
from bridge.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Stops:
    """What ends a row besides EOS and its length: texts, and ids of special tokens."""

    texts: tuple[str, ...] = ()
    ids: frozenset[int] = frozenset()


NO_STOPS = Stops()


def read_stops(stop: Any, tokenizer: Tokenizer | None) -> Stops:
    """What a user's `stop` means: None, a text, or several.

    A text that is the name of a special token ends a row at that token, which is never part of a
    row's text, and also where the row spells it. Raises BridgeError for what is no text or empty,
    where there is no tokenizer, and for a special token amid other text, which no row could say.
    """
    stop = to_python(stop)
    given = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not isinstance(given, Iterable):
        raise BridgeError(f"stop must be a text or a list of texts, not {show(stop)}")
    texts = tuple(given)
    if not all(isinstance(text, str) and text for text in texts):
        raise BridgeError("stop must hold texts that are not empty")
    if strange := [text for text in texts if not is_text(text)]:
        raise BridgeError(f"stop must be text in UTF-8, not {show(strange[0])}")
    if not texts:
        return NO_STOPS
    if tokenizer is None:
        raise BridgeError("stop needs a tokenizer; this checkpoint has no tokenizer.json")
    special = tokenizer.special_ids
    for text in texts:
        within = [] if text in special else [token for token in special if token and token in text]
        if within:
            raise BridgeError(
                f"stop {show(text)} holds the special token {show(within[0])}, which is never part "
                "of a row's text; name it alone"
            )
    return Stops(texts, frozenset(special[text] for text in texts if text in special))


class RowText:
    """The text of a growing row, up to the first stop text."""

    def __init__(self, stream: TextStream | None, texts: tuple[str, ...]) -> None:
        """`stream`: None where there is no tokenizer, and so no text."""
        self.stopped = False  # whether a stop text is there
        self._stream = stream
        self._stops = texts
        self._given: list[str] = []
        self._waiting = ""  # what a stop text may begin with

    @property
    def text(self) -> str:
        """All that was given."""
        return "".join(self._given)

    def push(self, token: int) -> str:
        """What is certain to be part of the text, and was not before this token."""
        if self._stream is None:
            return ""
        text = self._waiting + self._stream.push(token)
        self._waiting = ""
        if self._stops:
            # A row that ends now says all of this, so a stop that is there is there to stay.
            said = text + self._stream.ahead()
            hits = [at for stop in self._stops if (at := said.find(stop)) >= 0]
            if hits:
                self.stopped = True
                return self._give(said[: min(hits)])
            certain = len(text) - self._beginning(text)
            text, self._waiting = text[:certain], text[certain:]
        return self._give(text)

    def finish(self) -> str:
        """The rest of the text of a row that ends here; after a stop text there is none."""
        if self.stopped:
            return ""
        text, self._waiting = self._waiting, ""
        return self._give(text + self._stream.finish() if self._stream else text)

    def _give(self, text: str) -> str:
        if text:
            self._given.append(text)
        return text

    def _beginning(self, text: str) -> int:
        """How long the longest end of `text` is that a stop text begins with."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
