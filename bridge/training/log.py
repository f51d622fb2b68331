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
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, NotRequired, Protocol, TypedDict

from bridge.errors import BridgeError
from bridge.files.fields import Count, Number
from bridge.files.growing_jsonl import MEND, GrowingJsonl
from bridge.files.jsonl import Line, read_own

Record = Mapping[str, Any]


class Logged(TypedDict):
    """What every record has."""

    kind: Annotated[str, ("step", "evaluation")]
    step: Count


class LoggedStep(Logged):
    """What a run that goes on reads of its steps (`bridge.training.health`)."""

    loss: NotRequired[Number | None]  # None: it was not finite, or there was no update
    entropy: NotRequired[Number | None]


class PolicyStep(LoggedStep):
    """Of GRPO's, too."""

    equal_groups: Count
    accuracy: Number
    bad_rewards: Count
    rows: Count
    cut_off: Number
    idle_groups: NotRequired[Count]  # with mask_truncated alone
    bad_reward: NotRequired[str]


class Sink(Protocol):
    """Where figures go beside the file."""

    def write(self, record: Record, again: bool) -> None:
        """One record; `again`: it was written before the run was stopped, too."""
        ...

    def close(self) -> None:
        """No more will come."""
        ...


class Log:
    """Appends records to a file, each flushed, and hands them on to sinks."""

    def __init__(
        self,
        path: Path,
        step: int,
        sinks: list[Sink],
        same: bool = True,
        steps: type[LoggedStep] = LoggedStep,
    ) -> None:
        """Go on at `step`; `same`: what is there is of these settings; `steps`: what is read of its
        steps. Raises BridgeError where the file is damaged or cannot be written."""
        found = _read(path, steps)
        hold = list(takewhile(lambda pair: _before(pair[1], step), found))
        self.before = [record for _, record in hold]
        self.told = {(r["kind"], r["step"]) for _, r in found[len(hold) :] if same}
        self.lines, self.sinks = GrowingJsonl(path, hold[-1][0].end if hold else 0), sinks

    def write(self, record: Record) -> None:
        """Append a record; numbers that are not finite become null. Raises BridgeError for a full
        disk."""
        plain = {name: _plain(value) for name, value in record.items()}
        self.lines.append([plain])
        for sink in self.sinks:
            sink.write(plain, (plain["kind"], plain["step"]) in self.told)

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
    return [record for _, record in _read(path)]


def _read(path: Path, steps: type[LoggedStep] = LoggedStep) -> list[tuple[Line, dict[str, Any]]]:
    """The records with their lines."""
    found = []
    for line in read_own(path, MEND):
        record = line.to(Logged)
        record = line.to(steps) if record["kind"] == "step" else record
        found.append((line, dict(record)))
    return found


def check_sinks(names: tuple[str, ...]) -> None:
    """Raises BridgeError, with the install command, for a sink that is absent."""
    for name in names:
        try:
            importlib.import_module("tensorboard.summary" if name == "tensorboard" else name)
        except ImportError as error:
            raise BridgeError(
                f"log: {name} cannot be imported ({error}); try: pip install {name}"
            ) from None


def open_sinks(names: tuple[str, ...], out: Path, settings: Record, first: int) -> list[Sink]:
    """The sinks asked for. What they have of the steps from `first` on is void."""
    kinds = {"tensorboard": _Tensorboard, "wandb": _Tracker, "trackio": _Tracker}
    return [kinds[name](name, out, settings, first) for name in names]


class _Tensorboard:
    """Event files under OUT/tensorboard, one tag a figure. A start of a session says that whatever
    was written before is void from its step on."""

    def __init__(self, name: str, out: Path, settings: Record, first: int) -> None:
        from tensorboard.summary import Writer
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        session = EventFileWriter(str(out / name))
        events: Any = importlib.import_module("tensorboard.compat.proto.event_pb2")
        start = events.SessionLog(status=events.SessionLog.START)
        session.add_event(events.Event(wall_time=time.time(), step=first, session_log=start))
        session.close()
        self.writer, self.first = Writer(str(out / name)), first

    def write(self, record: Record, again: bool) -> None:
        if again and record["step"] < self.first:
            return
        for name, value in _figures(record):
            self.writer.add_scalar(f"{record['kind']}/{name}", value, record["step"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class _Tracker:
    """wandb, or trackio, which has the same face. A resumed run goes on under the same name, and
    what was told before it was stopped is not told again: neither takes anything back."""

    def __init__(self, name: str, out: Path, settings: Record, first: int) -> None:
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

    def write(self, record: Record, again: bool) -> None:
        if again:
            return
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
