"""What becomes of low-rank updates in conversions, in `bridge init` and in what else reads a
checkpoint: they are kept, or added to the matrices and rounded once, and never lost in silence.
"""

import json

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
from lora_toys import SOME, add_lora
from tiny_host import write_host
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from bridge.checkpoints.conversion import convert
from bridge.checkpoints.initialise import init
from bridge.checkpoints.lora import DIRECTORY, SETTINGS
from bridge.checkpoints.reading import open_checkpoint
from bridge.checkpoints.sizes import inspect
from bridge.config import lora_names, tensor_shapes
from bridge.errors import BridgeError
from bridge.evaluation.peers.host import write_host as write_plain
from bridge.numbers.rounding import rounded
from bridge_cli.eval import _fingerprint
from bridge_cli.main import app


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A host with updates, and a model of it."""
    path = tmp_path_factory.mktemp("lora")
    add_lora(write_host(path / "host", hidden_size=64, intermediate_size=96))
    init(path / "host", path / "model", heads=2, head_dim=32, layers="0,2")
    return path


def same(one, other):
    assert list(one.tensors) == list(other.tensors)
    assert all(one.tensors[n].tobytes() == other.tensors[n].tobytes() for n in one.tensors)


def added(opened, name, dtype):
    """A tensor with its update, by the formula of clause 5.10, rounded once."""
    stem = name.removesuffix("weight")
    array = opened.tensors[name].astype(np.float64)
    if stem + "lora_A.weight" in opened.tensors:
        a, b = (opened.tensors[f"{stem}lora_{m}.weight"].astype(np.float64) for m in "AB")
        array = array + SOME.alpha / SOME.rank * (b @ a)
    return rounded(array, np.dtype(dtype), name)


def near(got, want):
    """The same, but for where the order of a sum decided a tie."""
    got, want = got.astype(np.float64), want.astype(np.float64)
    assert np.mean(got != want) < 0.01 and np.allclose(got, want, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("to", ["torch", "jax", "mlx"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_merging_adds_them_and_rounds_once(to, dtype, root, tmp_path):
    made = convert(root / "model", tmp_path / "out", to, dtype=dtype, merge_lora=True)
    before, after = open_checkpoint(root / "model"), open_checkpoint(tmp_path / "out")
    assert (made.merged, made.lora_rank, after.config.lora) == (True, None, None)
    assert not (tmp_path / "out" / DIRECTORY).exists()
    assert list(after.tensors) == list(tensor_shapes(before.config.without_lora()))
    numbers = np.float32 if dtype is None else ml_dtypes.bfloat16
    for name in after.tensors:
        near(after.tensors[name], added(before, name, numbers))
    changed = {n for n in after.tensors if (after.tensors[n] != before.tensors[n]).any()}
    matrices = {n.replace("lora_A.", "") for n in lora_names(before.config) if ".lora_A." in n}
    assert changed >= matrices and (dtype or changed == matrices)


def test_merging_is_what_peft_does(root, tmp_path):
    convert(root / "host", tmp_path / "out", "torch", merge_lora=True)
    model = AutoModelForCausalLM.from_pretrained(root / "host", dtype=torch.float64)
    model = peft.PeftModel.from_pretrained(model, root / "host" / DIRECTORY).double()
    theirs = model.merge_and_unload().state_dict()
    for name, array in open_checkpoint(tmp_path / "out").tensors.items():
        near(array, theirs[name].numpy().astype(np.float32))


def test_updates_that_peft_saved_are_taken_from_where_they_are(root, tmp_path):
    host = write_host(tmp_path / "host", hidden_size=64, intermediate_size=96)
    theirs = root / "host" / DIRECTORY
    init(host, tmp_path / "model", heads=2, head_dim=32, layers="0,2", lora=theirs)
    same(open_checkpoint(tmp_path / "model"), open_checkpoint(root / "model"))
    convert(host, tmp_path / "kept", "jax", lora=theirs)
    same(open_checkpoint(tmp_path / "kept"), open_checkpoint(root / "host"))
    convert(host, tmp_path / "merged", "torch", lora=theirs, merge_lora=True)
    convert(root / "host", tmp_path / "also", "torch", merge_lora=True)
    same(open_checkpoint(tmp_path / "merged"), open_checkpoint(tmp_path / "also"))
    with pytest.raises(BridgeError, match=r"has updates of its own \(in lora\); take one"):
        convert(root / "host", tmp_path / "out", "torch", lora=theirs)


def test_another_dtype_is_theirs_too(root, tmp_path):
    convert(root / "model", tmp_path / "half", "torch", dtype="bf16")
    opened = open_checkpoint(tmp_path / "half")
    assert opened.config == open_checkpoint(root / "model").config
    assert {spec.dtype.name for spec in opened.specs.values()} == {"bfloat16"}
    init(root / "host", tmp_path / "model", heads=2, head_dim=32, layers="0,2", dtype="bf16")
    same(open_checkpoint(tmp_path / "model"), opened)


def test_an_adapter_of_init_has_the_hosts_updates(root, tmp_path):
    init(root / "host", tmp_path / "adapter", heads=2, head_dim=32, layers="0,2", adapter=True)
    same(open_checkpoint(tmp_path / "adapter"), open_checkpoint(root / "model"))


def test_quantising_is_of_merged_matrices(root, tmp_path):
    convert(root / "model", tmp_path / "q", "mlx", quantize=4, merge_lora=True)
    convert(root / "model", tmp_path / "merged", "torch", merge_lora=True)
    convert(tmp_path / "merged", tmp_path / "then", "mlx", quantize=4)
    same(open_checkpoint(tmp_path / "q"), open_checkpoint(tmp_path / "then"))


def test_updates_on_a_quantised_host_are_kept_or_merged_with_floats(root, tmp_path):
    host = write_host(tmp_path / "host", hidden_size=64, intermediate_size=96)
    convert(host, tmp_path / "q", "mlx", quantize=4)
    convert(tmp_path / "q", tmp_path / "floats", "torch")
    for place in ("q", "floats"):
        add_lora(tmp_path / place)
    convert(tmp_path / "q", tmp_path / "again", "mlx")
    same(open_checkpoint(tmp_path / "again"), open_checkpoint(tmp_path / "q"))
    for place in ("q", "floats"):
        convert(tmp_path / place, tmp_path / f"{place}-merged", "torch", merge_lora=True)
    same(open_checkpoint(tmp_path / "q-merged"), open_checkpoint(tmp_path / "floats-merged"))
    with pytest.raises(BridgeError, match="is quantised, and merging would do so twice"):
        convert(tmp_path / "q", tmp_path / "out", "mlx", merge_lora=True)


REFUSED = {
    "has updates of what would be quantised; add --merge-lora": ("--to", "mlx", "--quantize", 4),
    "which other libraries' code of the blocks does not read; add --merge-lora": (
        *("--to", "torch", "--remote-code"),
    ),
    "an adapter leaves the host as it is": ("--to", "torch", "--adapter", "--merge-lora"),
}


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("said", REFUSED)
def test_what_would_drop_them_is_refused(said, root, tmp_path):
    ran = invoke("convert", root / "model", tmp_path / "out", *REFUSED[said])
    assert (ran.exit_code, ran.stdout) == (2, "") and said in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_merge_is_refused(tmp_path):
    write_host(tmp_path / "bare")
    ran = invoke("convert", tmp_path / "bare", tmp_path / "out", "--to", "jax", "--merge-lora")
    assert ran.exit_code == 2 and "has no updates to merge (no lora); leave it out" in ran.stderr


def test_merged_they_carry_code_of_other_libraries(root, tmp_path):
    ran = invoke(
        *("convert", root / "model", tmp_path / "out", "--to", "torch"),
        *("--remote-code", "--merge-lora"),
    )
    assert ran.exit_code == 0 and "Updates are added to the matrices, rounded once." in ran.stdout
    assert "auto_map" in json.loads((tmp_path / "out" / "config.json").read_text())


def test_the_command_line_says_that_they_are_kept(root, tmp_path):
    ran = invoke("convert", root / "model", tmp_path / "out", "--to", "jax")
    assert "Updates of rank 2 are beside it, in lora; PEFT reads them too." in ran.stdout


def test_inspect_counts_them_apart(root):
    summary = inspect(root / "model")
    count = sum(
        np.prod(spec["shape"]) for name, spec in summary.tensors.items() if ".lora_" in name
    )
    said = summary.to_json()
    assert said["lora_parameters"] == said["groups"]["LoRA"]["parameters"] == count > 0
    assert said["lora"] == {"rank": 2, "alpha": 5.0, "targets": SOME.targets}
    opened = open_checkpoint(root / "model")
    assert said["host_parameters"] == inspect(root / "host").host_parameters
    assert summary.bytes == sum(spec.nbytes for spec in opened.specs.values())
    files = (root / "model").rglob("*.safetensors")
    assert summary.disk_bytes == sum(file.stat().st_size for file in files)
    shown = invoke("inspect", root / "model").stdout
    assert "rank 2, alpha 5, on q_proj, o_proj, down_proj of every layer" in " ".join(shown.split())


def test_what_other_engines_measure_is_the_host_with_them(root, tmp_path):
    write_plain(open_checkpoint(root / "model"), tmp_path / "plain")
    convert(root / "host", tmp_path / "merged", "torch", merge_lora=True)
    same(open_checkpoint(tmp_path / "plain"), open_checkpoint(tmp_path / "merged"))


def test_an_evaluation_tells_two_alphas_apart(tmp_path):
    host = add_lora(write_host(tmp_path / "host"))
    before = _fingerprint(open_checkpoint(host))
    where = host / DIRECTORY / SETTINGS
    where.write_text(where.read_text().replace('"lora_alpha": 5', '"lora_alpha": 6'))
    assert _fingerprint(open_checkpoint(host)) != before
