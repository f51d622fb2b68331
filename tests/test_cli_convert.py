"""`bridge convert` on the command line: what it says, its JSON, and what it refuses."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_host import write_host
from typer.testing import CliRunner

from bridge.checkpoints.initialise import init
from bridge.checkpoints.reading import open_checkpoint
from bridge_cli.main import app

FILE = "model.safetensors"
NORM = "model.norm.weight"


@pytest.fixture
def root(tmp_path):
    """A host, a model, an adapter and a quantised model."""
    write_host(tmp_path / "host", hidden_size=64, intermediate_size=96)
    init(tmp_path / "host", tmp_path / "model", heads=2, head_dim=32, layers="0,2")
    run(tmp_path, "model", "adapter", "--to", "torch", "--adapter")
    run(tmp_path, "model", "quantised", "--to", "mlx", "--quantize", 4)
    return tmp_path


def invoke(root, src, dst, *options):
    arguments = ["convert", str(root / src), str(root / dst), *map(str, options)]
    return CliRunner().invoke(app, arguments)


def run(root, *arguments):
    result = invoke(root, *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(root, *arguments, dst="out"):
    """The one line of a mistake, after which everything is as it was."""
    before = sorted(path.name for path in root.iterdir())
    result = invoke(root, arguments[0], dst, *arguments[1:])
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert sorted(path.name for path in root.iterdir()) == before
    return result.stderr


def edit(path, change):
    tensors = load_file(path / FILE)
    change(tensors)
    save_file(tensors, path / FILE, metadata={"format": "pt"})


def test_it_says_what_it_made(root):
    said = run(root, "model", "jax", "--to", "jax")
    assert "jax checkpoint, 17 tensors, " in said and "float32" in said
    assert f"Try: bridge generate {root / 'jax'}" in said
    assert "4 bits in groups of 64, the rest in float32" in run(
        root, "quantised", "again", "--to", "mlx"
    )
    assert "Dequantised to float32" in run(root, "quantised", "torch", "--to", "torch")
    assert "mlx adapter, 10 tensors" in run(root, "model", "blocks", "--to", "mlx", "--adapter")


def test_its_json(root):
    said = json.loads(run(root, "model", "jax", "--to", "jax", "--dtype", "bf16", "--json"))
    opened = open_checkpoint(root / "jax")
    assert said == {
        "path": str(root / "jax"),
        "form": opened.form,
        "dtype": opened.dtype,
        "bytes": sum(spec.nbytes for spec in opened.specs.values()),
        "tensors": 17,
        "quantization": None,
        "dequantised": False,
        "adapter": False,
        "lora_rank": None,
        "merged": False,
    }


def test_a_whole_workflow(root):
    """Blocks apart, put on a base that moved, in shards, with the code of mlx-lm."""
    shutil.move(root / "model", root / "moved")
    run(root, "adapter", "whole", "--to", "mlx", "--merge", root / "host", "--remote-code")
    run(root, "whole", "back", "--to", "torch", "--shard-size", "100kB")
    want, got = open_checkpoint(root / "moved").tensors, open_checkpoint(root / "back").tensors
    assert list(want) == list(got) and len(list((root / "back").glob("model-*.safetensors"))) > 2
    assert all(want[name].tobytes() == got[name].tobytes() for name in want)


OPTIONS = {
    "'numpy' is no form": ("model", "--to", "numpy"),
    "stores no quantised weights; use --to mlx": ("model", "--to", "torch", "--quantize", 4),
    "bits must be 4 or 8, not 3": ("model", "--to", "mlx", "--quantize", 3),
    "one of 32, 64, 128, not 48": ("model", "--to", "mlx", "--quantize", 4, "--group-size", 48),
    "choose a smaller --group-size": (
        *("model", "--to", "mlx", "--quantize", 4, "--group-size", 128),
    ),
    "quantize_blocks needs quantize": ("model", "--to", "mlx", "--quantize-blocks"),
    "is quantised already": ("quantised", "--to", "mlx", "--quantize", 4),
    "leave --dtype out": ("quantised", "--to", "mlx", "--dtype", "f16"),
    "'float8' cannot be stored": ("model", "--to", "jax", "--dtype", "float8"),
    "'5 apples' is no size": ("model", "--to", "jax", "--shard-size", "5 apples"),
    "has no blocks": ("host", "--to", "torch", "--adapter"),
    "add --quantize-blocks": ("model", "--to", "mlx", "--adapter", "--quantize", 4),
    "an adapter carries no code": ("model", "--to", "mlx", "--adapter", "--remote-code"),
    "there is none for the form 'jax'": ("model", "--to", "jax", "--remote-code"),
    "has no blocks, so it needs none": ("host", "--to", "torch", "--remote-code"),
    "exclude each other": ("adapter", "--to", "torch", "--adapter", "--merge", "host"),
    "is no adapter": ("model", "--to", "torch", "--merge", "host"),
    "no such checkpoint directory": ("nowhere", "--to", "torch"),
    "no such file": ("nowhere.gguf", "--to", "torch"),
    "a GGUF file holds a plain host": ("some.gguf", "--to", "torch", "--adapter"),
}


@pytest.mark.parametrize("message", OPTIONS)
def test_what_does_not_go_together(root, message):
    assert message in refused(root, *OPTIONS[message])


def test_targets_that_are_there_or_in_the_way(root):
    assert "exists already" in refused(root, "model", "--to", "jax", dst="host")
    assert "exists already" in refused(root, "model", "--to", "jax", dst="model")
    assert "lies inside of" in refused(root, "model", "--to", "jax", dst="model/jax")
    merge = ("--merge", root / "host")
    assert "lies inside of" in refused(root, "adapter", "--to", "jax", *merge, dst="host/x")
    assert "lies inside of" in refused(root, "adapter", "--to", "jax", dst="model/x")
    assert "no such directory" in refused(root, "model", "--to", "jax", dst="nowhere/x")


def test_another_base(root):
    edit(root / "host", lambda t: t.update({NORM: t[NORM] * 2}))
    options = ("--to", "torch", "--merge", root / "host")
    assert "--any-base" in refused(root, "adapter", *options)
    run(root, "adapter", "out", *options, "--any-base")


def cut(path):
    (path / FILE).write_bytes((path / FILE).read_bytes()[:-100])


def spoil(name, change):
    return lambda path: edit(path, lambda tensors: tensors.update({name: change(tensors[name])}))


def reconfigure(**changes):
    def write(path):
        raw = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(raw | changes))

    return write


def point_outside(path):
    index = {"weight_map": dict.fromkeys(load_file(path / FILE), f"../model/{FILE}")}
    (path / FILE).rename(path / "other.safetensors")
    (path / f"{FILE}.index.json").write_text(json.dumps(index))


DAMAGE = {
    "cut off within tensor": cut,
    "'model.norm.weight' holds nan at [3]": spoil(
        NORM, lambda a: np.where(np.arange(64) == 3, np.float32(np.nan), a)
    ),
    "'model.norm.weight' is [63]": spoil(NORM, lambda a: a[1:].copy()),
    "'model.norm.weight' is missing": lambda path: edit(path, lambda tensors: tensors.pop(NORM)),
    "'extra' is not one that config.json calls for": lambda path: edit(
        path, lambda tensors: tensors.update(extra=tensors[NORM])
    ),
    "'gpt2' is not supported": reconfigure(model_type="gpt2"),
    "calls for [257, 32]": reconfigure(hidden_size=32, head_dim=16),
    "unknown setting 'logit_scale'": reconfigure(logit_scale=2.0),
    "quant_method 'awq' is not supported": reconfigure(quantization_config={"quant_method": "awq"}),
    "a .safetensors file in the same directory": point_outside,
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damaged_checkpoints(root, message):
    DAMAGE[message](root / "model")
    assert message in refused(root, "model", "--to", "jax")


def test_a_number_too_large_for_the_dtype(root):
    edit(root / "model", lambda tensors: tensors[NORM].__setitem__(0, 1e5))
    said = refused(root, "model", "--to", "jax", "--dtype", "f16")
    assert "tensor 'model.norm.weight' holds 100000.0, which is too large for float16" in said


def test_a_disk_that_refuses(root):
    """As a full one does: no file may grow past a limit."""
    code = (
        "import resource; from bridge_cli.main import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); main()"
    )
    before = sorted(path.name for path in root.iterdir())
    command = [sys.executable, "-c", code, "convert", root / "model", root / "out", "--to", "jax"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "cannot be written" in result.stderr
    assert sorted(path.name for path in root.iterdir()) == before


def test_a_gguf_file(gguf, smollm2, tmp_path, monkeypatch):
    """The real one: the tensors that transformers gives, which it is asked for once a session, in
    bf16."""

    def given(path, out):
        assert path == gguf
        shutil.copytree(smollm2, out, copy_function=os.link)

    monkeypatch.setattr("bridge.checkpoints.gguf.export_gguf", given)
    said = CliRunner().invoke(
        app,
        ["convert", str(gguf), str(tmp_path / "out"), "--to", "jax", "--dtype", "bf16", "--json"],
    )
    assert said.exit_code == 0, said.output
    assert json.loads(said.stdout)["tensors"] == 2 + 9
    opened = open_checkpoint(tmp_path / "out")
    assert (opened.form, opened.dtype, opened.config.num_hidden_layers) == ("jax", "bfloat16", 30)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
