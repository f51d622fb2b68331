"""Inputs by the thousand in this process, each outcome counted, each fault kept."""

import base64
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .mutate import mutant
from .seeds import Entry, Link, Special, Tree, seeds
from .trial import Workspace

# A disk takes a thousandth of a second for a small file, which a file system in memory does not.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@dataclass
class Tally:
    """What a run came to."""

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[dict[str, Any]] = field(default_factory=list)


def run(
    seed: int,
    inputs: int,
    names: tuple[str, ...] = (),
    *,
    start: int = 0,
    at: Callable[[str, int], None] = lambda name, number: None,
    most_faults: int = 20,
) -> Tally:
    """Try inputs `start` to `start + inputs` of a seed, spread evenly over the checkpoints."""
    names = names or tuple(seeds())
    tally = Tally()
    with tempfile.TemporaryDirectory(dir=MEMORY) as directory:
        spaces = {name: Workspace(Path(directory) / name, seeds()[name]) for name in names}
        for number in range(start, start + inputs):
            name = names[number % len(names)]
            at(name, number)
            changes = mutant(name, seed, number)
            outcome = spaces[name].attempt(changes, headers_only=number % 7 == 0)
            tally.outcomes[outcome.kind] += 1
            if outcome.kind == "fault":
                recipe = to_recipe(name, changes)
                tally.faults.append({"number": number, "said": outcome.said, **recipe})
                if len(tally.faults) >= most_faults:
                    break
    return tally


def to_recipe(name: str, changes: Tree) -> dict[str, Any]:
    """An input as JSON: the seed checkpoint, and the entries that differ from it."""
    return {"seed": name, "changes": {path: _written(entry) for path, entry in changes.items()}}


def from_recipe(recipe: dict[str, Any]) -> Tree:
    """The entries that a recipe changes."""
    return {path: _read(entry) for path, entry in recipe["changes"].items()}


def _written(entry: Entry) -> dict[str, str]:
    match entry:
        case Link(target):
            return {"link": target}
        case Special(kind):
            return {"special": kind}
        case bytes():
            try:
                return {"text": entry.decode()}
            except UnicodeDecodeError:
                return {"base64": base64.b64encode(entry).decode()}


def _read(entry: dict[str, Any]) -> Entry:
    """`json`, `text`, `base64`, `link` or `special`; `repeat` makes a long text of a short one."""
    [(kind, value)] = entry.items()
    match kind:
        case "json":
            return json.dumps(value).encode()
        case "text":
            return value.encode("utf-8", "surrogatepass")
        case "base64":
            return base64.b64decode(value)
        case "repeat":
            return "".join(piece * times for piece, times in value).encode()
        case "link":
            return Link(value)
        case "special":
            return Special(value)
        case _:
            raise ValueError(f"a recipe has no {kind!r}")
