"""Files of a checkpoint, opened with distrust: from its own directory, plain, and of bounded size.

A name may be a link, since Hugging Face's cache is made of them, but only to a file of the same
directory, or of the cache's `blobs` of the same repository. A pipe or a device is not read at all.
JSON must be an object that says each thing once. Raises BridgeError of one line.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

from bridge.errors import BridgeError

MAX_TEXT = 200_000_000  # bytes; the largest tokenizers have 40 million


def exists(path: Path) -> bool:
    """Whether there is anything of this name, be it a link that leads nowhere."""
    return os.path.lexists(path)


def open_file(path: Path) -> int:
    """A descriptor of a plain file, for reading. Raises FileNotFoundError where there is none."""
    if os.path.islink(path):
        directory, real = os.path.realpath(path.parent), os.path.realpath(path)
        if os.path.dirname(real) != directory and not _in_cache(directory, real):
            raise BridgeError(f"{path}: is a link to outside of its directory; copy the file there")
    try:
        # What a pipe would wait for is a writer; this does not, and says what it is.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        if exists(path):
            raise BridgeError(
                f"{path}: is a link that leads nowhere; copy the file there"
            ) from None
        raise
    except OSError as error:
        raise BridgeError(f"{path}: cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BridgeError(f"{path}: is not a file")
    return descriptor


def read_text(path: Path) -> str:
    """A whole file in UTF-8. Raises FileNotFoundError where there is none."""
    with open(open_file(path), "rb") as file:
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
    """A JSON object. Raises FileNotFoundError where there is no file.

    Refuses a key that comes twice, since readers differ in which of the two they take, and text
    with half a surrogate pair, which cannot be written.
    """
    text = read_text(path)
    try:
        value = json.loads(text, object_pairs_hook=unique_keys)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise BridgeError(f"{path}: not readable as JSON (nested too deeply)") from None
    except ValueError as error:
        raise BridgeError(f"{path}: not readable as JSON ({one_line(error)})") from None
    if not isinstance(value, dict):
        raise BridgeError(f"{path}: must hold a JSON object")
    return value


def show(value: Any) -> str:
    """A value from a file as a message quotes it: on one line, and not longer than a line."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer that Python will not write out
        text = f"a {type(value).__name__} too long to show"
    return one_line(text)


def one_line(text: object) -> str:
    """Text of others in one printable line of bounded length."""
    line = " ".join(str(text)[:1000].split())
    if not line.isprintable():
        line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
    return line if len(line) <= 200 else line[:199] + "…"


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
