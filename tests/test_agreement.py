"""Same seed, same answer: the same tokens on every backend, on the real model and a tiny one."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_host import write_host
from typer.testing import CliRunner

from bridge.checkpoints.initialise import init
from bridge.checkpoints.reading import open_checkpoint
from bridge.contract import Sampling
from bridge.model import build
from bridge.registry import backends
from bridge_cli.main import app
from bridge_conformance.agreement import (
    Agreement,
    WithOutputs,
    allow_rounding,
    compare,
    replay,
)
from bridge_torch.backend import TorchBackend

QUESTION = "There are 5 bags with 8 marbles in each bag. How many marbles are there in total?"
HERE = [info.name for info in backends() if info.installed]
FAST = [name for name in HERE if name != "numpy"]


def load(path: Path, name: str, scale=0.5, change=lambda tensors: tensors, dtype="float32"):
    opened = open_checkpoint(path)
    tensors = change(WithOutputs(opened.tensors, seed=0, scale=scale))
    return build(opened, opened.config, tensors, name, dtype=dtype)


def run(models, prompt, width, steps, sampling, eos_ids=()) -> Agreement:
    *_, last = compare(models, [prompt], [width], steps, sampling, eos_ids)
    return last


@pytest.mark.parametrize("steps,least", [(16, 60), pytest.param(48, 100, marks=pytest.mark.slow)])
def test_the_real_model_says_the_same_on_every_backend(smollm2, tmp_path, steps, least):
    """SmolLM2 with blocks that are not zero, width 4, temperature 0.8, float32."""
    init(smollm2, tmp_path / "bridge", heads=2, head_dim=48)
    sampling = Sampling(temperature=0.8, seed=0)
    models, prompt, eos_ids = {}, None, ()
    for name in FAST:
        model = load(tmp_path / "bridge", name)
        models[name] = model.implementation
        prompt = model.tokenizer.encode_chat([{"role": "user", "content": QUESTION}])
        eos_ids = model.eos_ids
    prompts = [np.asarray(prompt)]
    result = run(models, prompts[0], 4, steps, sampling, eos_ids)
    reference = load(tmp_path / "bridge", "numpy").implementation
    first = next(iter(models.values()))
    replay("numpy", reference, first, prompts, [4], steps, result, sampling)
    assert result.backends == [*FAST, "numpy"]
    assert result.draws == len(FAST) * sum(map(len, result.tokens)) > least * len(FAST)
    assert result.flips == [], result.flips


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tiny")
    init(write_host(out / "host"), out / "bridge", heads=2, head_dim=4)
    return out / "bridge"


def test_the_blocks_that_are_filled_in_matter(tiny):
    prompt, sampling = np.arange(1, 20), Sampling(temperature=0.8, seed=3)
    with_blocks = load(tiny, "torch").implementation
    without = load(tiny, "torch", scale=0.0).implementation
    drawn = [run({"a": m, "b": m}, prompt, 4, 24, sampling).tokens for m in (with_blocks, without)]
    assert drawn[0] != drawn[1]


def off(factor):
    """A change of one tensor, as `load` takes it."""
    name = "model.layers.1.mlp.down_proj.weight"
    return lambda tensors: {**tensors, name: tensors[name] * np.float32(factor)}


@pytest.mark.parametrize("factor", (1.01, 3.0))
def test_a_wrong_weight_is_not_explained(tiny, factor):
    """However far it moves the borders, its logits are further apart than rounding has them."""
    models = {
        "right": load(tiny, "torch").implementation,
        "wrong": load(tiny, "torch", change=off(factor)).implementation,
    }
    prompt, sampling = np.arange(1, 20), Sampling(temperature=0.8, seed=1)
    result = run(models, prompt, 8, 100, sampling)
    allow_rounding(result, load(tiny, "numpy").implementation, [prompt], [8])
    assert result.flips and result.unexplained == result.flips
    assert all(flip.margin <= flip.moved for flip in result.flips)


@pytest.mark.parametrize("name", [name for name in FAST if name != "torch"])
def test_rounding_explains_the_flips_of_a_narrow_dtype(tiny, name):
    reference = load(tiny, "numpy", dtype="bfloat16").implementation
    models = {n: load(tiny, n, dtype="bfloat16").implementation for n in ("torch", name)}
    prompt, sampling = np.arange(1, 20), Sampling(temperature=0.8, seed=1)
    result = run(models, prompt, 8, 40, sampling)
    replay("numpy", reference, models["torch"], [prompt], [8], 40, result, sampling)
    assert result.flips
    allow_rounding(result, reference, [prompt], [8])
    assert result.unexplained == []


def test_what_rounding_allows_in_float64_is_scaled_from_float32(tiny):
    narrow, wide = (load(tiny, "numpy", dtype=t).implementation for t in ("float32", "float64"))
    prompt, sampling = np.arange(1, 20), Sampling(temperature=0.8, seed=1)
    allowed = []
    for model in (narrow, wide):
        result = run({"a": model}, prompt, 2, 4, sampling)
        result.tokens[0][0] = (result.tokens[0][0] + 1) % 257
        replay("b", model, model, [prompt], [2], 4, result, sampling)
        allow_rounding(result, model, [prompt], [2])
        allowed.append(result.flips[0].allowed)
    assert allowed[1] / allowed[0] == pytest.approx(2.0**-29, rel=0.5)


def test_a_wrong_draw_is_not_explained(tiny):
    class Wrong:
        def __init__(self, decoder):
            self.decoder, self.logits, self.advance = decoder, decoder.logits, decoder.advance

        def sample(self, sampling):
            return (self.decoder.sample(sampling) + 1) % 257

    class Model:
        def __init__(self, model):
            self.model = model

        def prefill(self, *arguments):
            return Wrong(self.model.prefill(*arguments))

    right = load(tiny, "torch").implementation
    prompt, sampling = np.arange(1, 20), Sampling(temperature=0.8, seed=1)
    result = run({"right": right, "wrong": Model(right)}, prompt, 4, 5, sampling)
    assert len(result.flips) == 20 and len(result.unexplained) >= 18


def test_replaying_finds_what_was_not_drawn(tiny):
    model = load(tiny, "torch").implementation
    prompt, sampling = np.arange(1, 20), Sampling(temperature=0.8, seed=1)
    result = run({"a": model}, prompt, 3, 8, sampling)
    replay("again", model, model, [prompt], [3], 8, result, sampling)
    assert result.draws == 24 and result.flips == []
    result.tokens[1][7] = (result.tokens[1][7] + 1) % 257
    replay("once more", model, model, [prompt], [3], 8, result, sampling)
    [flip] = result.flips
    assert (flip.row, flip.step) == (1, 7) and not flip.explained


def invoke(*arguments):
    return CliRunner().invoke(app, ["agree", *map(str, arguments)])


def test_the_command(tiny):
    options = ("--max-new-tokens", 6, "--width", 2, "--fill-blocks", 0.5, "--json")
    done = invoke(tiny, "hello", "--backends", "torch,numpy", *options)
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["backends"] == ["torch", "numpy"] and said["flips"] == []
    assert [len(row) for row in said["tokens"]] == [6, 6] and said["draws"] == 12


def test_the_command_fails_on_a_wrong_weight(tiny, monkeypatch):
    right = TorchBackend.load

    def wrong(self, config, tensors, **options):
        return right(self, config, off(3.0)(dict(tensors)), **options)

    monkeypatch.setattr(TorchBackend, "load", wrong)
    options = ("--backends", "torch,numpy", "--fill-blocks", 0.5, "--max-new-tokens", 12)
    done = invoke(tiny, "hello", *options)
    assert done.exit_code == 1, done.output
    assert "NOT explained" in done.stdout and "rounding decides" not in done.stdout
    said = json.loads(invoke(tiny, "hello", *options, "--json").stdout)
    assert not any(flip["explained"] for flip in said["flips"])


def test_the_command_says_that_fresh_blocks_add_nothing(tiny):
    options = ("--backends", "torch,numpy", "--max-new-tokens", 2)
    for fill, noted in ((0, True), (0.5, False)):
        done = invoke(tiny, "hello", *options, "--fill-blocks", fill)
        assert done.exit_code == 0 and ("the blocks are fresh" in done.stderr) == noted


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("--backends", "torch"), "torch is one alone; name two or more"),
        (("--backends", "torch,abacus"), "backend 'abacus' is not known"),
        (("--backends", "torch,numpy", "--width", "0"), "width must be 1 or above"),
        (("--backends", "torch,numpy", "--max-new-tokens", "0"), "max_new_tokens must be 1"),
        (("--fill-blocks", "nan"), "fill_blocks must be 0 or above, not nan"),
        (("--fill-blocks", "inf"), "fill_blocks must be 0 or above, not inf"),
        (("--fill-blocks", "-1"), "fill_blocks must be 0 or above, not -1"),
    ],
)
def test_the_command_says_what_to_mend(tiny, arguments, message):
    done = invoke(tiny, "hello", *arguments)
    assert done.exit_code == 2 and message in done.stderr
