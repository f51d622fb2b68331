"""The checkpoint that comes with the package: it loads everywhere, and does what its card says."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import bridge
from bridge.model import BUNDLED
from bridge_cli.main import app

pytestmark = pytest.mark.usefixtures("one_thread")
PUZZLE = "3 5 2 7 = 8 ?"


def run(*arguments, **options):
    return CliRunner().invoke(app, list(arguments), **options)


def test_it_is_small_and_has_a_card_with_its_licence():
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) < 3 << 20
    assert "apache-2.0" in (BUNDLED / "README.md").read_text()


def test_every_backend_loads_it_and_draws_the_same_answers():
    answers = {}
    for name in ("numpy", "torch", "jax", "mlx"):
        model = bridge.load(backend=name, dtype="float32")
        (found,) = model.generate([PUZZLE], width=4, seed=5)
        answers[name] = [response.text for response in found.responses]
    assert all(texts == answers["numpy"] for texts in answers.values())


def test_rows_that_see_each_other_are_right_more_often():
    result = run("demo", "--problems", "60", "--json", "--backend", "torch")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["gain"]["low"] > 0.2
    assert len(said["shown"]["together"]) == 8
    assert said["accuracy"]["together"]["mean"] > said["accuracy"]["alone"]["high"]


def test_the_demo_fits_eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = run("demo", "--problems", "4", "--width", "3", "--show", "1", "--backend", "torch")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "4 held-out puzzles, 3 rows each" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [("--width", "0"), ("--problems", "1"), ("--problems", "5", "--show", "5")],
)
def test_the_demo_refuses_what_it_cannot_do(arguments):
    result = run("demo", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")


def test_generate_without_a_path_uses_it():
    one = run("generate", PUZZLE, "--json", "--backend", "torch", "-n", "2")
    piped = run("generate", "--json", "--backend", "torch", "-n", "2", input=PUZZLE + "\n")
    named = run("generate", str(BUNDLED), PUZZLE, "--json", "--backend", "torch", "-n", "2")
    said = [json.loads(result.stdout) for result in (one, piped, named)]
    for found in said:
        del found["timing"]
    assert said[0] == said[1] == said[2]
    assert Path(said[0]["checkpoint"]) == BUNDLED


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("What is love?",), "the bundled model knows nothing of 'What'"),
        (("no-such-directory", PUZZLE), "no-such-directory: no such checkpoint directory"),
        (("./no-such-directory",), "no-such-directory: no such checkpoint directory"),
    ],
)
def test_what_it_cannot_answer_is_refused(arguments, message):
    result = run("generate", *arguments, input=PUZZLE)
    assert result.exit_code == 2
    assert message in result.stderr


def test_its_blocks_do_something():
    model = bridge.load(backend="torch")
    tokens = np.tile(model.encode(PUZZLE), (3, 1))
    tokens[1, 2] = 7
    alone = model.logits(tokens, groups=np.arange(3))
    shared = model.logits(tokens, groups=np.zeros(3, int))
    assert np.abs(shared - alone).max() > 0.01
