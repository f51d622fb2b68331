"""A file of JSON lines that grows, and whose end may be lost: the log, and SFT's samples.

A process may be killed in the middle of a line, so what follows the last newline is nothing. Who
goes on with a file says how many of its lines still hold; the rest is cut off.
"""

import errno
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bridge.errors import BridgeError
from bridge.reading import one_line, open_file


def whole_lines(path: Path) -> list[bytes]:
    """The lines that end in a newline, without it; none where there is no file."""
    try:
        with open(open_file(path), "rb") as file:
            return file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return []


def read_values(path: Path, lines: Iterable[bytes], **needs: type) -> list[dict[str, Any]]:
    """The first lines of a file as objects. Raises BridgeError, naming file and line, for one that
    is none, or where a name of `needs` is missing or not of its type."""
    found = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError("no object")
            for name, kind in needs.items():
                if type(value.get(name)) is not kind:
                    raise ValueError(f"{name} must be {kind.__name__}")
        except (ValueError, RecursionError) as error:
            raise BridgeError(
                f"{path}, line {number}: is damaged ({one_line(error)}); mend it, or cut the file "
                "off before it, and the same command goes on"
            ) from None
        found.append(value)
    return found


class Lines:
    """Appends to a file. Raises BridgeError where the disk refuses: what was there before stays."""

    def __init__(self, path: Path, kept: Iterable[bytes]) -> None:
        """`kept`: the lines, from the first on, that hold."""
        self.path = path
        try:
            self.file = path.open("r+b" if path.exists() else "wb", buffering=0)
            self.file.truncate(sum(len(line) + 1 for line in kept))
            self.file.seek(0, os.SEEK_END)
        except OSError as error:
            raise self._explain(error) from None

    def append(self, values: Iterable[Mapping[str, Any]]) -> None:
        """One line each, all in one write."""
        text = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
        data = text.encode("utf-8", "backslashreplace")
        try:
            if self.file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise self._explain(error) from None

    def sync(self) -> None:
        """What was appended outlives a power cut from here on."""
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            raise self._explain(error) from None

    def close(self) -> None:
        """No more will come."""
        self.file.close()

    def _explain(self, error: OSError) -> BridgeError:
        return BridgeError(
            f"{self.path}: cannot be written ({error.strerror or error}); free some space, and the "
            "same command goes on"
        )
