"""A file of JSON lines that grows, and whose end may be lost, such as a log.

A process may be killed in the middle of a line, so what follows the last newline is nothing. Who
goes on with a file says how much of it still holds; the rest is cut off.
"""

import errno
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bridge.errors import BridgeError
from bridge.files.jsonl import to_line

MEND = "mend it, or cut the file off before it, and the same command goes on"


class GrowingJsonl:
    """Appends to a file. Raises BridgeError where the disk refuses: what was there before stays."""

    def __init__(self, path: Path, kept: int) -> None:
        """`kept`: bytes from the start that hold."""
        self.path = path
        try:
            self.file = path.open("r+b" if path.exists() else "wb", buffering=0)
            self.file.truncate(kept)
            self.file.seek(0, os.SEEK_END)
        except OSError as error:
            raise self._explain(error) from None

    def append(self, values: Iterable[Mapping[str, Any]]) -> None:
        """One line each, all in one write."""
        data = b"".join(to_line(value) for value in values)
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
