"""Files and their JSON, opened with distrust: plain files of bounded size, each thing said once.

A name in a checkpoint may be a link, since Hugging Face's cache is made of them, but only to a file
of the same directory, or of the cache's `blobs` of the same repository; a file that the user named
may be any link. A pipe or a device is not even opened. Raises BridgeError of one line.
"""

import json
import os
import stat
from math import isfinite
from pathlib import Path
from typing import Any

from bridge.errors import LINE, BridgeError, shorten

MAX_TEXT = 200_000_000  # bytes; the largest tokenizers have 40 million
MAX_DEPTH = 100  # of lists and objects within each other
KINDS = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def exists(path: Path) -> bool:
    """Whether there is anything of this name, be it a link that leads nowhere."""
    return os.path.lexists(path)


def open_file(path: Path, *, links: bool = False) -> int:
    """A descriptor of a plain file, for reading. Raises FileNotFoundError where there is none.

    `links`: it may be one to anywhere, since it is the user who names it.
    """
    try:
        if not links and os.path.islink(path):
            directory, real = os.path.realpath(path.parent), os.path.realpath(path)
            if os.path.dirname(real) != directory and not _in_cache(directory, real):
                raise BridgeError(
                    f"{path}: is a link to outside of its directory; copy the file there"
                )
        _refuse_special(path, os.stat(path).st_mode)  # opening a device may do something to it
        # What has become a pipe since would wait for a writer; this does not.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        if exists(path):
            raise BridgeError(
                f"{path}: is a link that leads nowhere; copy the file there"
            ) from None
        raise
    except (OSError, ValueError) as error:  # a name with a NUL in it is a ValueError
        reason = getattr(error, "strerror", None) or one_line(error)
        raise BridgeError(f"{show_path(path)}: cannot be read ({reason})") from None
    try:
        _refuse_special(path, os.fstat(descriptor).st_mode)
    except BridgeError:
        os.close(descriptor)
        raise
    return descriptor


def open_named(path: Path) -> int:
    """A descriptor of a plain file that the user named. Raises BridgeError where there is none."""
    try:
        return open_file(path, links=True)
    except FileNotFoundError:
        raise BridgeError(f"{path}: cannot be read (No such file or directory)") from None


def _refuse_special(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        what = KINDS.get(stat.S_IFMT(mode), "a device")
        mend = "" if stat.S_ISDIR(mode) else "; copy what it gives into one"
        raise BridgeError(f"{path}: is {what}, and is not a file{mend}")


def read_text(path: Path, *, links: bool = False) -> str:
    """A whole file in UTF-8. Raises FileNotFoundError where there is none."""
    with open(open_file(path, links=links), "rb") as file:
        try:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_TEXT:
                raise BridgeError(f"{path}: is larger than {MAX_TEXT // 10**6} MB")
            return file.read(size).decode("utf-8")
        except OSError as error:
            raise BridgeError(f"{path}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError as error:
            raise BridgeError(f"{path}: is not UTF-8 (at byte {error.start})") from None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object, as `parse_object` takes it. Raises FileNotFoundError where there is no file.

    NaN and infinity are left to who knows the key: some write them into a config.
    """
    try:
        return parse_object(read_text(path), finite=False)
    except Unreadable as error:
        raise BridgeError(f"{path}: {error}") from None


class Unreadable(Exception):
    """What is wrong with a text, as a message says it after the name of the place."""


def parse_object(text: str, *, finite: bool = True) -> dict[str, Any]:
    """The JSON object that a text is. Raises Unreadable for anything else.

    Refuses a key that comes twice, since readers differ in which of the two they take; text with
    half a surrogate pair, which cannot be written; NaN, infinity and numbers beyond a float, which
    are no JSON, unless `finite` is off; and what is nested more than 100 deep.
    """
    endless: list[str] = []

    def number(said: str) -> float:
        value = float(said)
        if not isfinite(value):
            endless.append(said)
        return value

    try:
        value = json.loads(
            text, object_pairs_hook=unique_keys, parse_float=number, parse_constant=number
        )
        check_depth(value)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise Unreadable("is not readable as JSON (nested too deeply)") from None
    except UnicodeEncodeError:
        raise Unreadable("holds half a surrogate pair, which is no text") from None
    except ValueError as error:
        raise Unreadable(f"is not readable as JSON ({why_not(error)})") from None
    if not isinstance(value, dict):
        raise Unreadable("must be a JSON object")
    if endless and finite:
        field = one_line(_not_finite(value, ""))
        raise Unreadable(f"{field} is {show(endless[0]).strip(chr(39))}, no number of JSON")
    return value


def check_depth(value: Any) -> None:
    """Raise RecursionError for lists and objects that are more than 100 deep in each other."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [item for held in level for item in _items(held) if type(item) in (list, dict)]
        if not level:
            return
    raise RecursionError


def why_not(error: ValueError) -> str:
    """Why a text is no JSON, or no TOML, without Python's advice to those who wrote the reader."""
    if "integer string conversion" in str(error):
        return "an integer of thousands of digits"
    return one_line(error)


def _items(held: Any) -> Any:
    return held.values() if isinstance(held, dict) else held if isinstance(held, list) else ()


def _not_finite(value: Any, name: str) -> str:
    """Where in a value the first number that is not finite stands, such as rows[0].score."""
    if isinstance(value, float):
        return "" if isfinite(value) else name or "the value"
    if isinstance(value, dict):
        inner = ((f"{name}.{key}" if name else str(key), item) for key, item in value.items())
    elif isinstance(value, list):
        inner = ((f"{name}[{i}]", item) for i, item in enumerate(value))
    else:
        return ""
    return next(filter(None, (_not_finite(item, where) for where, item in inner)), "")


def show(value: Any) -> str:
    """A value from a file as a message quotes it: on one line, and not longer than a line."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer that Python will not write out
        text = f"a {type(value).__name__} too long to show"
    return one_line(text)


def one_line(text: object) -> str:
    """Text of others in one printable line of bounded length: its two ends, if there is more."""
    line = " ".join(shorten(str(text), 5 * LINE).split())
    if not line.isprintable():
        line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
    return shorten(line)


def is_text(text: str) -> bool:
    """Whether it can be written as UTF-8. Bytes of a command line or a path that are none reach us
    as lone surrogates, which no tokenizer and no file of ours takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def show_path(path: Path) -> str:
    """A path that may not be one, such as with a NUL in it."""
    text = str(path)
    return text if text.isprintable() else one_line(text)


def _in_cache(directory: str, real: str) -> bool:
    """Whether `directory` is a snapshot in Hugging Face's cache, and `real` a file of its blobs."""
    snapshots = os.path.dirname(directory)
    blobs = os.path.join(os.path.dirname(snapshots), "blobs")
    return os.path.basename(snapshots) == "snapshots" and os.path.dirname(real) == blobs


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`: an object. Raises ValueError for a key that comes twice."""
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"the key {show(key)} comes twice")
        seen[key] = value
    return seen


def among(value: Any, values: tuple[Any, ...]) -> bool:
    """Whether JSON's `value` is among `values`; to Python, unlike JSON, true is 1."""
    return any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in values)
