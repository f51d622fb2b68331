"""What an engine implements to be measured: one module, with `load`.

Its `prepare` makes files of the engine's own form, where an entry says that it has one. Both run in
processes with nothing else to do, in which threads were limited before a framework is imported.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Entry:
    """One line of the table: an engine, with weights of one kind, with blocks or without."""

    name: str  # such as "bridge torch" or "llama.cpp"
    weights: str
    blocks: bool
    module: str  # that implements `Engine`
    package: str  # the installed one, whose version is shown
    backend: str = ""  # of Bridge's own
    prepares: bool = False  # whether the module has `prepare`

    @property
    def label(self) -> str:
        """For messages and legends."""
        return f"{self.name}, {self.weights}{', blocks' if self.blocks else ''}"


@dataclass(frozen=True)
class Setup:
    """What an engine is loaded from, and for."""

    entry: Entry
    checkpoint: Path  # as it was given, with blocks
    host: Path  # the same without blocks, as Hugging Face has it
    scratch: Path  # the entry's own directory
    device: str
    threads: int
    widest: int  # rows of a call, at most
    context: int  # tokens of a row, prompt included, at most

    def to_json(self) -> dict[str, Any]:
        """What `from_json` takes."""
        paths = {name: str(getattr(self, name)) for name in ("checkpoint", "host", "scratch")}
        return {**asdict(self), **paths}

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> "Setup":
        """The setup that `to_json` gave."""
        paths = {name: Path(said[name]) for name in ("checkpoint", "host", "scratch")}
        return cls(**{**said, **paths, "entry": Entry(**said["entry"])})


@dataclass(frozen=True)
class Call:
    """What is measured: `new` tokens for each of `width` rows, sampled from the whole distribution,
    or the likeliest where `temperature` is 0; a row that says its end goes on."""

    prompt: tuple[int, ...]
    width: int
    new: int
    seed: int = 0
    temperature: float = 1.0


@dataclass(frozen=True)
class Decoded:
    """What came of a call. The first token of each row belongs to the prompt, the others to
    decoding."""

    first: float  # seconds until every row had its first token
    all: float  # until every row had its last
    tokens: list[list[int]]  # of each row

    def check(self, call: Call) -> None:
        """Raises RuntimeError where that is not what was asked for."""
        rows, lengths = len(self.tokens), {len(row) for row in self.tokens}
        if rows != call.width or lengths != {call.new}:
            wanted = f"{call.width} rows of {call.new} tokens"
            raise RuntimeError(f"asked for {wanted}, it gave {rows} of {sorted(lengths)}")


class Session(Protocol):
    """A loaded engine."""

    def decode(self, call: Call) -> Decoded:
        """Carry out one call."""
        ...


class Engine(Protocol):
    """A module that implements an engine."""

    def prepare(self, setup: Setup) -> None:
        """Write what `load` reads into `setup.scratch`, in a process that ends with it."""
        ...

    def load(self, setup: Setup) -> Session:
        """The engine, loaded."""
        ...


def tokens_of(call: Call) -> np.ndarray:
    """The prompt as an array, int64."""
    return np.asarray(call.prompt, np.int64)
