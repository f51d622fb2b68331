"""`bridge bench`: what it measures and refuses. No figure is asserted, only that they are there."""

import json

import pytest
from tiny_host import write_host
from typer.testing import CliRunner

from bridge.checkpoints.initialise import init
from bridge.checkpoints.reading import open_checkpoint
from bridge.errors import BridgeError
from bridge.evaluation.speed import Workload, bench
from bridge_cli.main import app

SMALL = ("--prompt-tokens", "6", "--steps", "3", "--rounds", "2", "--rows", "4", "--timesteps", "5")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    init(write_host(out / "host"), out / "bridge", heads=2, head_dim=4)
    return out / "bridge"


def invoke(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def test_it_gives_ratios_of_medians(checkpoint):
    done = invoke(checkpoint, "--backend", "torch", "--json", *SMALL)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [f["name"] for f in found["figures"]] == ["decode", "prefill", "train"]
    for figure in found["figures"]:
        assert figure["seconds"] > 0
        assert figure["ratio"] == figure["seconds"] / figure["against_seconds"]
    assert found["workload"]["steps"] == 3 and found["backend"] == "torch"
    assert found["processor"] and found["dtype"] == "float32"


def test_as_a_table(checkpoint):
    done = invoke(checkpoint, "--backend", "torch", "--figures", "prefill", *SMALL)
    assert done.exit_code == 0, done.output
    assert "reading 6 tokens for 8 rows" in done.stdout and "training" not in done.stdout


@pytest.mark.parametrize(
    "options,message",
    [
        (("--figures", "speed"), "figure 'speed' is not known"),
        (("--rows", "6"), "rows must be a multiple of 4"),
        (("--rounds", "0"), "rounds must be 1 or above"),
        (("--prompt-tokens", "300000"), "past the context of 200000"),
        (("--device", "cuda:9"), "device 'cuda:9' is not there"),
    ],
)
def test_it_says_what_to_mend(checkpoint, options, message):
    done = invoke(checkpoint, "--backend", "torch", *SMALL, *options)
    assert done.exit_code == 2 and message in done.stderr


def test_a_plain_host_has_nothing_to_measure(checkpoint):
    with pytest.raises(BridgeError, match="has no Bridge blocks to measure"):
        next(bench(open_checkpoint(checkpoint.parent / "host"), "torch", None, None))


def test_every_backend_is_measured_alike(checkpoint):
    workload = Workload(width=2, prompt_tokens=4, steps=2, rounds=1, rows=4, timesteps=3)
    [figure] = bench(open_checkpoint(checkpoint), "numpy", "cpu", "float32", ("train",), workload)
    assert figure.ratio > 0
