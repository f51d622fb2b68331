"""Runs that are stopped: by kill -9, Ctrl-C, numbers that are not finite, a full disk, a second
process. What was saved is whole, and the run that goes on is the run that was not stopped."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training_kills import outcome
from training_toys import Graded, InProcess, Sums, write_model

import bridge
from bridge.errors import BridgeError
from bridge.training import GRPOSettings, SFTSettings, train
from bridge.training.log import read_log
from bridge.training.order import problem_number
from bridge.training.run_directory import RunDirectory, check_same
from bridge.training.watch import Silent

TESTS = Path(__file__).parent


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("runs") / "model")


@pytest.fixture
def settings(model, tmp_path):
    return GRPOSettings(
        checkpoint=str(model),
        out=str(tmp_path / "run"),
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


class Wordy(Graded):
    """Of a split, the second prompt is long."""

    def __init__(self, split):
        super().__init__()
        self.split, self.second = split, problem_number(80, 0, 1) if split == "train" else 1

    def problem(self, split, number):
        found = super().problem(split, number)
        long = split == self.split and number == self.second
        return replace(found, prompt="1+" * 10 + found.prompt) if long else found


def run(settings, watch=None, **options):
    task = options.pop("task", None) or Graded()
    return train(settings, task=task, scorer=InProcess(task), watch=watch, **options)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("backend, kills", [("torch", 50), ("jax", 5), ("mlx", 5)])
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


def stopped_and_resumed(settings, step=3, kind="step"):
    """A run that gets Ctrl-C at a step, and goes on."""
    watch = Watch(step, interrupt, kind)
    with pytest.raises(KeyboardInterrupt):
        run(settings, watch)
    again = Watch()
    run(settings, again)
    return outcome(Path(settings.out)), watch, again


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


def test_ctrl_c_while_sampling_keeps_what_is_sampled(model, tmp_path):
    settings = SFTSettings(
        checkpoint=str(model),
        out=str(tmp_path / "sft"),
        task="sums",
        backend="torch",
        problems=24,
        samples=8,
        max_rows=64,
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


def test_a_run_goes_on_only_with_its_own_settings(settings, model, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(settings, Watch(2, interrupt))
    changes = {
        "lr": 0.5,
        "seed": 9,
        "width": 5,
        "backend": "mlx",
        "temperature": 0.5,
        "trainable": ("bridge",),
        "system": "x",
        "task_options": {"a": 1},
    }
    for name, value in changes.items():
        with pytest.raises(BridgeError, match=f"config.toml: {name} was .*, and now is ") as error:
            run(replace(settings, **{name: value}))
        assert "\n" not in str(error.value)
    more = replace(settings, save_every=1, keep=5, steps=7, reward_seconds=20)  # what may change
    assert run(more, resume=True).resumed_from == 2
    assert run(more).steps == 7  # done already
    assert run(replace(more, steps=8)).resumed_from == 7
    linear = replace(settings, schedule="linear", out=settings.out + "2")
    with pytest.raises(KeyboardInterrupt):
        run(linear, Watch(2, interrupt))
    with pytest.raises(BridgeError, match="steps was 6, and now is 5"):
        run(replace(linear, steps=5))


def test_a_run_that_has_saved_nothing_may_begin_with_other_settings(settings):
    with pytest.raises(KeyboardInterrupt):
        run(replace(settings, max_new_tokens=3), Watch(1, die))
    assert "max_new_tokens = 3\n" in (Path(settings.out) / "config.toml").read_text()
    assert run(settings).steps == 6
    assert "max_new_tokens = 2\n" in (Path(settings.out) / "config.toml").read_text()


LONG = r"task sums: the prompt of problem \d+ of {} has {} tokens.* goes past the context of 64"
REFUSED = [
    ({"max_new_tokens": 61}, Graded(), LONG.format("train", 4)),
    ({"max_new_tokens": 50}, Wordy("train"), LONG.format("train", 24)),
    ({"max_new_tokens": 50}, Wordy("validation"), LONG.format("validation", 24)),
    ({"micro_batch_tokens": 19}, Graded(), r"4 rows of up to 5 tokens are 20 cells"),
]


@pytest.mark.parametrize("kind", ["grpo", "sft"])
@pytest.mark.parametrize("change, task, message", REFUSED)
def test_what_is_refused_leaves_nothing(settings, kind, change, task, message):
    if kind == "sft":
        names = ("checkpoint", "out", "task", "backend", "width", "max_new_tokens", "eval_every")
        settings = SFTSettings(**{name: getattr(settings, name) for name in names})
    with pytest.raises(BridgeError, match=message) as error:
        run(replace(settings, **change), task=task)
    assert "\n" not in str(error.value) and not Path(settings.out).exists()


def test_rows_are_as_long_as_the_context_leaves(settings):
    """Where nothing else is said: the same as with that length, and after a stop, too."""
    free = replace(settings, max_new_tokens=None, steps=3, eval_every=0, save_every=1)
    got, *_ = stopped_and_resumed(free, 2)
    run(replace(free, max_new_tokens=60, out=settings.out + "-said"))
    assert got == outcome(Path(settings.out + "-said"))


def test_what_an_older_run_was_asked_is_the_default_yet(settings, tmp_path):
    older, now = (replace(settings, max_new_tokens=n) for n in (256, None))
    check_same(older, now, tmp_path)
    check_same(now, older, tmp_path)
    with pytest.raises(BridgeError, match="max_new_tokens was 255, and now is 256"):
        check_same(replace(now, max_new_tokens=255), now, tmp_path)


def test_a_best_checkpoint_is_worth_keeping(settings):
    """Even where nothing else was saved; that of the start is not, since it is the start."""
    slow = replace(settings, save_every=100, lr=1e30, eval_every=1)
    with pytest.raises(BridgeError, match=r"step 2: loss is nan.*there is no checkpoint yet"):
        run(slow)
    kept = Path(settings.out) / "best" / "training.json"
    assert json.loads(kept.read_text())["evaluation"]["step"] == 0
    with pytest.raises(KeyboardInterrupt):
        run(replace(slow, lr=1e-2), Watch(1, die, "evaluation"))
    said = json.loads(kept.read_text())
    kept.write_text(json.dumps({**said, "evaluation": {"step": 1}}))
    with pytest.raises(BridgeError, match=r"lr was 0.01, and now is 0.02"):
        run(replace(slow, lr=2e-2))


def die():
    """What ends a run at once, with nothing saved."""
    raise KeyboardInterrupt


def test_a_finished_run_is_left_alone(settings):
    first = run(settings)
    before = outcome(Path(settings.out))
    again = run(settings)
    assert outcome(Path(settings.out)) == before
    assert (again.steps, again.best, again.last) == (first.steps, first.best, first.last)


def test_what_the_directory_must_not_be(settings, tmp_path, monkeypatch):
    with pytest.raises(BridgeError, match="holds no run to resume"):
        run(settings, resume=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(BridgeError, match="exists already and holds no run; choose another name"):
        run(settings)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(BridgeError, match="exists already and holds no run"):
        run(replace(settings, out=str(file)))
    with pytest.raises(BridgeError, match="cannot be made"):
        run(replace(settings, out=str(file / "run")))


def test_a_second_process_is_kept_out(settings):
    directory = RunDirectory.open(settings)
    with pytest.raises(BridgeError, match="another process is at this run"):
        run(settings)
    with directory:
        pass
    run(settings)
    with (Path(settings.out) / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_changed_checkpoint_is_noticed(settings, tmp_path):
    mine = write_model(tmp_path / "mine")
    settings = replace(settings, checkpoint=str(mine))
    with pytest.raises(KeyboardInterrupt):
        run(settings, Watch(2, interrupt))
    other = write_model(tmp_path / "other", seed=1)
    (other / "model.safetensors").replace(mine / "model.safetensors")
    with pytest.raises(BridgeError, match=r"mine: has changed since .* started from it"):
        run(settings)


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


def test_best_is_the_best_evaluation_and_the_earliest_of_equals(settings, monkeypatch):
    accuracies = iter([0.25, 0.5, 0.5])

    def evaluate(*_):
        accuracy = next(accuracies)
        return {"accuracy": accuracy, "reward_mean": accuracy, "problems": 2}

    monkeypatch.setattr(bridge.training.loop, "evaluate", evaluate)
    result = run(settings)
    assert result.best["step"] == 3 and result.best["accuracy"] == 0.5
    kept = json.loads((Path(settings.out) / "best" / "training.json").read_text())
    assert kept["evaluation"]["step"] == 3
    records = read_log(Path(settings.out) / "log.jsonl")
    assert [r["step"] for r in records if r["kind"] == "evaluation"] == [0, 3, 6]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_holds_what_was_trained(settings, model, dtype):
    chosen = replace(settings, adapter=True, trainable=("bridge",), dtype=dtype)
    result = run(chosen)
    tensors = dict(bridge.load(result.final, backend="numpy").implementation.tensors())
    before = dict(bridge.load(model, backend="numpy").implementation.tensors())
    for name in before:
        assert np.array_equal(tensors[name], before[name]) == (".bridge." not in name)
    held = os.listdir(Path(result.final))
    assert "bridge_adapter.json" in held and "tokenizer.json" not in held
    with pytest.raises(BridgeError, match=r"adapter: model.embed_tokens.weight is trained too"):
        run(replace(settings, adapter=True, out=settings.out + "2"))


def test_masters_are_saved_whole_whatever_the_model_computes_in(settings):
    """Computed in bfloat16, stored in float32: the checkpoint holds the float32 masters."""
    result = run(replace(settings, dtype="bfloat16", save_every=6))
    last = Path(settings.out) / "checkpoints" / "step-000006"
    state = bridge.training.saving.read_state(last)
    saved = dict(
        bridge.load(result.final, backend="numpy", dtype="float32").implementation.tensors()
    )
    for name, tensor in saved.items():
        assert tensor.tobytes() == state[f"master.{name}"].tobytes()
    some = saved["model.layers.0.mlp.up_proj.weight"]
    assert (torch.from_numpy(some).bfloat16().float().numpy() != some).any()


def test_checkpoints_are_pruned_to_a_number(settings):
    run(replace(settings, save_every=1, keep=3))
    names = sorted(p.name for p in (Path(settings.out) / "checkpoints").iterdir())
    assert names == ["step-000004", "step-000005", "step-000006"]


def test_tensorboard_gets_every_figure(settings):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(replace(settings, log=("tensorboard",)))
    events = EventAccumulator(str(Path(settings.out) / "tensorboard"), {"tensors": 0})
    events.Reload()
    steps = [r for r in read_log(Path(settings.out) / "log.jsonl") if r["kind"] == "step"]
    found = [(e.step, e.tensor_proto.float_val[0]) for e in events.Tensors("step/reward_mean")]
    assert found == [(r["step"], pytest.approx(r["reward_mean"])) for r in steps]
    for figure, read in (
        ("norm_ratio", lambda r: r["norm_ratio"]),
        ("norm_ratios/1", lambda r: r["norm_ratios"][1]),
    ):
        found = [(e.step, e.tensor_proto.float_val[0]) for e in events.Tensors(f"step/{figure}")]
        assert found == [(r["step"], pytest.approx(read(r))) for r in steps if r["step"] % 2]
    assert "evaluation/accuracy" in events.Tags()["tensors"]


@pytest.mark.parametrize("killed, changed", [(3, {}), (1, {}), (1, {"lr": 1.0, "seed": 1})])
def test_tensorboard_has_each_point_once_after_a_kill(settings, monkeypatch, killed, changed):
    """Killed at a step after the checkpoint of step 2, or before there is one; then the run may
    also begin with other settings, and what was drawn before is gone."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.summary.writer import event_file_writer

    # Files of one second are read by the process's count of them, as texts: from 0 again.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    logged = replace(settings, log=("tensorboard",), eval_every=1)
    with pytest.raises(KeyboardInterrupt):
        run(logged, Watch(killed, die))
    run(replace(logged, **changed))
    events = EventAccumulator(str(Path(settings.out) / "tensorboard"), {"tensors": 0})
    events.Reload()
    records = read_log(Path(settings.out) / "log.jsonl")
    for kind in ("step", "evaluation"):
        found = [
            (e.step, e.tensor_proto.float_val[0]) for e in events.Tensors(f"{kind}/reward_mean")
        ]
        want = [(r["step"], pytest.approx(r["reward_mean"])) for r in records if r["kind"] == kind]
        assert found == want


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_is_told_or_says_how_to_install_it(settings, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BridgeError, match=f"log: {name} cannot be imported .*pip install {name}"):
        run(replace(settings, log=(name,)))
    assert not Path(settings.out).exists()
    heard = []

    class Tracker:
        def init(self, **options):
            heard.append(options)

        def log(self, figures, step):
            heard.append((step, figures))

        def finish(self):
            heard.append("finished")

    monkeypatch.setitem(sys.modules, name, Tracker())
    with pytest.raises(KeyboardInterrupt):
        run(replace(settings, log=(name,)), Watch(3, die, "evaluation"))
    run(replace(settings, log=(name,)))
    [again] = [i for i, one in enumerate(heard) if isinstance(one, dict)][1:]
    del heard[again - 1 : again + 1]  # it finished, and was begun again
    told = [(step, min(figures)) for step, figures in heard[1:-1]]
    assert len(set(told)) == len(told)
    assert heard[0]["project"] == "bridge" and heard[0]["name"] == "run"
    assert heard[0]["config"]["lr"] == 1e-2 and heard[-1] == "finished"
    assert [step for step, figures in heard[1:-1] if "step/loss" in figures] == [1, 2, 3, 4, 5, 6]
    assert [step for step, figures in heard[1:-1] if "step/norm_ratios/0" in figures] == [1, 3, 5]
