"""The one reader of files of lines, of text or of JSON: tasks, samples, prompts, logs and results.

UTF-8, with or without a byte order mark before the first line. A line ends at a newline, a carriage
return before it belongs to its end, and nothing else ends one: U+2028, U+2029 and U+0085 are text,
as JSON has them. Lines of white space are passed over, and count. Of JSON, every other line is one
object that says each key once, with finite numbers and without half a surrogate pair. One line is
in memory at a time, of at most 200 MB. Raises BridgeError that names file and line.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from bridge.errors import BridgeError
from bridge.files.fields import read_as
from bridge.files.opening import MAX_TEXT, open_file, open_named
from bridge.files.strict_json import Unreadable, parse_object
from bridge.files.utf8 import whole_text

MARK = b"\xef\xbb\xbf"  # the byte order mark in UTF-8
Result = TypeVar("Result")


def _plainly(where: str, what: str) -> str:
    return f"{where}: {what}"


@dataclass(frozen=True)
class Line:
    """A line that is not blank."""

    number: int  # from 1, blank lines counted
    where: str  # file and number, for messages
    data: bytes  # without its end
    end: int  # bytes of the file up to here, its end included
    say: Callable[[str, str], str] = field(default=_plainly, repr=False)  # a message of the two

    @property
    def text(self) -> str:
        """What it says. Raises BridgeError for what is not UTF-8."""
        try:
            return self.data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"is not UTF-8 (at byte {error.start} of it)") from None

    def error(self, what: object) -> BridgeError:
        """What is wrong with it."""
        return BridgeError(self.say(self.where, str(what)))

    def to_object(self) -> dict[str, Any]:
        """The JSON object that it is. Raises BridgeError for anything else."""
        text = self.text
        try:
            return parse_object(text)
        except Unreadable as error:
            raise self.error(error) from None

    def to(self, kind: type[Result]) -> Result:
        """It as a class of fields (`bridge.files.fields`). Raises BridgeError, naming the field
        too."""
        value = self.to_object()
        try:
            return read_as(kind, value)
        except BridgeError as error:
            raise self.error(error) from None


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a file that the user named."""
    with open(open_named(path), "rb") as file:
        yield from lines_of(file, str(path))


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file that the user named, each with where it stands."""
    for line in read_lines(path):
        yield line.where, line.to_object()


def read_own(path: Path, mend: str) -> Iterator[Line]:
    """The lines of a file that we wrote ourselves; none where there is no file. What follows the
    last newline is half a line, which a killed process left, and none. `mend`: what to do about
    one that is damaged."""

    def damaged(where: str, what: str) -> str:
        return f"{where}: is damaged ({what}); {mend}"

    try:
        descriptor = open_file(path)
    except FileNotFoundError:
        return
    with open(descriptor, "rb") as file:
        yield from lines_of(file, str(path), whole=True, say=damaged)


def lines_of(
    file: BinaryIO, name: str, *, whole: bool = False, say: Callable[[str, str], str] = _plainly
) -> Iterator[Line]:
    """The lines of an open file. `whole`: only those that a newline ends."""
    number, end = 0, 0
    while True:
        where = f"{name}, line {number + 1}"
        try:
            data = file.readline(MAX_TEXT + 1)
        except OSError as error:
            raise BridgeError(f"{name}: cannot be read ({error.strerror})") from None
        if not data or (whole and len(data) <= MAX_TEXT and not data.endswith(b"\n")):
            return
        if len(data) > MAX_TEXT:
            raise BridgeError(say(where, f"is larger than {MAX_TEXT // 10**6} MB"))
        data, number, end = data.removeprefix(b"" if number else MARK), number + 1, end + len(data)
        data = data.removesuffix(b"\n").removesuffix(b"\r")
        if not _blank(data):
            yield Line(number, where, data, end, say)


def _blank(data: bytes) -> bool:
    data = data.strip()
    return not data or (data[0] > 127 and data.decode("utf-8", "replace").isspace())


def to_line(value: Mapping[str, Any]) -> bytes:
    """A line that `read_own` reads as the same object. Half a surrogate pair, which no other reader
    takes, becomes a replacement character."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return whole_text(text).encode() + b"\n"
