"""The directory of a run: what it was asked, how far it is, and what came of it.

    config.toml                the settings, as run
    log.jsonl                  a line for each step and evaluation
    samples.jsonl              of SFT: what was sampled
    checkpoints/step-000040/   a checkpoint, with trainer.safetensors and progress.json
    best/, final/              checkpoints; `final` is there when the run is done
    failed/step-000041.npz     the batch of a step that went wrong

Whatever is here is whole: written under a hidden name, synced, and renamed. One process at a time
has the directory; whatever a killed one left under hidden names goes when the next one opens it.
"""

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np

from bridge.checkpoints.writing import write_json
from bridge.contract import Batch
from bridge.errors import BridgeError, show
from bridge.files.atomic import new_directory, new_file
from bridge.files.toml import read_toml, write_toml
from bridge.training.saving import (
    ModelWriter,
    Progress,
    StateReader,
    read_best_step,
    read_progress,
    read_state,
    write_state,
)
from bridge.training.settings import Settings, read_settings

CONFIG, PROGRESS, SAMPLES = "config.toml", "progress.json", "samples.jsonl"
SAID = "training.json"  # what is said of a model that was saved
# What may differ between a run and its resumption: nothing that a step computes depends on it, but
# for rewards that ran out of time, and who gives them more must not lose the run.
FREE = (
    "reward_seconds",
    *("out", "save_every", "keep", "log", "gap_every", "norms_every"),
    *("stop_grad_norm", "stop_loss", "stop_entropy"),
)


class RunDirectory:
    """A run's directory, locked while it is open; a context manager."""

    def __init__(self, path: Path, lock: BinaryIO, same: bool) -> None:
        """`same`: whether what was logged before, if anything, was by these settings."""
        self.path, self.lock, self.same = path, lock, same
        self.checkpoints = path / "checkpoints"

    @classmethod
    def open(cls, settings: Settings, resume: bool = False) -> Self:
        """Make the directory, or go on with it where its settings agree.

        `resume`: it must be there. Raises BridgeError, in one line, for one that holds something
        else, that another process has, or whose settings differ, naming the first field.
        """
        path = Path(settings.out)
        started = check_directory(settings, resume)
        same = started or _same(path, settings)
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = _lock(path)
        except OSError as error:
            raise BridgeError(f"{path}: cannot be made ({error.strerror})") from None
        run = cls(path, lock, same)
        run._sweep()
        if not started:
            if (path / "best").is_dir():  # what an earlier start began with
                _remove(path / "best")
            with new_file(path / CONFIG) as file:
                file.write(write_toml(settings.to_json()).encode())
        with _told(run.checkpoints):
            run.checkpoints.mkdir(exist_ok=True)
        run.prune(settings.keep)  # a killed process may have come to saving, and no further
        return run

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.close()

    @property
    def log(self) -> Path:
        """Its log."""
        return self.path / "log.jsonl"

    @property
    def samples(self) -> Path:
        """What SFT sampled."""
        return self.path / SAMPLES

    @property
    def finished(self) -> bool:
        """Whether the run is done."""
        return (self.path / "final" / "config.json").is_file()

    def steps(self) -> list[int]:
        """Of the checkpoints there are, ascending."""
        found = self.checkpoints.glob("step-*")
        numbers = (p.name[5:] for p in found)
        return sorted(int(n) for n in numbers if n.isascii() and n.isdecimal())

    def place(self, step: int) -> Path:
        """The checkpoint of a step."""
        return self.checkpoints / f"step-{step:06}"

    def latest(self) -> tuple[Progress, dict[str, np.ndarray]] | None:
        """The newest checkpoint's progress and trainer's state; None before the first.

        Raises BridgeError for one that is damaged.
        """
        if not (steps := self.steps()):
            return None
        place = self.place(steps[-1])
        return read_progress(place / PROGRESS, steps[-1]), read_state(place)

    def save(self, progress: Progress, state: StateReader, writer: ModelWriter, keep: int) -> Path:
        """A checkpoint that the run can go on from; all but the latest `keep` are removed."""
        place = self.place(progress.step)
        if not place.exists():
            with new_directory(place) as directory:
                writer.write(directory, state)
                write_state(directory, state)
                write_json(directory / PROGRESS, vars(progress))
        self.prune(keep)
        return place

    def prune(self, keep: int) -> None:
        """Remove all checkpoints but the latest `keep`."""
        for step in self.steps()[:-keep]:
            _remove(self.place(step))

    def save_model(
        self, name: str, state: Mapping[str, np.ndarray], writer: ModelWriter, said: Mapping
    ) -> Path:
        """`best` or `final`, in place of an older one, with what is to be said of it."""
        place = self.path / name
        with new_directory(place, overwrite=True) as directory:
            writer.write(directory, state)
            write_json(directory / SAID, said)
        return place

    def save_failed(self, step: int, batches: Sequence[Batch]) -> Path:
        """The batches of an update that went wrong, as arrays `NUMBER.FIELD`."""
        place = self.path / "failed" / f"step-{step:06}.npz"
        arrays = {
            f"{number}.{name}": value
            for number, batch in enumerate(batches)
            for name, value in vars(batch).items()
            if value is not None
        }
        with _told(place.parent):
            place.parent.mkdir(exist_ok=True)
        with new_file(place) as file:
            np.savez(file, **arrays)
        return place

    def _sweep(self) -> None:
        """Remove what a killed process left half done; the lock says that nobody is at it."""
        for directory in (self.path, self.checkpoints, self.path / "failed"):
            for left in directory.glob(".*.partial-*") if directory.is_dir() else ():
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def read_run(path: Path) -> Settings:
    """The settings of a run, from its directory."""
    where = path / CONFIG
    given = read_toml(where)
    kind = given.get("kind")
    if kind not in ("sft", "grpo"):
        raise BridgeError(f"{where}: kind must be sft or grpo, not {show(kind)}")
    return read_settings(kind, given, str(where))


def check_directory(settings: Settings, resume: bool = False) -> bool:
    """Whether `out` holds a run to go on with. Raises BridgeError where it holds another, or
    something else; writes nothing.

    A run that has saved nothing yet has nothing to lose, and may begin again with other settings.
    """
    path = Path(settings.out)
    there = (path / CONFIG).is_file()
    if resume and not there:
        raise BridgeError(f"{path}: holds no run to resume (no {CONFIG}); leave out --resume")
    visible = [name for name in os.listdir(path) if name[0] != "."] if path.is_dir() else []
    if not there and (visible or (path.exists() and not path.is_dir())):
        raise BridgeError(f"{path}: exists already and holds no run; choose another name")
    if not there or not _worth_keeping(path):
        return False
    check_same(read_run(path), settings, path / CONFIG)
    return True


def _worth_keeping(path: Path) -> bool:
    """Whether a run has come to something: samples, a checkpoint, or a best one after the start."""
    if any((path / "checkpoints").glob("step-*")) or (path / SAMPLES).exists():
        return True
    return (read_best_step(path / "best" / SAID) or 0) > 0


def _same(path: Path, settings: Settings) -> bool:
    """Whether a run began here with just these settings."""
    try:
        return read_run(path) == settings
    except BridgeError:
        return False


def check_same(old: Settings, new: Settings, where: Path) -> None:
    """Refuse to go on with other settings; what a step does not depend on is free.

    A run at a constant learning rate may also get more steps, or fewer.
    """
    free = {*FREE, *(("steps",) if new.schedule == "constant" else ())}
    # An older run's 256 and `all` were defaults, and are what none means wherever it could go on.
    before, now = (
        {"max_new_tokens": 256, **s.to_json(), "trainable": list(s.trainable) or ["all"]}
        for s in (old, new)
    )
    for name in dict.fromkeys([*now, *before]):
        if name not in free and before.get(name) != now.get(name):
            raise BridgeError(
                f"{where}: {name} was {show(before.get(name))}, and now is {show(now.get(name))}; "
                "resume with the same settings, or choose another out"
            )


def absolute(settings: Settings) -> Settings:
    """The same settings with paths that mean the same in any working directory."""
    paths = {}
    for name in ("checkpoint", "base", "data"):
        if value := getattr(settings, name, None):
            paths[name] = str(Path(value).resolve())
    if settings.task and Path(settings.task).is_file():
        paths["task"] = str(Path(settings.task).resolve())
    return replace(settings, **paths)


def _lock(path: Path) -> BinaryIO:
    """Hold the directory; the lock goes with the process, however it ends."""
    lock = (path / ".lock").open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise BridgeError(f"{path}: another process is at this run; wait, or stop it") from None
    return lock


def _remove(place: Path) -> None:
    """Remove a checkpoint such that a killed process leaves none that is half there."""
    hidden = place.parent / f".{place.name}.partial-{secrets.token_hex(4)}"
    place.rename(hidden)
    shutil.rmtree(hidden)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turns what the system refuses into one line."""
    try:
        yield
    except OSError as error:
        raise BridgeError(f"{path}: cannot be written ({error.strerror})") from None
