"""The log of a run: JSONL always, and tensorboard, wandb or trackio where asked for.

A record is one flat object with `kind` (step or evaluation) and `step`, the steps done by then.
Figures are numbers; `norm_ratios` is a list with one a block, in order of layers, and `norm_ratio`
their mean: both are there each `norms_every` steps, as the decoder's gap is each `gap_every`. A
resumed run drops the records after the step that it goes on from, and half a line that a killed
process may have left: apart from seconds the log is that of a run that was never stopped.
"""

import hashlib
import importlib
import math
import os
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Protocol

from bridge.errors import BridgeError
from bridge.training.lines import Lines, read_values, whole_lines

Record = Mapping[str, Any]
NEEDS = {"kind": str, "step": int}  # of every record


class Sink(Protocol):
    """Where figures go beside the file."""

    def write(self, record: Record) -> None:
        """One record."""
        ...

    def close(self) -> None:
        """No more will come."""
        ...


class Log:
    """Appends records to a file, each flushed, and hands them on to sinks."""

    def __init__(self, path: Path, step: int, sinks: list[Sink]) -> None:
        """Go on at `step`. Raises BridgeError where the file is damaged or cannot be written."""
        lines = whole_lines(path)
        records = read_values(path, lines, **NEEDS)
        kept = [line for line, r in zip(lines, records, strict=True) if _before(r, step)]
        self.before = [r for r in records if _before(r, step)]  # what it goes on from
        self.lines, self.sinks = Lines(path, kept), sinks

    def write(self, record: Record) -> None:
        """Append a record; numbers that are not finite become null. Raises BridgeError for a full
        disk."""
        plain = {name: _plain(value) for name, value in record.items()}
        self.lines.append([plain])
        for sink in self.sinks:
            sink.write(plain)

    def sync(self) -> None:
        """What was written outlives a power cut from here on."""
        self.lines.sync()

    def close(self) -> None:
        """Close the file and every sink."""
        self.lines.close()
        for sink in self.sinks:
            sink.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """A log's records, without half a line at its end. Raises BridgeError for a damaged line."""
    return read_values(path, whole_lines(path), **NEEDS)


def open_sinks(names: tuple[str, ...], out: Path, settings: Record, step: int) -> list[Sink]:
    """The sinks asked for. Raises BridgeError, with the install command, for one that is absent."""
    kinds = {"tensorboard": _Tensorboard, "wandb": _Tracker, "trackio": _Tracker}
    sinks: list[Sink] = []
    for name in names:
        try:
            sinks.append(kinds[name](name, out, settings, step))
        except ImportError as error:
            raise BridgeError(
                f"log: {name} cannot be imported ({error}); try: pip install {name}"
            ) from None
    return sinks


class _Tensorboard:
    """Event files under OUT/tensorboard, one tag a figure."""

    def __init__(self, name: str, out: Path, settings: Record, step: int) -> None:
        from tensorboard.summary import Writer

        self.writer = Writer(str(out / name))

    def write(self, record: Record) -> None:
        for name, value in _figures(record):
            self.writer.add_scalar(f"{record['kind']}/{name}", value, record["step"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class _Tracker:
    """wandb, or trackio, which has the same face. A resumed run goes on under the same name."""

    def __init__(self, name: str, out: Path, settings: Record, step: int) -> None:
        self.module = importlib.import_module(name)
        place = out.resolve()
        more = {}
        if name == "wandb":  # the same directory is the same run
            digest = hashlib.sha256(os.fsencode(place)).hexdigest()[:8]
            more = {"dir": str(out), "id": f"{place.name}-{digest}"}
        with redirect_stdout(sys.stderr):  # stdout is for what came of the run
            self.module.init(
                project="bridge", name=place.name, config=dict(settings), resume="allow", **more
            )

    def write(self, record: Record) -> None:
        figures = {f"{record['kind']}/{name}": value for name, value in _figures(record)}
        with redirect_stdout(sys.stderr):
            self.module.log(figures, step=record["step"])

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self.module.finish()


def _figures(record: Record) -> list[tuple[str, float]]:
    """What of a record can be drawn."""
    numbers = [(name, value) for name, value in record.items() if name != "step"]
    for name, value in record.items():
        if isinstance(value, list):
            numbers += [(f"{name}/{i}", item) for i, item in enumerate(value)]
    return [(n, float(v)) for n, v in numbers if type(v) in (int, float)]


def _before(record: Record, step: int) -> bool:
    """Whether a record is of what was done when the checkpoint of `step` was written: a step's
    evaluation comes after it."""
    return record["step"] < step or (record["step"] == step and record["kind"] == "step")


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
