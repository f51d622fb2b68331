"""Training with low-rank updates: beside blocks and alone, saved for anyone, and gone on with."""

import json
import os
import shutil
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
from lora_toys import SOME, add_lora
from training_stops import run
from training_toys import Graded, write_model

import bridge
from bridge.checkpoints.conversion import convert
from bridge.checkpoints.initialise import fresh_lora
from bridge.checkpoints.reading import open_checkpoint
from bridge.config import TARGETS, LoraConfig, lora_names
from bridge.errors import BridgeError
from bridge.model import trainable_names
from bridge.training import GRPOSettings, SFTSettings
from bridge.training.directory import read_run
from bridge.training.plan import plan
from bridge.training.trained import trained_names, with_updates

RANK = LoraConfig(3, 6.0, TARGETS)


@pytest.fixture
def settings(toy_model, tmp_path):
    return GRPOSettings(
        checkpoint=str(toy_model),
        out=str(tmp_path / "run"),
        task="sums",
        backend="numpy",
        steps=2,
        problems=2,
        width=3,
        max_new_tokens=3,
        lr=1e-2,
        eval_every=0,
        gap_every=0,
        norms_every=0,
        save_every=1,
        lora_rank=3,
    )


def test_blocks_and_updates_move_and_the_host_stays(settings, toy_model):
    result = run(settings)
    before, after = open_checkpoint(toy_model), open_checkpoint(Path(result.final))
    assert after.config == replace(before.config, lora=RANK)
    for name in before.tensors:
        assert np.array_equal(after.tensors[name], before.tensors[name]) == (".bridge." not in name)
    fresh = fresh_lora(after.config, settings.seed)
    assert list(fresh) == lora_names(after.config)
    assert all(not np.array_equal(after.tensors[name], fresh[name]) for name in fresh)


def test_a_run_that_was_stopped_ends_as_one_that_was_not(settings):
    whole = run(replace(settings, out=settings.out + "-whole"))
    run(replace(settings, steps=1))
    shutil.rmtree(Path(settings.out) / "final")
    result = run(settings)
    assert result.resumed_from == 1
    one, other = (open_checkpoint(Path(r.final)) for r in (whole, result))
    assert one.config == other.config
    assert all(one.tensors[n].tobytes() == other.tensors[n].tobytes() for n in one.tensors)


def test_an_adapter_of_them_is_small_and_a_whole_model(settings):
    whole = run(settings)
    small = run(replace(settings, out=settings.out + "-small", adapter=True))
    held = {path.name for path in Path(small.final).iterdir()}
    assert held == {
        *("config.json", "bridge_adapter.json", "bridge.safetensors", "lora", "training.json")
    }
    one, other = (open_checkpoint(Path(r.final)) for r in (whole, small))
    assert one.config == other.config
    assert all(one.tensors[n].tobytes() == other.tensors[n].tobytes() for n in one.tensors)


def test_a_checkpoint_with_updates_is_trained_on_without_flags(settings, tmp_path):
    first = run(settings)
    on = replace(settings, checkpoint=first.final, out=str(tmp_path / "on"), lora_rank=None)
    before, after = (open_checkpoint(Path(r.final)) for r in (first, run(on)))
    assert after.config == before.config
    moved = {n for n in after.tensors if not np.array_equal(after.tensors[n], before.tensors[n])}
    assert moved == set(trainable_names(after.config, "bridge"))


def test_a_host_without_blocks_is_trained_by_them_alone(settings, toy_model, tmp_path):
    host = toy_model.parent / "model-host"
    result = run(replace(settings, checkpoint=str(host), adapter=True, lora_targets=("v_proj",)))
    opened = open_checkpoint(Path(result.final))
    assert opened.config.bridge is None and opened.config.lora == LoraConfig(3, 6.0, ("v_proj",))
    assert not (Path(result.final) / "bridge.safetensors").exists()
    convert(result.final, tmp_path / "merged", "torch", merge_lora=True)
    merged, plain = (open_checkpoint(path).tensors for path in (tmp_path / "merged", host))
    moved = {name for name in plain if not np.array_equal(merged[name], plain[name])}
    assert moved == {f"model.layers.{i}.self_attn.v_proj.weight" for i in range(2)}


def test_sft_trains_them_too(settings, toy_model, tmp_path):
    lines = [{"prompt": f"{a}+1=", "responses": [str(a + 1)] * 2} for a in range(4)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    chosen = SFTSettings(
        checkpoint=str(toy_model),
        out=settings.out,
        data=str(tmp_path / "data.jsonl"),
        backend="numpy",
        groups=4,
        epochs=1,
        lora_rank=3,
        norms_every=0,
    )
    opened = open_checkpoint(Path(run(chosen).final))
    assert any(opened.tensors[n].any() for n in opened.tensors if ".lora_B." in n)


def test_the_seed_makes_them(settings):
    opened = open_checkpoint(Path(settings.checkpoint))
    found = [with_updates(opened, replace(settings, seed=seed)) for seed in (0, 0, 1)]
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    arrays = [one.tensors[name] for one in found]
    assert np.array_equal(arrays[0], arrays[1]) and not np.array_equal(arrays[0], arrays[2])
    assert list(found[0].tensors) == [*found[0].specs] and found[0].config.lora == RANK


def test_nothing_said_all_is_trained_or_what_is_not_frozen(settings):
    opened = open_checkpoint(Path(settings.checkpoint))
    plain = replace(settings, lora_rank=None)
    assert trained_names(opened.config, plain) == list(opened.tensors)
    lora = with_updates(opened, settings).config
    both = trained_names(lora, settings)
    assert both == [n for n in with_updates(opened, settings).tensors if n in set(both)]
    assert {*both} == {*lora_names(lora), *(n for n in opened.tensors if ".bridge." in n)}


def test_a_plan_counts_what_is_trained(settings):
    found = plan(settings, task=Graded())
    trained = with_updates(open_checkpoint(Path(settings.checkpoint)), settings)
    names = trained_names(trained.config, settings)
    assert found.trained_parameters == sum(prod(trained.specs[name].shape) for name in names)
    assert found.parameters == sum(prod(spec.shape) for spec in trained.specs.values())
    assert not os.path.exists(settings.out)


def refused(settings, said):
    with pytest.raises(BridgeError, match=said) as error:
        run(settings)
    assert "\n" not in str(error.value) and not os.path.exists(settings.out)


def test_what_does_not_go_together_is_refused(settings, toy_model, tmp_path):
    with pytest.raises(BridgeError, match="which trainable all would train; give one"):
        replace(settings, trainable=("all",))
    refused(replace(settings, lora_rank=None, lora_alpha=4.0), "are of updates; give lora_rank too")
    with pytest.raises(BridgeError, match=r"lora_targets must be of q_proj, .*, not"):
        replace(settings, lora_targets=("query",))
    with pytest.raises(BridgeError, match="lora_rank must be 1 or above, not 0"):
        replace(settings, lora_rank=0)
    refused(replace(settings, trainable=("model.norm.weight",)), "trainable names no update")
    shutil.copytree(toy_model, tmp_path / "model")
    there = replace(settings, checkpoint=str(add_lora(tmp_path / "model")))
    refused(there, "lora_rank: .* has updates already, with 2; to train those")
    refused(replace(there, lora_rank=2, lora_alpha=4.0), "lora_alpha: .* already, with 5.0")
    refused(replace(there, lora_rank=2, lora_targets=("q_proj",)), "lora_targets: .* already")
    refused(replace(there, lora_rank=None, trainable=("all",)), "so train bridge, or merge")
    same = replace(there, lora_rank=2, lora_alpha=5.0, lora_targets=SOME.targets[::-1])
    opened = open_checkpoint(tmp_path / "model")
    assert with_updates(opened, same) is opened
    with pytest.raises(BridgeError, match="no Bridge blocks, and no low-rank updates"):
        trainable_names(opened.config.without_bridge().without_lora(), "bridge")


def test_a_run_of_before_goes_on(settings):
    """One whose settings say that all is trained, which was the default."""
    plain = replace(settings, lora_rank=None)
    run(replace(plain, trainable=("all",)))
    assert read_run(Path(settings.out)).trainable == ("all",)
    assert run(replace(plain, steps=3)).resumed_from == 2


def test_a_model_says_that_it_has_them(tmp_path):
    path = add_lora(write_model(tmp_path / "model"))
    assert "attention Bridge blocks, updates of rank 2" in repr(bridge.load(path, backend="numpy"))
