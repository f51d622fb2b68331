"""Ids of a text as a row would say it after a prompt, rather than as a text of its own.

Some tokenizers put a space before every text that they read (SentencePiece's, most of all), which
no row says in the middle of "2+2=4". Here the text is read without it, and what comes out must be
the prompt and then the text, as far as the tokenizer can write them at all.
"""

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from bridge.errors import BridgeError, show

PARTS = ("normalizer", "pre_tokenizer")


class Continuation:
    """Reads texts that come after others. `spaced`: whether the tokenizer would put a space before
    a text of its own, and so leaves one out that a row begins with."""

    def __init__(self, fast: FastTokenizer) -> None:
        parts = {name: getattr(fast, name) for name in PARTS}
        was = {name: json.loads(part.__getstate__()) for name, part in parts.items() if part}
        bare = {name: _without_space(part) for name, part in was.items()}
        self.spaced = bare != was
        self._whole = self._fast = fast
        if self.spaced:
            settings = json.loads(fast.to_str())
            self._fast = FastTokenizer.from_str(json.dumps({**settings, **bare}))
        # One that splits at white space and forgets it cannot be held to it.
        self._reads_space = self._ids("a  a") != self._ids("a a")

    def encode(self, prompt: Sequence[int], text: str, name: str) -> list[int]:
        """Ids of `text` after the ids of a prompt. Raises BridgeError, which calls the text `name`,
        where the tokenizer cannot write it there."""
        ids = self._ids(text)
        if not self._agree(prompt, ids, text):
            ids = self._rest(prompt, text)
            if ids is None or not self._agree(prompt, ids, text):
                said = self._decode([*prompt, *self._ids(text)]).removeprefix(self._decode(prompt))
                raise BridgeError(
                    f"{name}: {show(text)} would be learnt as {show(said)}, which is what "
                    "tokenizer.json makes of it; mend the text, or leave it out"
                )
        return ids

    def _ids(self, text: str) -> list[int]:
        return self._fast.encode(text, add_special_tokens=False).ids

    def _rest(self, prompt: Sequence[int], text: str) -> list[int] | None:
        """What follows the prompt's ids where both are read as one text; None where they do not
        begin it."""
        whole = self._decode(prompt) + text
        ids = self._whole.encode(whole, add_special_tokens=False).ids
        return ids[len(prompt) :] if ids[: len(prompt)] == list(prompt) else None

    def _agree(self, prompt: Sequence[int], ids: Sequence[int], text: str) -> bool:
        said, wanted = self._decode([*prompt, *ids]), self._decode(prompt) + text
        return said == wanted or self._read(said) == self._read(wanted)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._fast.decode(list(ids), skip_special_tokens=False)

    def _read(self, text: str) -> str:
        """A text as the tokenizer reads it: in lower case, say, or composed."""
        if self._fast.normalizer is not None:
            text = self._fast.normalizer.normalize_str(text)
        return text if self._reads_space else "".join(text.split())


def _without_space(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer that puts no space before a text."""
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "Metaspace":
        return {**part, "prepend_scheme": "never"}
    if part.get("add_prefix_space"):
        return {**part, "add_prefix_space": False}
    for inner in ("normalizers", "pretokenizers"):
        if inner in part:
            left = [found for each in part[inner] if (found := _without_space(each))]
            return {**part, inner: left}
    return part
