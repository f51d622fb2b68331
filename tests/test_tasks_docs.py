"""docs/training.md: its commands are read, its Python and JSONL run, and what it names is there."""

import inspect
import json
import re
import shlex
from pathlib import Path

import pytest
import typer

from bridge.answers.numbers import read_quantity
from bridge.tasks import Problem, Scorer, Task, find_task
from bridge.tasks.jsonl import JsonlTask
from bridge.tasks.matching import check_match
from bridge.training import GRPOSettings, train
from bridge_cli.main import app

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "training.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
BUNDLED = ROOT / "bridge" / "bundled"


def commands():
    [task] = re.findall(r'^    T="(.*)"$', TEXT, re.MULTILINE)
    found = re.findall(r"^ {4,}(bridge (?:.*\\\n)*.*)$", TEXT, re.MULTILINE)
    return [shlex.split(c.replace("\\\n", "").replace("$T", task))[1:] for c in found]


def lines(field):
    """The JSONL block whose lines have this field."""
    blocks = re.findall(r"(?:^    \{.*\}\n)+", TEXT, re.MULTILINE)
    [block] = [b for b in blocks if field in b]
    return "".join(line.strip() + "\n" for line in block.splitlines())


def names(head):
    """What the first column of the table under this head names, without the head itself."""
    table = TEXT[TEXT.index(f"| {head} | meaning |") :].partition("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_every_command_is_understood():
    assert len(commands()) >= 7
    for arguments in commands():
        command = typer.main.get_command(app)
        context = typer.Context(command, info_name="bridge")
        for name in arguments[: 2 if arguments[0] == "train" else 1]:
            command = command.get_command(context, name)
            rest = arguments[arguments.index(name) + 1 :]
            context = command.make_context(name, list(rest), parent=context)
        assert context.params


@pytest.fixture
def modules(tmp_path, monkeypatch):
    for name, block in zip(("rewards", "frugal"), BLOCKS, strict=True):
        (tmp_path / f"doc_{name}.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_the_rewards_and_tasks_of_its_examples_score(modules):
    (modules / "puzzles.jsonl").write_text(lines('"6 5 3 5'))
    (modules / "sums.jsonl").write_text(lines('"messages"'))
    task = find_task(str(modules / "puzzles.jsonl"), reward="doc_rewards:brief", threshold=0.15)
    assert task.size("test") == 2
    with Scorer(task) as scorer:
        [worth] = scorer.score([(task.problem("test", 0), "+ - * 8 6 4 no ! - - -")])
    assert worth.value == 3 / 11
    task = find_task(str(modules / "sums.jsonl"))
    pairs = [(task.problem("train", 0), "so 391.0"), (task.problem("test", 0), "It is 5.")]
    with Scorer(task) as scorer:
        assert [score.value for score in scorer.score(pairs)] == [1, 0]
    task = find_task("doc_frugal:Frugal", seed=5)
    assert isinstance(task, Task)
    puzzle = Problem(0, "3 5 2 7 = 8 ?", metadata={"numbers": [3, 5, 2, 7], "target": 8})
    said = ("! - - -", "- - - 17 15 8 yes ! - - -", "+ - * 8 6 4 no " * 2 + "! - - -", "! + + +")
    with Scorer(task) as scorer:
        worth = [score.value for score in scorer.score([(puzzle, text) for text in said])]
    assert worth == [1, 1, 11 / 18, 0]


def test_which_numbers_agree():
    numbers, percents = (
        next(line for line in TEXT.splitlines() if line.startswith(start))
        for start in ("- `numeric` wants", "- A percentage is")
    )
    numeric = check_match("numeric", 0)
    same, others = (re.findall(r"`([^`]+)`", part) for part in numbers.split("agree. ")[:2])
    assert len(same) - 1 == 6 and all(numeric("1200", text) for text in same[1:])
    others = others[:-3]  # what follows is of right answers
    assert len(others) >= 9 and others[-1] == "twelve"
    assert all(read_quantity(text) is None for text in others)
    percent, share, whole, small, least, _, _ = re.findall(r"`([^`]+)`", percents)
    assert numeric(share, percent) and numeric(whole, percent) and numeric(least, small)
    assert not numeric("0.5", small) and not numeric(share, whole)


def test_the_options_of_files_are_all_there():
    taken = set(inspect.signature(JsonlTask).parameters) - {"path"}
    assert names("option") - {"module:function"} == taken - {"tolerance"}
    assert "`tolerance=" in TEXT


def test_the_fields_of_the_log_are_all_there(tmp_path):
    small = {"steps": 2, "problems": 2, "width": 2, "max_new_tokens": 4, "eval_problems": 2}
    task = "bridge.tasks.search:operator_search"
    out = tmp_path / "run"
    train(
        GRPOSettings(
            checkpoint=str(BUNDLED), out=str(out), task=task, backend="numpy", beta=0.1, **small
        )
    )
    records = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    logged = {key for record in records for key in record}
    logged = {re.sub(r"^seconds_.*", "seconds_*", key) for key in logged}
    logged = {re.sub(r".*_tokens_per_second$", "*_tokens_per_second", key) for key in logged}
    said = {name for name in names("figure") if not name.startswith("--")}
    # Of SFT, of rewards that fail, and with mask_truncated.
    assert said == logged | {"epoch", "groups", "bad_reward", "idle_groups"}
    there = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    assert there == {"config.toml", "log.jsonl", "checkpoints", "best", "final"}
