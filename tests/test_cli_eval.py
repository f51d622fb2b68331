"""`bridge eval`: its tables, JSON and plots, going on after Ctrl-C, and what it refuses."""

import json
import sys
import types
from contextlib import contextmanager

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import bridge
from bridge.checkpoints.initialise import init
from bridge.errors import BridgeError
from bridge.evaluation.batches import Decoding
from bridge.evaluation.evaluate import evaluate
from bridge.evaluation.plots import plot_accuracy, plot_gpass
from bridge.evaluation.summary import summarise
from bridge_cli.main import app
from bridge_cli.options import read_task_options
from tests.tiny_host import write_host
from tests.toy_task import ToyScorer, ToyTask

PLAIN = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
SHORT = ("--task", "toy", "--backend", "numpy", "--max-new-tokens", "4", "--width", "1,2,4")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A host, and a Bridge model whose blocks do something."""
    out = tmp_path_factory.mktemp("models")
    write_host(out / "host")
    init(out / "host", out / "bridge", heads=2, head_dim=4)
    tensors = load_file(out / "bridge" / "model.safetensors")
    rng = np.random.default_rng(1)
    for name in tensors:
        if name.endswith("bridge.o_proj.weight"):
            tensors[name] = rng.normal(size=tensors[name].shape).astype(np.float32)
    save_file(tensors, out / "bridge" / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.fixture(autouse=True)
def tasks(monkeypatch):
    """The toy task under the name `toy`, scored within this process."""
    module = types.ModuleType("bridge.tasks")
    module.scored, module.interrupt_at, module.time_limit = 0, None, None

    def find_task(name, **options):
        assert name == "toy"
        return ToyTask(**options)

    class Scorer(ToyScorer):
        def score(self, pairs):
            if module.scored == module.interrupt_at:
                raise KeyboardInterrupt
            module.scored += 1
            return super().score(pairs)

    @contextmanager
    def scorer(task, time_limit):
        module.time_limit = time_limit
        yield Scorer(task)

    module.find_task, module.Scorer = find_task, scorer
    monkeypatch.setitem(sys.modules, "bridge.tasks", module)
    return module


def run(*arguments, code=0):
    result = CliRunner(env=PLAIN).invoke(app, ["eval", *map(str, arguments)])
    if result.exit_code != code:
        raise AssertionError(f"exit {result.exit_code}: {result.output}") from result.exception
    return result


def test_the_table_has_each_width_the_baseline_and_the_difference(paths):
    said = run(paths / "bridge", *SHORT, "--baseline", paths / "host").stdout
    for width in (1, 2, 4):
        assert said.count(f"width {width} ") == 2  # accuracy, and G-Pass
    assert said.count("  baseline") == said.count("  difference") == 6
    assert "12 problems of test, 1 group each" in said
    assert "baseline: its rows do not see each other; all widths are from its rows at 4" in said
    assert "rows were cut off at 4 tokens" in said
    assert max(map(len, said.splitlines())) <= 140


def test_the_json_is_what_the_table_shows(paths):
    arguments = (paths / "bridge", *SHORT, "--baseline", paths / "host", "--groups", 2)
    found = json.loads(run(*arguments, "--json").stdout)
    table = run(*arguments).stdout
    [line] = [x for x in table.splitlines() if x.startswith("width 4")][:1]
    metrics = found["model"]["widths"][2]["metrics"]
    for metric in ("pass@1", "coverage", "majority"):
        mean, low, high = (100 * metrics[metric][key] for key in ("mean", "low", "high"))
        assert f"{mean:.1f} [{low:.1f}, {high:.1f}]" in line
        apart = found["differences"][2]["metrics"][metric]["mean"]
        theirs = found["baseline"]["widths"][2]["metrics"][metric]["mean"]
        assert apart == pytest.approx(metrics[metric]["mean"] - theirs, abs=1e-12)
    assert found["model"]["widths_decoded"] == [1, 2, 4]
    assert found["baseline"]["widths_decoded"] == [4]
    assert found["groups"] == 2 and found["problems"] == 12


def test_ctrl_c_keeps_what_was_found_and_the_same_command_ends_the_same(paths, tmp_path, tasks):
    arguments = (paths / "bridge", *SHORT, "--max-rows", 8, "--baseline", paths / "host")
    run(*arguments, "--out", tmp_path / "whole")
    batches, tasks.scored = tasks.scored, 0
    # 12 problems at three widths, and the host's rows at one; of the batches of 8 rows are done
    # the first three (8 + 4 + 4 groups), then all eleven of the model and one of the host.
    for stopped_at, kept in ((3, 16), (12, 38)):
        tasks.interrupt_at = stopped_at
        said = run(*arguments, "--out", tmp_path / "out", code=130)
        where = f"{tmp_path / 'out'}; the same command goes on"
        assert said.stderr == f"kept {kept} of 48 groups in {where}\n" and said.stdout == ""
        assert not (tmp_path / "out" / "evaluation.json").exists()
    tasks.interrupt_at = None
    run(*arguments, "--out", tmp_path / "out")
    assert tasks.scored == batches  # nothing was done twice
    files = sorted(
        p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*") if p.is_file()
    )
    assert [str(f) for f in files] == [
        "accuracy.png",
        "baseline/results.jsonl",
        "baseline/settings.json",
        "evaluation.json",
        "gpass.png",
        "model/results.jsonl",
        "model/settings.json",
    ]
    for file in files:
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_ctrl_c_says_what_is_not_kept_and_what_is_before_a_model_is_loaded(
    paths, tmp_path, tasks, monkeypatch
):
    tasks.interrupt_at = 1
    said = run(paths / "bridge", *SHORT, "--json", code=130)
    assert (said.stdout, said.stderr) == ("", "stopped; nothing is kept without --out\n")
    tasks.interrupt_at = None
    out = ("--problems", 2, "--out", tmp_path / "out")
    run(paths / "bridge", *SHORT, *out)
    with open(tmp_path / "out" / "model" / "results.jsonl", "a") as file:
        file.write('{"width": 1, "pro')  # as a kill leaves it

    def load(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("bridge.model.build", load)
    said = run(paths / "bridge", *SHORT, *out, code=130).stderr
    assert said == f"kept 6 groups in {tmp_path / 'out'}; the same command goes on\n"


def test_the_plots_are_images_and_matplotlib_may_be_missing(paths, tmp_path, monkeypatch):
    run(paths / "bridge", *SHORT, "--out", tmp_path / "out")
    for name in ("accuracy.png", "gpass.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG\r\n")
        (tmp_path / "out" / name).unlink()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = run(paths / "bridge", *SHORT, "--out", tmp_path / "out")
    assert "pip install 'bridge-llm[plots]'" in said.stderr
    assert not (tmp_path / "out" / "gpass.png").exists()
    assert (tmp_path / "out" / "evaluation.json").exists()


def test_names_of_models_and_tasks_are_no_formulas(paths, tmp_path):
    task = ToyTask(size=4)
    model = bridge.load(paths / "bridge", backend="numpy")
    decoding = Decoding(max_new_tokens=2)
    found = evaluate(model, task, widths=(1, 2), decoding=decoding, scorer=ToyScorer(task))
    figures = {"_cost$": summarise(found), "$x^{$": summarise(found)}
    for plot in (plot_accuracy, plot_gpass):
        plot(tmp_path / "plot.png", figures, "50 $ and 100 $, x_{")
        assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_task_options_have_two_names_and_rewards_a_time_limit(paths, tasks):
    said = run(paths / "bridge", *SHORT, "--task-options", "size=2", "--task-option", "ask=so {}?")
    assert "2 problems of test" in said.stdout and tasks.time_limit == 10
    run(paths / "bridge", *SHORT, "--task-options", "size=1", "--reward-seconds", 2.5)
    assert tasks.time_limit == 2.5


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("3", 3), ("1_000", 1000), ("2.5", 2.5), ("1E5", 1e5), ("true", True), ("null", None)),
        *(('"3"', "3"), ("'a'", "a"), ('[1, "x"]', [1, "x"])),
        *(('{"a": 1}', {"a": 1}), ("{a = 1}", {"a": 1})),
        # Texts, though TOML or JSON would read some of them as something else.
        *((word, word) for word in ("", "x=y", "plain words", "07", "1\nb = 2", "2020-01-01")),
        *((word, word) for word in ("nan", "inf", "-inf", "NaN", "Infinity", "1e999", "[nan]")),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_values_of_task_options(text, value):
    [found] = read_task_options([f"key={text}"]).values()
    assert found == value and type(found) is type(value)


def test_task_options_that_nest_too_deeply_are_refused():
    with pytest.raises(BridgeError, match="is nested too deeply; put it into a file"):
        read_task_options(["key=" + "[" * 100_000])


def test_chat_templates_and_task_options_are_used(paths, tmp_path):
    fed = {}
    for name, options in (("chat", ()), ("raw", ("--raw",)), ("sys", ("--system", "be brief"))):
        out = tmp_path / name
        run(paths / "bridge", *SHORT, "--task-option", "size=3", *options, "--out", out)
        fed[name] = (out / "model" / "results.jsonl").read_text().splitlines()
        assert len(fed[name]) == 3 * 3
    digests = {json.loads(lines[0])["digest"] for lines in fed.values()}
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--width", "0"), "--width must be numbers from 1 on"),
        (("--width", "2,x"), "--width must be numbers from 1 on"),
        (("--problems", "13"), "problems must be in 1..12"),
        (("--groups", "0"), "groups must be in 1..4096"),
        (("--temperature", "-1"), "temperature must be 0 or above"),
        (("--task-option", "size"), "--task-options 'size': write KEY=VALUE"),
        (("--task-options", "a size=1"), "--task-options 'a size=1': write KEY=VALUE"),
        (("--reward-seconds", "0"), "reward_seconds must be above 0, not 0"),
        (("--reward-seconds", "nan"), "reward_seconds must be above 0, not nan"),
        (("--raw", "--system", "x"), "--system is part of a chat"),
        (("--baseline", "nowhere"), "nowhere"),
        (("--max-new-tokens", "200000"), "goes past the context of 200000"),
        (("--out", "no/where"), "no such directory to write 'where' in"),
        (("--out", "tests"), "tests: holds something other than an evaluation"),
        (("--out", "README.md"), "README.md: is not a directory"),
    ],
)
def test_mistakes_are_one_line(paths, options, named):
    result = run(paths / "bridge", *SHORT, *options, code=2)
    assert result.stdout == "" and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ") and named in result.stderr


def test_other_weights_do_not_go_on_in_a_directory(paths, tmp_path):
    run(paths / "bridge", *SHORT, "--problems", 2, "--out", tmp_path / "out")
    said = run(paths / "host", *SHORT, "--problems", 2, "--out", tmp_path / "out", code=2).stderr
    assert "settings.json: model is" in said
