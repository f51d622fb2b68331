"""Runs that go wrong: numbers that are not finite, a task that raises, a full disk, damaged files.
Each ends with one line that names what to mend, and the last boundary is kept."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from training_kills import outcome
from training_stops import Watch, interrupt, run, toy_run
from training_toys import Graded, InProcess, Sums

import bridge
from bridge.errors import BridgeError
from bridge.training import train
from bridge.training.log import read_log

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def settings(toy_model, tmp_path):
    return toy_run(toy_model, tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_with_its_batch(settings):
    with pytest.raises(BridgeError) as error:
        run(replace(settings, lr=1e30, save_every=1))
    failed = Path(settings.out) / "failed" / "step-000002.npz"
    message = str(error.value)
    assert "step 2: loss is nan" in message and "\n" not in message
    assert str(failed) in message and "checkpoints/step-000001" in message
    with np.load(failed) as kept:
        names = {"0.tokens", "0.groups", "0.active", "0.targets", "0.target_mask", "0.advantages"}
        assert names == set(kept.files) and kept["0.tokens"].shape[0] == 8
    assert [r["step"] for r in read_log(Path(settings.out) / "log.jsonl")] == [0, 1]
    assert not (Path(settings.out) / "final").exists()


def test_a_gradient_above_the_bound_stops(settings):
    class Spread(Sums):
        def score(self, problem, response):
            return float(len(response) + sum(map(ord, response)))

    with pytest.raises(
        BridgeError, match=r"step 1: grad_norm .* is above 1e-09.*no checkpoint yet"
    ):
        run(replace(settings, stop_grad_norm=1e-9, max_new_tokens=5), task=Spread())


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_task_that_raises_is_named_and_the_last_boundary_kept(settings, split):
    """At the fourth step, or at the evaluation after the third."""

    class Ends(Graded):
        asked = 0

        def problem(self, which, number):
            self.asked += which == split
            if self.asked > {"train": 2 + 3 * 2, "validation": 2 + 2}[split]:  # 2 before it begins
                raise IndexError("no\nmore")
            return super().problem(which, number)

    late = replace(settings, save_every=100, keep=1)
    run(replace(late, out=settings.out + "-undisturbed"))
    said = rf"task sums: problem \d+ of {split} fails \(IndexError: no more\)"
    with pytest.raises(BridgeError, match=said) as error:
        run(late, task=Ends())
    assert "\n" not in str(error.value)
    assert run(late).resumed_from == 3
    assert outcome(Path(settings.out)) == outcome(Path(settings.out + "-undisturbed"))


def test_whatever_else_goes_wrong_the_last_boundary_is_kept(settings):
    class Gone(InProcess):
        asked = 0

        def score(self, pairs):
            self.asked += 1
            if self.asked > 3:
                raise RuntimeError("the device is gone")
            return super().score(pairs)

    with pytest.raises(RuntimeError, match="the device is gone"):
        train(replace(settings, save_every=100, eval_every=0), task=Graded(), scorer=Gone(Graded()))
    assert (Path(settings.out) / "checkpoints" / "step-000003").is_dir()


@pytest.mark.parametrize("where", ["trainer.safetensors", "progress.json", "log.jsonl", "best"])
def test_a_full_disk_is_one_line_and_loses_nothing(settings, monkeypatch, where):
    """The disk is full when a file is synced, or appended to, at the second of its kind."""
    run(replace(settings, out=settings.out + "-undisturbed"))
    full = {"now": 0}
    fsync, write = os.fsync, bridge.training.log.Log.write

    def refuse(descriptor):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if where in name:
            full["now"] += 1
            if full["now"] == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, line):
            self.file.write(line[:7])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def close(self):
            self.file.close()

    def fill(self, record):
        if where == "log.jsonl" and record["step"] == 5:
            self.lines.file = Full(self.lines.file)
        write(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        patch.setattr(bridge.training.log.Log, "write", fill)
        with pytest.raises(BridgeError, match=r"No space left on device.*free some space") as error:
            run(settings)
    assert "\n" not in str(error.value) and ".partial-" not in str(error.value)
    assert not list(Path(settings.out).rglob(".*.partial-*"))
    run(settings)
    assert outcome(Path(settings.out)) == outcome(Path(settings.out + "-undisturbed"))


def test_a_damaged_checkpoint_names_its_file(settings):
    with pytest.raises(KeyboardInterrupt):
        run(settings, Watch(2, interrupt))
    state = Path(settings.out) / "checkpoints" / "step-000002" / "trainer.safetensors"
    state.write_bytes(state.read_bytes()[:-9])
    with pytest.raises(BridgeError, match=r"step-000002/trainer.safetensors.*cut off"):
        run(settings)
    (state.parent / "progress.json").unlink()
    with pytest.raises(BridgeError, match=r"progress.json: is missing or damaged"):
        run(settings)


@pytest.mark.parametrize(
    "line", [b'{"kind": "st', b"\xff", b"[1]", b'{"kind": "step", "step": "3"}']
)
def test_a_damaged_line_of_the_log_is_named(settings, line):
    with pytest.raises(KeyboardInterrupt):
        run(settings, Watch(2, interrupt))
    log = Path(settings.out) / "log.jsonl"
    first, *rest = log.read_bytes().splitlines()
    log.write_bytes(b"\n".join([first, line, *rest, b""]))
    with pytest.raises(
        BridgeError, match=r"log\.jsonl, line 2: is damaged .*cut the file"
    ) as error:
        run(settings, resume=True)
    assert "\n" not in str(error.value)
    log.write_bytes(first + b"\n")
    assert run(settings, resume=True).resumed_from == 2
