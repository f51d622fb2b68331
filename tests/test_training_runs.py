"""Runs that are stopped, by kill -9 or Ctrl-C: what was saved is whole, and the run that goes on is
the run that was not stopped."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from training_kills import outcome
from training_stops import Watch, interrupt, run, stopped_and_resumed, toy_run

from bridge.errors import BridgeError
from bridge.training import SFTSettings

TESTS = Path(__file__).parent
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def settings(toy_model, tmp_path):
    return toy_run(toy_model, tmp_path / "run")


FEW = [("torch", 8), ("jax", 1), ("mlx", 2)]
MANY = [
    pytest.param(*many, marks=pytest.mark.slow) for many in (("torch", 50), ("jax", 5), ("mlx", 5))
]


@pytest.mark.parametrize("backend, kills", FEW + MANY)
def test_killed_runs_end_as_if_nothing_had_happened(tmp_path, backend, kills):
    command = [sys.executable, TESTS / "training_kills.py", backend, kills, 0, tmp_path]
    alone = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env={**os.environ, **alone, "PYTHONPATH": os.pathsep.join(map(str, [TESTS, *sys.path]))},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["kills"] == kills and found["runs"] >= 1
    assert found["differing"] == []


@pytest.mark.parametrize("kind, step", [("step", 3), ("step", 4), ("evaluation", 3)])
def test_ctrl_c_saves_at_the_boundary_and_the_run_goes_on_from_there(settings, kind, step):
    run(replace(settings, out=settings.out + "-undisturbed"))
    got, watch, again = stopped_and_resumed(settings, step, kind)
    assert again.starts == [(step, 6)]
    assert watch.notes[0].startswith("stopping after this step") and "saved" in watch.notes[1]
    want = outcome(Path(settings.out + "-undisturbed"))
    assert sorted(want) == sorted(got) and want == got


@pytest.mark.parametrize("lost", ["exp_avg.", "master.", "step"])
def test_a_resume_that_loses_something_is_seen(settings, monkeypatch, lost):
    """The comparison above can fail: here the trainer's state comes back without a part."""
    from bridge_torch.train import Trainer

    run(replace(settings, out=settings.out + "-undisturbed"))
    original = Trainer.restore

    def restore(self, state):
        fresh = self.state()
        mixed = {k: fresh[k] if k.startswith(lost) else v for k, v in state.items()}
        original(self, mixed)

    monkeypatch.setattr(Trainer, "restore", restore)
    got, _, _ = stopped_and_resumed(settings)
    assert got != outcome(Path(settings.out + "-undisturbed"))


def test_a_second_ctrl_c_ends_at_once_and_loses_no_checkpoint(settings):
    def twice():
        interrupt()
        interrupt()

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(settings, Watch(3, twice))
    directory = Path(settings.out)
    assert [p.name for p in (directory / "checkpoints").iterdir()] == ["step-000002"]
    assert signal.getsignal(signal.SIGINT) is before
    run(settings)
    assert (directory / "final").is_dir()


def test_ctrl_c_while_sampling_keeps_what_is_sampled(toy_model, tmp_path):
    settings = SFTSettings(
        checkpoint=str(toy_model),
        out=str(tmp_path / "sft"),
        task="sums",
        backend="torch",
        problems=24,
        samples=8,
        max_rows=16,
        max_new_tokens=2,
        epochs=1,
    )

    class Stop(Watch):
        def sampled(self, done, total, correct):
            if done == 16:
                interrupt()

    with pytest.raises(KeyboardInterrupt):
        run(settings, Stop())
    path = tmp_path / "sft" / "samples.jsonl"
    first = path.read_bytes()
    assert len(first.splitlines()) == 16
    one, *more = first.splitlines(keepends=True)
    path.write_bytes(b"".join([one, b'{"respon\n', *more]))
    with pytest.raises(BridgeError, match=r"samples\.jsonl, line 2: is damaged"):
        run(settings)
    some = b"".join(first.splitlines(keepends=True)[:11])
    path.write_bytes(some + b'{"half a li')  # what a power cut may leave: half a batch of lines
    run(settings)
    assert path.read_bytes().startswith(first) and len(path.read_bytes().splitlines()) == 24
    run(replace(settings, out=str(tmp_path / "undisturbed")))
    assert path.read_bytes() == (tmp_path / "undisturbed" / "samples.jsonl").read_bytes()


def test_rows_are_as_long_as_the_context_leaves(settings):
    """Where nothing else is said: the same as with that length, and after a stop, too."""
    free = replace(settings, max_new_tokens=None, steps=3, eval_every=0, save_every=1)
    got, *_ = stopped_and_resumed(free, 2)
    run(replace(free, max_new_tokens=60, out=settings.out + "-said"))
    assert got == outcome(Path(settings.out + "-said"))


def test_a_finished_run_is_left_alone(settings):
    first = run(settings)
    before = outcome(Path(settings.out))
    again = run(settings)
    assert outcome(Path(settings.out)) == before
    assert (again.steps, again.best, again.last) == (first.steps, first.best, first.last)
