"""What a run writes: the best checkpoint, adapters, masters, and points for TensorBoard and
trackers, each once whatever stopped it."""

import json
import os
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training_stops import Watch, die, run, toy_run

import bridge
from bridge.contract import SFT
from bridge.errors import BridgeError
from bridge.model import trainable_names
from bridge.training.batches import Group, make_batch
from bridge.training.log import read_log
from bridge.training.saving import StateReader, read_state, write_state

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def settings(toy_model, tmp_path):
    return toy_run(toy_model, tmp_path / "run")


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
def test_an_adapter_holds_what_was_trained(settings, toy_model, dtype):
    chosen = replace(settings, adapter=True, trainable=("bridge",), dtype=dtype)
    result = run(chosen)
    tensors = dict(bridge.load(result.final, backend="numpy").implementation.tensors())
    before = dict(bridge.load(toy_model, backend="numpy").implementation.tensors())
    for name in before:
        assert np.array_equal(tensors[name], before[name]) == (".bridge." not in name)
    held = os.listdir(Path(result.final))
    assert {*held} >= {"bridge_adapter.json", "bridge.safetensors"}
    assert not {"model.safetensors", "tokenizer.json"} & {*held}
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


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_a_state_is_written_an_array_at_a_time(toy_model, tmp_path, backend):
    """It is what `state` gives, and of the arrays before one at most the last is alive yet."""
    model, alive = bridge.load(toy_model, backend=backend, dtype="float32"), []
    trainer = model.trainer(SFT(), trainable="bridge")
    trainer.step(make_batch([Group([1, 2], [[3, 4], [5]])]))
    state, original = trainer.state(), trainer.array

    def array(key):
        assert all(earlier() is None for earlier in alive[:-1])
        given = original(key)
        alive.append(weakref.ref(given))
        return given

    trainer.array = array
    names = trainable_names(model.config, "bridge")
    write_state(tmp_path, StateReader(trainer, model.config, names))
    found = read_state(tmp_path)
    assert found.keys() == state.keys() and len(alive) >= len(state)
    for key, given in state.items():
        assert found[key].dtype == given.dtype and np.array_equal(found[key], given)


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
