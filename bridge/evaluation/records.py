"""What an evaluation has found so far, on disk: one line of JSON a group, appended and synced.

A directory holds `settings.json`, what the numbers are of, and `results.jsonl`. Whoever comes back
with the same settings goes on where it stopped: a line cut off by a kill is dropped and found
again, and nothing that is there is found twice. Two processes cannot write to one directory.
"""

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from errno import ENOSPC
from pathlib import Path
from typing import Annotated, Any

from bridge.errors import BridgeError, show
from bridge.files.atomic import new_file
from bridge.files.fields import Count, Number
from bridge.files.jsonl import Line, read_own
from bridge.files.opening import read_text
from bridge.files.strict_json import Unreadable, parse_object
from bridge.files.utf8 import whole_text
from bridge.numbers.ranges import RANGES

SETTINGS, RESULTS = "settings.json", "results.jsonl"
REMOVE = "remove the line, and it is found again"
MEND = "evaluate into another directory, or with the same settings"


@dataclass(frozen=True)
class Row:
    """One response, and what the task says of it."""

    text: str
    tokens: Count
    finish_reason: Annotated[str, ("eos", "stop", "length")]
    answer: str | None  # what it votes for
    score: Number
    trouble: str | None = None  # why it could not be scored, and counts 0


@dataclass(frozen=True)
class Group:
    """The rows of one group: the `number`-th of a problem, at a width."""

    width: Annotated[int, RANGES["width"]]
    problem: Count
    number: Count
    digest: str  # of the prompt's ids and the answer: what was asked
    rows: tuple[Row, ...]

    @property
    def key(self) -> tuple[int, int, int]:
        """What tells it from other groups of an evaluation."""
        return self.width, self.problem, self.number


class Journal:
    """The groups found so far; with a directory, kept in it."""

    def __init__(self, directory: Path | None, settings: Mapping[str, Any]) -> None:
        """Opens what is there. Raises BridgeError where that is of other settings, is damaged, or
        is being written by another process; and where the directory cannot be made."""
        self.groups: dict[tuple[int, int, int], Group] = {}
        self.file: int | None = None
        if directory is None:
            return
        self.path = directory / RESULTS
        try:
            directory.mkdir(exist_ok=True)
            self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise BridgeError(f"{directory}: cannot be written ({error.strerror})") from None
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _agree(directory / SETTINGS, settings, empty=os.fstat(self.file).st_size == 0)
            self._read()
        except BlockingIOError:
            self.close()
            raise BridgeError(f"{directory}: another evaluation is writing here") from None
        except BaseException:
            self.close()
            raise

    def append(self, groups: Sequence[Group]) -> None:
        """Add those that are not there yet, and return when they are safe. Raises BridgeError where
        they cannot be written; what was there stays."""
        new = [_writable(group) for group in groups if group.key not in self.groups]
        if self.file is not None:
            lines = "".join(json.dumps(asdict(g), ensure_ascii=True) + "\n" for g in new).encode()
            try:
                while lines:
                    lines = lines[os.write(self.file, lines) :]
                os.fsync(self.file)
            except OSError as error:
                mend = "free some space and " if error.errno == ENOSPC else ""
                raise BridgeError(
                    f"{self.path}: cannot be written ({error.strerror}); {mend}start again to go on"
                ) from None
        self.groups |= {group.key: group for group in new}

    def close(self) -> None:
        """Let others write."""
        if self.file is not None:
            os.close(self.file)
            self.file = None

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> None:
        """Take in the whole lines, and cut off what follows the last of them."""
        assert self.file is not None
        whole = 0
        for line in read_own(self.path, REMOVE):
            group, whole = _group(line), line.end
            if group.key in self.groups:
                raise BridgeError(f"{line.where}: is there twice; remove the line")
            self.groups[group.key] = group
        os.ftruncate(self.file, whole)


def kept(directory: Path) -> list[tuple[int, int, int]]:
    """The keys of the groups in a directory, another process's too; none where there is no file.
    A line that is not whole or not readable counts as none."""
    found = []
    try:
        for line in read_own(directory / RESULTS, REMOVE):
            with suppress(BridgeError):
                found.append(_group(line).key)
    except (OSError, BridgeError):
        pass
    return found


def _writable(group: Group) -> Group:
    """It without what no JSON may hold: a task may be the user's own, and answer with anything."""
    rows = [
        replace(row, text=whole_text(row.text), answer=row.answer and whole_text(row.answer))
        for row in group.rows
    ]
    return replace(group, rows=tuple(rows))


def _group(line: Line) -> Group:
    group = line.to(Group)
    if len(group.rows) != group.width:
        raise line.error(f"rows must be {group.width}, as width is, not {len(group.rows)}")
    return group


def _agree(path: Path, settings: Mapping[str, Any], empty: bool) -> None:
    """Write the settings, or hold them against those that are there."""
    if not path.exists():
        if not empty:
            raise BridgeError(f"{path}: is missing beside {RESULTS}; {MEND}")
        with new_file(path) as file:
            file.write(json.dumps(settings, indent=2).encode() + b"\n")
        return
    try:
        found = parse_object(read_text(path))
    except (OSError, Unreadable) as error:
        raise BridgeError(f"{path}: is damaged ({error}); {MEND}") from None
    wanted = json.loads(json.dumps(settings))
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            raise BridgeError(
                f"{path}: {key} is {show(found.get(key))}, and now {show(wanted.get(key))}; {MEND}"
            )
