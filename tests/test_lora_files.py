"""Low-rank updates on disk (clause 9.13), with PEFT as the oracle: what it computes over our files
is what we compute, what it saves we read, and what it would compute otherwise we refuse by its key.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from lora_toys import SOME, add_lora
from safetensors.numpy import load_file, save_file
from tiny_host import write_host
from transformers import AutoModelForCausalLM

from bridge.checkpoints.conversion import convert
from bridge.checkpoints.initialise import fresh_lora, init
from bridge.checkpoints.lora import DIRECTORY, PREFIX, SETTINGS, TENSORS
from bridge.checkpoints.reading import Checkpoint, open_checkpoint
from bridge.checkpoints.tensors import merged
from bridge.config import TARGETS, LoraConfig, lora_names, tensor_shapes
from bridge.errors import BridgeError
from bridge_ref.model import forward

FAMILIES = {
    "llama": {"attention_bias": True},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
}
TOKENS = np.array([[3, 250, 7, 7, 90], [4, 1, 200, 8, 5]])


def our_logits(opened: Checkpoint) -> np.ndarray:
    """Of the reference, with the updates in the matrices."""
    lora = opened.config.lora
    tensors = {n: merged(opened.tensors, n, lora).astype(np.float64) for n in opened.tensors}
    B, S = TOKENS.shape
    cells = (np.ones((B, S), bool), np.tile(np.arange(S), (B, 1)))
    return forward(opened.config.without_lora(), tensors, TOKENS, np.arange(B), *cells)[0]


def logits_of(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model.double()(torch.from_numpy(TOKENS)).logits.numpy()


def host_of(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_computes_over_our_files_what_we_compute(family, tmp_path):
    host = write_host(tmp_path / "host", model_type=family, **FAMILIES[family])
    plain = our_logits(open_checkpoint(host))
    opened = open_checkpoint(add_lora(host))
    assert opened.config.lora == SOME
    model = peft.PeftModel.from_pretrained(host_of(host), host / DIRECTORY)
    want, got = logits_of(model), our_logits(opened)
    np.testing.assert_allclose(got, want, atol=2e-5)  # the merged matrices are float32
    assert abs(got - plain).max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "up_proj"], ["mlp.down_proj"]])
def test_what_peft_saves_is_read(family, targets, tmp_path):
    host = write_host(tmp_path / "host", model_type=family, **FAMILIES[family])
    chosen = peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(host_of(host), chosen)
    model.save_pretrained(tmp_path / "theirs")
    want = logits_of(model)
    shutil.copytree(tmp_path / "theirs", host / DIRECTORY)
    opened = open_checkpoint(host)
    found = tuple(t for t in TARGETS if targets == "all-linear" or any(t in n for n in targets))
    assert opened.config.lora == LoraConfig(3, 7.0, found)
    np.testing.assert_allclose(our_logits(opened), want, atol=2e-5)
    names = [name for name in opened.tensors if ".lora_" in name]
    assert names == lora_names(opened.config) == list(fresh_lora(opened.config, 0))
    stored = load_file(tmp_path / "theirs" / TENSORS)
    assert all(np.array_equal(opened.tensors[n], stored[PREFIX + n]) for n in names)


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_peft_touches_the_hosts_modules_alone(kind, tmp_path):
    """Of transformers' model with our code, whose blocks have projections of the same names."""
    host = write_host(tmp_path / "host")
    init(host, tmp_path / "model", heads=2, head_dim=4, kind=kind)
    convert(tmp_path / "model", tmp_path / "code", "torch", remote_code=True)
    add_lora(tmp_path / "model", replace(SOME, targets=TARGETS))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "code", trust_remote_code=True)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "model" / DIRECTORY)
    touched = {name for name, _ in model.named_parameters() if ".lora_" in name}
    config = open_checkpoint(tmp_path / "model").config
    assert {n.replace(".default", "") for n in touched} == {PREFIX + n for n in lora_names(config)}
    want = our_logits(open_checkpoint(tmp_path / "model"))
    np.testing.assert_allclose(logits_of(model), want, atol=2e-5)


def test_updates_are_of_every_form_and_of_adapters(tmp_path):
    host = write_host(tmp_path / "host")
    init(host, tmp_path / "model", heads=2, head_dim=4)
    first = open_checkpoint(add_lora(tmp_path / "model"))
    last = tmp_path / "model"
    for to in ("torch", "jax", "mlx"):
        made = convert(last, tmp_path / to, to, shard_size="5GB" if to == "jax" else 3000)
        opened = open_checkpoint(tmp_path / to)
        assert (opened.form, opened.config) == (to, first.config)
        assert list(opened.tensors) == list(first.tensors) == list(tensor_shapes(first.config))
        assert all(np.array_equal(opened.tensors[n], first.tensors[n]) for n in first.tensors)
        assert made.lora_rank == 2 and not made.merged
        last = tmp_path / to
    files = [(place / DIRECTORY / TENSORS).read_bytes() for place in (tmp_path / "model", last)]
    assert files[0] == files[1]
    convert(last, tmp_path / "adapter", "torch", adapter=True)
    adapter = open_checkpoint(tmp_path / "adapter", host)
    assert adapter.config == first.config
    assert all(np.array_equal(adapter.tensors[n], first.tensors[n]) for n in first.tensors)
    convert(tmp_path / "adapter", tmp_path / "again", "jax", merge=host)
    again = open_checkpoint(tmp_path / "again")
    assert all(np.array_equal(again.tensors[n], first.tensors[n]) for n in first.tensors)


def test_an_adapter_may_hold_updates_alone(tmp_path):
    host = add_lora(write_host(tmp_path / "host"))
    convert(host, tmp_path / "adapter", "torch", adapter=True)
    assert not (tmp_path / "adapter" / "bridge.safetensors").exists()
    one, other = open_checkpoint(tmp_path / "adapter"), open_checkpoint(host)
    assert one.config == other.config and one.base is not None
    assert all(np.array_equal(one.tensors[n], other.tensors[n]) for n in other.tensors)
    shutil.rmtree(tmp_path / "adapter" / DIRECTORY)
    with pytest.raises(BridgeError, match="bridge is missing; an adapter holds blocks, or updates"):
        open_checkpoint(tmp_path / "adapter")


def test_an_adapter_without_updates_on_a_base_with_some_is_refused(tmp_path):
    host = write_host(tmp_path / "host")
    init(host, tmp_path / "adapter", heads=2, head_dim=4, adapter=True)
    add_lora(host)
    with pytest.raises(BridgeError, match=r"has updates \(in lora\), and its adapter"):
        open_checkpoint(tmp_path / "adapter")
    shutil.copytree(host / DIRECTORY, tmp_path / "adapter" / DIRECTORY)
    assert open_checkpoint(tmp_path / "adapter").config.lora == SOME


def settings(change: dict) -> dict:
    return {"peft_type": "LORA", "r": 2, "lora_alpha": 5, "target_modules": ["q_proj"]} | change


REFUSED = {
    "peft_type": ({"peft_type": "LOHA"}, {"peft_type": None}),
    "use_dora": ({"use_dora": True},),
    "use_rslora": ({"use_rslora": True},),
    "use_qalora": ({"use_qalora": True},),
    "bias": ({"bias": "all"}, {"bias": "lora_only"}),
    "lora_bias": ({"lora_bias": True},),
    "modules_to_save": ({"modules_to_save": ["lm_head"]},),
    "rank_pattern": ({"rank_pattern": {"k_proj": 4}},),
    "alpha_pattern": ({"alpha_pattern": {"k_proj": 4}},),
    "layers_to_transform": ({"layers_to_transform": [0]}, {"layers_to_transform": 1}),
    "layer_replication": ({"layer_replication": [[0, 2], [1, 3]]},),
    "fan_in_fan_out": ({"fan_in_fan_out": True},),
    "target_parameters": ({"target_parameters": ["q_proj.weight"]},),
    "trainable_token_indices": ({"trainable_token_indices": [1]},),
    "init_lora_weights": ({"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}),
    "alora_invocation_tokens": ({"alora_invocation_tokens": [1]},),
    "a_setting_of_tomorrow": ({"a_setting_of_tomorrow": 3},),
    "target_modules": (
        {"target_modules": ".*q_proj"},
        {"target_modules": None},
        {"target_modules": []},
        {"target_modules": ["query"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["layers.0.self_attn.q_proj"]},
        {"exclude_modules": ["model.layers.1.self_attn.q_proj"]},
    ),
    "exclude_modules": ({"exclude_modules": ".*k_proj"},),
    "r": ({"r": 0}, {"r": 2.0}, {"r": True}, {"r": 10**9}),
    "lora_alpha": ({"lora_alpha": 0}, {"lora_alpha": "8"}, {"lora_alpha": float("inf")}),
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_setting_that_changes_what_is_computed_is_refused_by_its_key(key, tmp_path):
    host = add_lora(write_host(tmp_path / "host"), LoraConfig(2, 5.0, ("q_proj",)))
    where = host / DIRECTORY / SETTINGS
    where.write_text(json.dumps(settings({})))
    assert open_checkpoint(host).config.lora == LoraConfig(2, 5.0, ("q_proj",))
    for change in REFUSED[key]:
        where.write_text(json.dumps(settings(change)))
        with pytest.raises(BridgeError, match=rf"^{where}: {key}\b") as error:
            open_checkpoint(host)
        assert "\n" not in str(error.value)


def test_settings_that_change_nothing_are_taken(tmp_path):
    host = add_lora(write_host(tmp_path / "host"), LoraConfig(2, 5.0, ("q_proj",)))
    free = {
        "lora_dropout": 0.1,
        "exclude_modules": ["bridge.q_proj"],
        "init_lora_weights": "gaussian",
        "target_modules": ["q_proj", "query"],
        "task_type": "CAUSAL_LM",
        "loftq_config": {},
        "a_setting_of_tomorrow": None,
    }
    (host / DIRECTORY / SETTINGS).write_text(json.dumps(settings(free)))
    assert open_checkpoint(host).config.lora == LoraConfig(2, 5.0, ("q_proj",))


NAME = PREFIX + "model.layers.1.mlp.down_proj.lora_B.weight"
WRONG = {
    "is missing; adapter_config.json calls for it": lambda t: t.pop(NAME),
    r"is \[24, 2\], but adapter_config.json": lambda t: t.update({NAME: np.zeros((24, 2), "f4")}),
    "holds nan at": lambda t: t[NAME].__setitem__((3, 1), np.nan),
    "is I32; weights must be": lambda t: t.update({NAME: t[NAME].astype(np.int32)}),
    "is not one that adapter_config.json calls for": (
        lambda t: t.update({PREFIX + "lm_head.lora_A.weight": np.zeros((2, 16), "f4")})
    ),
}


@pytest.mark.parametrize("said", WRONG)
def test_tensors_that_do_not_fit_are_refused(said, tmp_path):
    host = add_lora(write_host(tmp_path / "host"))
    where = host / DIRECTORY / TENSORS
    tensors = {name: array.copy() for name, array in load_file(where).items()}
    WRONG[said](tensors)
    save_file(tensors, where)
    with pytest.raises(BridgeError, match=rf"^{where}: tensor .*{said}"):
        dict(open_checkpoint(host).tensors)


def test_links_are_refused_but_those_of_hugging_faces_cache(tmp_path):
    cache = tmp_path / "models--a--b"
    (cache / "snapshots").mkdir(parents=True)
    host = add_lora(write_host(cache / "snapshots" / "main"))
    where = host / DIRECTORY / TENSORS
    (cache / "blobs").mkdir()
    where.rename(cache / "blobs" / "abc")
    where.symlink_to("../../../blobs/abc")
    assert open_checkpoint(host).config.lora == SOME
    shutil.copy(cache / "blobs" / "abc", tmp_path / "elsewhere")
    where.unlink()
    where.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BridgeError, match=f"^{where}: is a link to outside"):
        open_checkpoint(host)
    (host / DIRECTORY).rename(tmp_path / "there")
    (host / DIRECTORY).symlink_to(tmp_path / "there")
    with pytest.raises(BridgeError, match=f"^{host / DIRECTORY}: is a link; copy"):
        open_checkpoint(host)
    (host / DIRECTORY).unlink()
    (host / DIRECTORY).mkdir()
    with pytest.raises(BridgeError, match=f"^{host / DIRECTORY / SETTINGS}: no such file"):
        open_checkpoint(host)
