"""Settings from TOML and flags, what is refused and how, and the command line around them."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from training_toys import Graded, InProcess
from typer.testing import CliRunner

from bridge.contract import AdamW
from bridge.errors import BridgeError
from bridge.files.toml import read_toml, write_toml
from bridge.training import GRPOSettings, SFTSettings, read_settings, start
from bridge.training.settings import KINDS
from bridge.training.start import optimizer
from bridge_cli.main import app
from bridge_cli.options import read_task_options
from bridge_cli.train_view import View

GIVEN = {"checkpoint": "c", "out": "o", "task": "t"}
PLAIN = dict.fromkeys(("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "GITHUB_ACTIONS"))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def toy(monkeypatch):
    """The task `toy`, scored within this process."""

    class Worker(InProcess):
        def __init__(self, task, *, time_limit):
            super().__init__(task)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    def find_task(name, **options):
        if name != "toy":
            raise BridgeError(f"task {name!r} is not known")
        return Graded(**options)

    monkeypatch.setattr(start, "find_task", find_task)
    monkeypatch.setattr(start, "Scorer", Worker)


def bridge(*arguments, code=0, columns=None):
    """A command line run within this process."""
    result = CliRunner(env={**PLAIN, "COLUMNS": columns}).invoke(
        app, ["train", *map(str, arguments)]
    )
    if result.exit_code != code:
        raise AssertionError(f"exit {result.exit_code}: {result.output}") from result.exception
    return result


def refusal(*arguments) -> str:
    """The one line that a command line is refused with."""
    lines = bridge(*arguments, code=2).stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize("kind", KINDS)
def test_settings_survive_toml(kind, tmp_path):
    more = {
        "system": 'Say "yes"\n\x7f\\ \U0001f600',
        "stop": ["\n\n", "é"],
        "lr": 3e-7,
        "betas": [0.5, 0.25],
        "raw": True,
        "task_options": {"a key": 1, "deep": {"list": [1, 2.5, "x"], "on": False}, "empty": {}},
        "log": ["tensorboard"],
        "trainable": ["all"],
        "seed": 2**64 - 1,
    }
    settings = read_settings(kind, {**GIVEN, **more})
    path = tmp_path / "config.toml"
    path.write_text(write_toml(settings.to_json()), encoding="utf-8")
    assert read_settings(kind, read_toml(path)) == settings


@given(st.dictionaries(st.text(max_size=5), st.text() | st.integers() | st.floats(-1e9, 1e9)))
def test_toml_is_what_python_reads(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("toml") / "x.toml"
    text = write_toml(values)
    path.write_text(text, encoding="utf-8", newline="")
    assert read_toml(path) == values


BAD = [
    ({"learning_rate": 1}, "learning_rate is no setting of bridge train grpo"),
    ({"step": 1}, "step is no setting of bridge train grpo; did you mean steps?"),
    ({"top_p": 0.9}, "top_p is refused in training: it would sample from another policy"),
    ({"kind": "sft"}, "kind is 'sft'; use bridge train sft"),
    ({"lr": "fast"}, "lr must be a number, not 'fast'"),
    ({"lr": True}, "lr must be a number, not True"),
    ({"lr": 0}, "lr must be above 0, not 0.0"),
    ({"lr": float("nan")}, "lr must be a number, not nan"),
    ({"steps": 2.5}, "steps must be an integer, not 2.5"),
    ({"steps": 0}, "steps must be 1 or above, not 0"),
    ({"width": 1}, "width must be 2 or above, not 1"),
    ({"temperature": 0}, "temperature must be above 0, not 0.0"),
    ({"seed": -1}, "seed must be in 0..2^64-1, not -1"),
    ({"schedule": "step"}, "schedule must be one of constant, linear, cosine, not 'step'"),
    ({"log": ["excel"]}, "log must be of tensorboard, wandb, trackio, not ['excel']"),
    ({"betas": [0.9]}, "betas must be two numbers in [0, 1), not [0.9]"),
    ({"betas": 0.9}, "betas must be two numbers in [0, 1), not [0.9]"),
    ({"stop": [1]}, "stop must be a text, not 1"),
    ({"raw": "yes"}, "raw must be true or false, not 'yes'"),
    ({"task_options": "x"}, "task_options must be a table, not 'x'"),
    ({"task": ""}, "task is missing"),
    ({"out": ""}, "out is missing; name a directory"),
    ({"minibatches": 17}, "minibatches must be at most problems (16)"),
    ({"lr_end": 2}, "lr_end must be in [0, 1], not 2.0"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_what_is_wrong_is_one_line_that_names_it(tmp_path, change, message):
    with pytest.raises(BridgeError) as error:
        read_settings("grpo", {**GIVEN, **change}, "run.toml")
    said = str(error.value)
    assert said.startswith("run.toml: ") and message in said and "\n" not in said
    if all(value == value for value in change.values()):  # a file cannot say nan as we write it
        path = tmp_path / "run.toml"
        path.write_text(write_toml({**GIVEN, **change}))
        assert message in refusal("grpo", path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"stop": ["a", "\udcff"]}, "stop must be text in UTF-8, not '\\udcff'"),
        ({"out": "g4\udcff"}, "out must be text in UTF-8, not 'g4\\udcff'"),
        ({"system": "\udcff"}, "system must be text in UTF-8, not '\\udcff'"),
        ({"task_options": {"a": {"b": ["\udcff"]}}}, "task_options.a.b must be text in UTF-8, not"),
        ({"task_options": {"a": {"\udcff": 1}}}, "task_options.a must be text in UTF-8, not"),
    ],
)
def test_what_is_no_utf8_is_in_no_run(change, message):
    with pytest.raises(BridgeError) as error:
        read_settings("grpo", {**GIVEN, **change})
    assert message in str(error.value)


def test_every_field_has_a_flag_and_says_what_it_is_for():
    for kind in KINDS:
        shown = " ".join(bridge(kind, "--help", columns="200").stdout.split())
        for field in fields(KINDS[kind]):
            if field.name != "checkpoint":
                assert f"--{field.name.replace('_', '-')} " in shown
            assert field.metadata["help"].endswith(".")
    assert "Example: bridge train grpo" in shown and "--top-k" not in shown


def test_flags_override_the_file(toy_model, tmp_path, toy):
    config = tmp_path / "run.toml"
    config.write_text(
        f'checkpoint = "{toy_model}"\nout = "{tmp_path / "run"}"\ntask = "toy"\n'
        "steps = 9\nlr = 1e-3\n"
        'width = 2\nproblems = 2\nmax_new_tokens = 2\neval_every = 0\nbackend = "torch"\n'
        "task_options = { first = false }\n"
    )
    options = ("--steps", 2, "--no-normalise-std", "--task-options", "first=true", "--json")
    found = json.loads(bridge("grpo", config, *options).stdout)
    assert found["steps"] == 2 and found["final"] == str(tmp_path / "run" / "final")
    kept = read_toml(tmp_path / "run" / "config.toml")
    assert kept["steps"] == 2 and kept["lr"] == 1e-3 and kept["normalise_std"] is False
    assert kept["task_options"] == {"first": True}
    again = bridge("grpo", "--resume", "--out", tmp_path / "run")
    assert "2 steps" in again.stdout and "bridge generate" in again.stdout
    assert "lr was 0.001, and now is 0.5" in refusal("grpo", config, *options, "--lr", 0.5)
    assert "use bridge train grpo" in refusal("sft", "--resume", "--out", tmp_path / "run")


def test_a_run_says_each_step_and_what_came_of_it(toy_model, tmp_path, toy):
    common = ("--task", "toy", "--max-new-tokens", 2, "--backend", "torch", "--eval-problems", 2)
    out = tmp_path / "warm"
    done = bridge("sft", toy_model, "--out", out, *common, "--problems", 40, "--eval-every", 4)
    assert re.search(r"sampled 40 of 40 problems, \d+ responses correct", done.stderr)
    first = r"step 1/\d+, loss [\d.]+, gradient [\d.]+, lr 1.00e-04, norm ratio [\d.]+"
    assert re.search(first, done.stderr)
    assert "best: step" in done.stdout
    options = ("--steps", 2, "--problems", 2, "--width", 4)
    done = bridge("grpo", out / "final", "--out", tmp_path / "run", *common, *options)
    assert re.search(r"step 2/2, reward [\d.]+, accuracy [\d.]+%, .*0:00:00 left", done.stderr)
    assert "evaluation, step 0: accuracy" in done.stderr


def test_what_is_measured_each_few_steps_stays_in_sight():
    view = View(None, quiet=True)
    view.started(0, 3)
    view.record({"kind": "step", "step": 1, "loss": 2.0, "norm_ratio": 0.125})
    view.record({"kind": "step", "step": 2, "loss": 1.0})
    console = Console(width=200, file=io.StringIO())
    with console.capture() as shown:
        console.print(view._table())
    head, last, mean = (line.split() for line in shown.get().splitlines()[1:4])
    assert head == ["loss", "norm", "ratio"]
    assert last == ["last", "1.0000", "0.125"] and mean == ["mean", "of", "2", "1.5000", "0.125"]


def test_rewards_that_fail_in_an_evaluation_are_said_once_and_counted(capsys):
    view = View(None, quiet=False)
    figures = {"accuracy": 0.0, "reward_mean": 0.0, "problems": 4}
    for kind, step in (("evaluation", 0), ("step", 1), ("evaluation", 1)):
        bad = {"bad_rewards": 3, "bad_reward": f"raises Error{step}"}
        view.record({"kind": kind, "step": step, **figures, **bad})
    said = [line for line in capsys.readouterr().err.splitlines() if "failed" in line]
    assert said == ["a reward failed and counts as 0: raises Error0"] and view.bad == 9


def test_ctrl_c_exits_130_and_the_same_command_goes_on(toy_model, tmp_path, toy, monkeypatch):
    import bridge.training.log as log

    write = log.Log.write

    def then_interrupt(self, record):
        write(self, record)
        if record["kind"] == "step" and record["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    arguments = ("grpo", toy_model, "--out", tmp_path / "run", "--task", "toy", "--steps", 4)
    arguments = (*arguments, "--problems", 2, "--max-new-tokens", 2, "--backend", "torch")
    with monkeypatch.context() as patch:
        patch.setattr(log.Log, "write", then_interrupt)
        stopped = bridge(*arguments, code=130)
    assert "stopping after this step" in stopped.stderr and "step-000002" in stopped.stderr
    assert "4 steps, the first 2 before" in bridge(*arguments).stdout


@pytest.mark.parametrize("kind", KINDS)
def test_a_dry_run_writes_nothing_and_tells_sizes(toy_model, tmp_path, toy, kind):
    arguments = (kind, toy_model, "--out", tmp_path / "run", "--task", "toy", "--width", 4)
    arguments = (*arguments, "--max-new-tokens", 6, "--backend", "torch", "--dry-run")
    plan = json.loads(bridge(*arguments, "--json").stdout)
    assert plan["train_problems"] == 80 and plan["micro_batch"] == [64, 9, 16 * 4 + 64 * 5]
    assert plan["rows"] == 64 and plan["groups"] == 16 and plan["micro_batches"] == 1
    trained, all_ = plan["trained_parameters"], plan["parameters"]
    blocks = 2 * (16 + 4 * 8 * 16)
    assert trained == (blocks if kind == "sft" else all_)
    kept = plan["memory_of"]["kept"]
    assert kept["masters"] == 4 * trained and kept["moments"] == 8 * trained
    assert plan["memory"]["weights"] == 4 * all_ and plan["memory"].keys() >= kept.keys()
    assert plan["seconds"]["total"] > 0
    shown = bridge(*arguments).stdout
    assert "a step" in shown and "memory" in shown and "for less" in shown
    assert os.listdir(tmp_path) == []


def test_a_dry_run_on_a_file_counts_decoding_only_where_there_is_some(toy_model, tmp_path, toy):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "1+2=", "responses": ["3", "3"]}\n')
    arguments = ("sft", toy_model, "--out", tmp_path / "run", "--data", data, "--task", "toy")
    arguments = (*arguments, "--backend", "torch", "--dry-run", "--json")
    plan = json.loads(bridge(*arguments).stdout)
    assert plan["memory_of"]["rollout"] == {} and plan["seconds"]["evaluation"] == 0
    plan = json.loads(bridge(*arguments, "--eval-every", 1).stdout)
    assert plan["memory_of"]["rollout"]["keys and values"] > 0 < plan["seconds"]["evaluation"]


def test_a_dry_run_tells_in_advance_what_would_be_refused(toy_model, tmp_path, toy):
    common = ("grpo", toy_model, "--out", tmp_path / "run", "--task", "toy", "--dry-run")
    said = refusal(*common, "--micro-batch-tokens", 40, "--max-new-tokens", 6)
    assert "a group is never split" in said
    assert "goes past the context of 64" in refusal(*common, "--max-new-tokens", 61)
    assert "adapter: model.embed_tokens.weight is trained too" in refusal(*common, "--adapter")


def test_refusals_of_the_command_line(toy_model, tmp_path, toy):
    out = ("--out", tmp_path / "run")
    assert "SOURCE is missing" in refusal("grpo")
    nothing = refusal("grpo", "--resume", *out)
    assert f"{tmp_path / 'run'}: holds no run to resume (no config.toml)" in nothing
    assert "no such checkpoint" in refusal("grpo", tmp_path / "none", *out, "--task", "toy")
    assert "no such file" in refusal("grpo", tmp_path / "none.toml")
    assert "--top-k is refused in training" in refusal("grpo", toy_model, "--top-k", 5)
    assert "write KEY=VALUE" in refusal("grpo", toy_model, *out, "--task-options", "x")
    assert "task 'sudoku' is not known" in refusal("grpo", toy_model, *out, "--task", "sudoku")
    assert "no tensor is named 'x'" in refusal(
        "grpo", toy_model, *out, "--task", "toy", "--trainable", "x"
    )
    for options, named in (
        ((*out, "--stop", "\udcff"), "stop must be text in UTF-8, not "),
        ((*out, "--task-options", "a=\udcff"), "--task-options 'a=\\udcff': is not UTF-8"),
        (("--out", tmp_path / "run\udcff"), "out must be text in UTF-8, not "),
    ):
        assert named in refusal("grpo", toy_model, *options, "--task", "toy")
    assert [path for path in tmp_path.iterdir() if path.name.startswith("run")] == []
    broken = tmp_path / "broken.toml"
    broken.write_text("steps = [1")
    assert "broken.toml: is not TOML" in refusal("grpo", broken)
    host = toy_model.parent / f"{toy_model.name}-host"
    assert "the model has no Bridge blocks" in refusal("sft", host, *out, "--task", "toy")
    assert not (tmp_path / "run").exists()


def test_sft_needs_a_task_or_data():
    with pytest.raises(BridgeError, match="task is missing"):
        SFTSettings(checkpoint="c", out="o")
    with pytest.raises(BridgeError, match="task is missing"):
        SFTSettings(checkpoint="c", out="o", data="d", eval_every=1)
    assert SFTSettings(checkpoint="c", out="o", data="d").trained == "bridge"
    assert GRPOSettings(**GIVEN).trained == ()  # all, or what of a LoRA checkpoint is not frozen


def test_the_optimizer_is_the_one_asked_for():
    more = {"lr": 0.1, "betas": (0.2, 0.3), "adam_eps": 0.4, "weight_decay": 0.5}
    settings = GRPOSettings(**GIVEN, **more, max_grad_norm=0.6)
    assert optimizer(settings) == AdamW(0.1, (0.2, 0.3), 0.4, 0.5, 0.6)


def test_values_of_task_options_are_as_toml_writes_them():
    given = ("3", "2.5", "true", '"3"', "[1, 2]", "plain words", "2020-13-99")
    options = read_task_options([f"option{i}={text}" for i, text in enumerate(given)])
    assert list(options.values()) == [*(3, 2.5, True, "3", [1, 2], "plain words", "2020-13-99")]


def test_training_is_not_imported_by_other_commands():
    code = "import sys, bridge_cli.main; sys.exit('bridge.training' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
