"""Runs of the toy task that are stopped at a moment, and what a run is asked by default."""

import os
import signal
from pathlib import Path

import pytest
from training_kills import outcome
from training_toys import Graded, InProcess

from bridge.training import GRPOSettings, train
from bridge.training.watch import Silent


def toy_run(model, out):
    """Settings of a short run; tests change some."""
    return GRPOSettings(
        checkpoint=str(model),
        out=str(out),
        task="sums",
        backend="torch",
        steps=6,
        problems=2,
        width=4,
        max_new_tokens=2,
        lr=1e-2,
        eval_every=3,
        eval_problems=2,
        save_every=2,
        norms_every=2,
    )


class Watch(Silent):
    """Does something at the record of a step, or at the first evaluation at or after it."""

    def __init__(self, step=None, act=None, kind="step"):
        self.step, self.act, self.kind = step, act, kind
        self.notes, self.starts = [], []

    def started(self, first, total):
        self.starts.append((first, total))

    def record(self, record):
        if record["kind"] == self.kind and record["step"] == self.step:
            self.act()

    def note(self, text):
        self.notes.append(text)


def run(settings, watch=None, **options):
    task = options.pop("task", None) or Graded()
    scorer = options.pop("scorer", None) or InProcess(task)
    return train(settings, task=task, scorer=scorer, watch=watch, **options)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def die():
    """What ends a run at once, with nothing saved."""
    raise KeyboardInterrupt


def stopped_and_resumed(settings, step=3, kind="step"):
    """A run that gets Ctrl-C at a step, and goes on."""
    watch = Watch(step, interrupt, kind)
    with pytest.raises(KeyboardInterrupt):
        run(settings, watch)
    again = Watch()
    run(settings, again)
    return outcome(Path(settings.out)), watch, again
