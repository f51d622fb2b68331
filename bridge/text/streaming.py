"""Ids to text, one id at a time: what is given never changes, and adds up to the whole text.

A tokenizer's decoder is a chain of steps from pieces to pieces. Each step here takes one piece and
gives what no later piece can change, which is most often all of it. What is held back: the bytes of
a character begun; with byte fallback, a run of bytes, any of which can make the others invalid; and
all of a row where a step is none of the usual ones. It knows nothing of stop strings.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from functools import partial
from typing import Any

from tokenizers import Regex, decoders

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # for bytes that are no text
BYTE = re.compile(r"<0x([0-9A-Fa-f+][0-9A-Fa-f])>")  # a piece that stands for one byte


class Step:
    """One step of a decoder."""

    @property
    def held(self) -> bool:
        """Whether `end` would give more."""
        return False

    @property
    def cut(self) -> bool:
        """Whether what is held is part of a character, as far as is known."""
        return False

    def push(self, piece: str) -> Iterable[str]:
        """The pieces that are certain once `piece` is there."""
        raise NotImplementedError

    def end(self) -> Iterable[str]:
        """The pieces that are left when no more comes."""
        return ()


class TextStream:
    """Text of one growing row."""

    def __init__(self, spell: Callable[[int], str | None], steps: Sequence[Step]) -> None:
        """`spell`: the piece that an id stands for; None for what has no text."""
        self._spell = spell
        self._steps = steps

    def push(self, token: int) -> str:
        """Text that is certain now and was not before; often empty within a character."""
        piece = self._spell(token)
        return "" if piece is None else _flow(self._steps, [piece], ending=False)

    def ahead(self) -> str:
        """What `finish` would give, which a later token may still change; empty within a
        character. The stream stays as it is."""
        if not any(step.held for step in self._steps) or any(step.cut for step in self._steps):
            return ""
        return _flow([copy(step) for step in self._steps], [], ending=True)

    def finish(self) -> str:
        """The rest of the text, after the last token."""
        return _flow(self._steps, [], ending=True)


def step_maker(decoder: decoders.Decoder | None) -> Callable[[], list[Step]]:
    """What makes the steps of a tokenizer's decoder, new ones for each row."""
    if decoder is None:  # all pieces with a space between them
        return lambda: [_Spaced()]
    makers: list[Callable[[], Step]] = []
    joined = False  # whether pieces are by now parts of a single one
    for step in _chain(json.loads(decoder.__getstate__())):
        maker = _maker(step, joined)
        if maker is None:
            return lambda: [_Whole(decoder)]
        joined = joined or step["type"] in ("Fuse", "ByteLevel")
        makers.append(maker)
    return lambda: [maker() for maker in makers]


def _chain(settings: dict[str, Any]) -> list[dict[str, Any]]:
    if settings["type"] != "Sequence":
        return [settings]
    return [step for part in settings["decoders"] for step in _chain(part)]


def _maker(step: dict[str, Any], joined: bool) -> Callable[[], Step] | None:
    """What makes a step; None for one that does not go piece by piece, or not in this place."""
    given = {key: value for key, value in step.items() if key != "type"}
    match step["type"], joined:
        case "Fuse", _:
            return _Same
        case "Strip", True:
            return None if given["stop"] else partial(_StripStart, **given)
        case "Strip", False:
            return partial(_StripEach, **given)
        case "ByteLevel", False:
            return _ByteLevel
        case "ByteFallback", False:
            return _ByteFallback
        case "Metaspace", False:
            return partial(_Each, decoders.Metaspace(**given))
        case "WordPiece", False:
            return partial(_Each, decoders.WordPiece(**given))
        case "Replace", False:
            [(kind, pattern)] = given["pattern"].items()
            replace = decoders.Replace(
                Regex(pattern) if kind == "Regex" else pattern, given["content"]
            )
            return partial(_Each, replace, alike=True)
    return None


def _flow(steps: Sequence[Step], pieces: Iterable[str], *, ending: bool) -> str:
    for step in steps:
        given = [out for piece in pieces for out in step.push(piece)]
        pieces = [*given, *step.end()] if ending else given
    return "".join(pieces)


def is_failure(error: BaseException) -> bool:
    """Whether the tokenizers library failed, by a panic of its Rust code too, which is no Exception
    and has no public name; what else is none, such as Ctrl-C, is not for us."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _decode(decoder: decoders.Decoder, pieces: list[str]) -> str:
    """The library's own decoding; where it fails, the pieces as they are: text is for reading, and
    must not end what it tells of."""
    try:
        return decoder.decode(pieces)
    except BaseException as error:
        if not is_failure(error):
            raise
        return "".join(pieces)


class _Same(Step):
    """Pieces become one, which changes nothing until the next step."""

    def push(self, piece: str) -> Iterable[str]:
        return (piece,)


class _Each(Step):
    """The library's decoder on one piece at a time. `alike`: the first is read as all others."""

    def __init__(self, decoder: decoders.Decoder, alike: bool = False) -> None:
        self.decoder, self.alone = decoder, True
        self.alike = alike

    def push(self, piece: str) -> Iterable[str]:
        pieces = [piece] if self.alone else ["", piece]
        self.alone = self.alike
        return (_decode(self.decoder, pieces),)


class _Spaced(Step):
    """A space before every piece but the first."""

    first = True

    def push(self, piece: str) -> Iterable[str]:
        first, self.first = self.first, False
        return (piece if first else f" {piece}",)


class _StripEach(Step):
    """Up to so many of a character leave the ends of each piece."""

    def __init__(self, content: str, start: int, stop: int) -> None:
        self.content, self.start, self.stop = content, start, stop

    def push(self, piece: str) -> Iterable[str]:
        piece = piece[_leading(piece[: self.start], self.content) :]
        tail = piece[max(0, len(piece) - self.stop) :]
        return (piece[: len(piece) - _leading(tail[::-1], self.content)],)


class _StripStart(Step):
    """Up to `start` of a character leave the beginning of the text."""

    def __init__(self, content: str, start: int, stop: int) -> None:
        assert stop == 0
        self.content, self.left = content, start

    def push(self, piece: str) -> Iterable[str]:
        cut = _leading(piece[: self.left], self.content)
        self.left = self.left - cut if cut == len(piece) else 0
        return (piece[cut:],)


def _leading(text: str, content: str) -> int:
    return len(text) - len(text.lstrip(content))


class _ByteLevel(Step):
    """Each letter of a piece is a byte; the bytes of all pieces are read as UTF-8."""

    waiting = b""

    @property
    def held(self) -> bool:
        return bool(self.waiting)

    @property
    def cut(self) -> bool:
        return self.held  # what waits is always a character begun

    def push(self, piece: str) -> Iterable[str]:
        try:
            new = bytes(map(BYTES.__getitem__, piece))
        except KeyError:  # a piece with another letter is taken as it is
            new = piece.encode("utf-8")
        text, used = codecs.utf_8_decode(self.waiting + new, "replace", False)
        self.waiting = (self.waiting + new)[used:]
        return (text,)

    def end(self) -> Iterable[str]:
        waiting, self.waiting = self.waiting, b""
        return (waiting.decode("utf-8", "replace"),)


def _bytes_of_letters() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes are themselves, the others follow at 256."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


BYTES = _bytes_of_letters()


class _ByteFallback(Step):
    """A run of pieces such as <0xE2> is text if all of it is UTF-8, else a replacement a byte."""

    def __init__(self) -> None:
        self.run = bytearray()

    @property
    def held(self) -> bool:
        return bool(self.run)

    @property
    def cut(self) -> bool:
        return REPLACEMENT in self._read()[-1:]

    def push(self, piece: str) -> Iterable[str]:
        if byte := BYTE.fullmatch(piece):
            self.run.append(int(byte[1], 16))
            return ()
        return (*self.end(), piece)

    def end(self) -> Iterable[str]:
        pieces = self._read()
        self.run = bytearray()
        return pieces

    def _read(self) -> list[str]:
        try:
            return [self.run.decode("utf-8")] if self.run else []
        except UnicodeDecodeError:
            return [REPLACEMENT] * len(self.run)


class _Whole(Step):
    """A decoder that says nothing for certain before it has seen all: the library's, at the end."""

    def __init__(self, decoder: decoders.Decoder) -> None:
        self.decoder = decoder
        self.pieces: list[str] = []

    @property
    def held(self) -> bool:
        return bool(self.pieces)

    def push(self, piece: str) -> Iterable[str]:
        self.pieces.append(piece)
        return ()

    def end(self) -> Iterable[str]:
        pieces, self.pieces = self.pieces, []
        return (_decode(self.decoder, pieces),) if pieces else ()
