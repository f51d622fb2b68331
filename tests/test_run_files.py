"""A run's own files, read back: each field as anything but what was written is one line that names
file and field; so are TOML and JSON that are too deep or too long.

A table of values is tried in every field, as the files stand after a short run.
"""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from training_stops import Watch, interrupt, run, toy_run
from typer.testing import CliRunner

from bridge.errors import BridgeError
from bridge.evaluation.records import RESULTS, SETTINGS, Group, Journal, Row, kept
from bridge.files.fields import read_as
from bridge.files.toml import read_toml
from bridge.tasks import find_task
from bridge.training import read_settings
from bridge.training.directory import read_run
from bridge.training.health import Health
from bridge.training.log import Log, LoggedStep, PolicyStep, read_log
from bridge.training.saving import Progress, read_best_step, read_progress
from bridge_cli.main import app

pytestmark = pytest.mark.usefixtures("one_thread")

MISSING = object()
DEEP = json.loads("[" * 90 + "]" * 90)
# JSON, so that NaN and numbers beyond a float are what a file says
VALUES = {
    "missing": MISSING,
    "null": "null",
    "text": '"x"',
    "digits": '"3"',
    "true": "true",
    "negative": "-1",
    "fraction": "0.5",
    "huge": "1" + "0" * 20,
    "digits by the thousand": "9" * 5000,
    "NaN": "NaN",
    "infinite": "-Infinity",
    "beyond a float": "1e400",
    "list": "[]",
    "list of it": "[1]",
    "object": "{}",
    "deep": json.dumps(DEEP),
    "too deep": "[" * 2000 + "]" * 2000,
    "half a pair": '"\\ud83d"',
}
UNREAD = ("digits by the thousand", "too deep", "half a pair")  # the line as a whole is not read


def fields_of(value: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where each value within a value stands."""
    if where:
        yield where
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from fields_of(item, (*where, key))


def with_field(value: Any, where: tuple[Any, ...], text: str | object) -> str:
    """JSON of a value with another text, or nothing, in one place."""
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in where[:-1]:
        inner = inner[key]
    if text is MISSING:
        del inner[where[-1]]
        return json.dumps(copy)
    inner[where[-1]] = "\N{SNOWMAN}"
    return json.dumps(copy, ensure_ascii=False).replace('"\N{SNOWMAN}"', str(text))


def refusal(call: Any) -> str | None:
    """The one line that a call is refused with; None where it is not."""
    try:
        call()
    except BridgeError as error:
        said = str(error)
        assert "\n" not in said and len(said) <= 1000
        return said
    return None


BEST = {"step": 2, "problems": 4, "accuracy": 0.5, "reward_mean": 0.25, "bad_reward": "no"}
PROGRESS = {"step": 4, "problems": 12, "best": BEST, "source": "abc", "seed": 3}
# Fields that may be these, beside what they are
FREE = {
    ("best",): {"null", "missing"},
    ("problems",): {"missing"},
    ("source",): {"missing", "text", "digits"},
    ("seed",): {"missing"},
    ("best", "accuracy"): {"negative", "fraction", "huge"},
    ("best", "reward_mean"): {"negative", "fraction", "huge"},
    ("best", "bad_reward"): set(VALUES)
    - {"digits by the thousand", "NaN", "infinite", "beyond a float", "too deep", "half a pair"},
}


@pytest.mark.parametrize("where", [*fields_of(PROGRESS)], ids=lambda where: ".".join(where))
def test_every_field_of_progress(tmp_path, where):
    path = tmp_path / "progress.json"
    for value in VALUES:
        path.write_text(with_field(PROGRESS, where, VALUES[value]), encoding="utf-8")
        said = refusal(lambda: read_progress(path, 4))
        if value in FREE.get(where, set()):
            assert said is None
            continue
        assert said is not None and said.startswith(f"{path}: is missing or damaged (")
        assert said.endswith(f"; remove {tmp_path} to resume from before")
        if value not in UNREAD:
            assert ".".join(where) in said


def test_progress_is_what_was_written(tmp_path):
    path = tmp_path / "progress.json"
    path.write_text(json.dumps(PROGRESS))
    assert read_progress(path, 4) == Progress(4, 12, BEST, "abc", 3)  # pyright: ignore[reportArgumentType]
    assert "step must be 5, not 4" in (refusal(lambda: read_progress(path, 5)) or "")
    path.write_text(json.dumps({**PROGRESS, "more": 1}))
    assert "more is not known" in (refusal(lambda: read_progress(path, 4)) or "")
    path.write_text(json.dumps([PROGRESS]))
    assert "must be a JSON object" in (refusal(lambda: read_progress(path, 4)) or "")


ROW = {
    "text": "a",
    "tokens": 3,
    "finish_reason": "eos",
    "answer": "7",
    "score": 0.5,
    "trouble": None,
}
GROUP = {
    "width": 2,
    "problem": 1,
    "number": 0,
    "digest": "d",
    "rows": [ROW, {**ROW, "answer": None}],
}
TEXTS = {"text", "digits"}
FREE_OF_ROW = {
    "text": TEXTS,
    "answer": {"null", *TEXTS},
    "trouble": {"null", "missing", *TEXTS},
    "score": {"negative", "fraction", "huge"},
}


@pytest.mark.parametrize("where", [*fields_of(GROUP)], ids=lambda where: ".".join(map(str, where)))
def test_every_field_of_results(tmp_path, where):
    for value in VALUES:
        if VALUES[value] is MISSING and where[-1] == 0:
            continue  # what then is first has its place
        (tmp_path / SETTINGS).write_text("{}")
        path = tmp_path / RESULTS
        line = with_field(GROUP, where, VALUES[value])
        path.write_text(line + "\n", encoding="utf-8")
        free = {("digest",): TEXTS, ("problem",): set(), ("rows", 1): set()}.get(where, set())
        if len(where) == 3:
            free = FREE_OF_ROW.get(where[2], set())
        said = refusal(lambda: Journal(tmp_path, {}).close())
        if value in free:
            assert said is None and len(kept(tmp_path)) == 1
            continue
        assert said is not None and said.startswith(f"{path}, line 1: is damaged (")
        assert said.endswith("; remove the line, and it is found again") and kept(tmp_path) == []
        if value not in UNREAD and len(where) != 2:
            name = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in where)
            assert name[1:] in said
        assert path.read_text(encoding="utf-8") == line + "\n"


def test_results_are_what_was_written(tmp_path):
    (tmp_path / SETTINGS).write_text("{}")
    (tmp_path / RESULTS).write_text(json.dumps(GROUP) + "\n" + '{"half')
    row = Row("a", 3, "eos", "7", 0.5)
    with Journal(tmp_path, {}) as journal:
        wanted = Group(2, 1, 0, "d", (row, replace(row, answer=None)))
        assert journal.groups == {(2, 1, 0): wanted}
    assert (tmp_path / RESULTS).read_text() == json.dumps(GROUP) + "\n"


@pytest.mark.parametrize(
    "text", ["[", "[]", "3", '{"a": NaN}', '{"a": 1, "a": 2}', "[" * 5000, "\ud83d"]
)
def test_settings_of_an_evaluation(tmp_path, text):
    (tmp_path / SETTINGS).write_bytes(text.encode("utf-8", "surrogatepass"))
    said = refusal(lambda: Journal(tmp_path, {"a": 1}).close())
    assert said is not None and said.startswith(f"{tmp_path / SETTINGS}: ")
    assert "evaluate into another directory" in said or "is not UTF-8" in said


STEP = {
    "kind": "step",
    "step": 1,
    "loss": 0.5,
    "entropy": None,
    "equal_groups": 0,
    "accuracy": 0.5,
    "bad_rewards": 1,
    "rows": 8,
    "cut_off": 0.5,
    "idle_groups": 0,
    "bad_reward": "late",
}
NUMBERS = {"missing", "null", "negative", "fraction", "huge"}
FREE_OF_STEP = {"loss": NUMBERS, "entropy": NUMBERS, "accuracy": NUMBERS - {"missing", "null"}}
FREE_OF_STEP["cut_off"] = FREE_OF_STEP["accuracy"]
FREE_OF_STEP["idle_groups"] = {"missing"}
FREE_OF_STEP["bad_reward"] = {"missing", *TEXTS}


@pytest.mark.parametrize("name", STEP)
def test_every_field_of_a_log_that_is_read_again(tmp_path, name):
    """What is taken is what a run that goes on judges by, with mask_truncated too."""
    path = tmp_path / "log.jsonl"
    given = {"checkpoint": "c", "out": "o", "task": "t", "mask_truncated": True}
    settings = read_settings("grpo", given)
    for value in VALUES:
        text = (
            json.dumps(STEP) + "\n" + with_field({**STEP, "step": 2}, (name,), VALUES[value]) + "\n"
        )
        path.write_text(text, encoding="utf-8")
        said = refusal(lambda: Log(path, 1, [], True, PolicyStep).close())
        if value in FREE_OF_STEP.get(name, set()):
            assert said is None and path.read_text() == json.dumps(STEP) + "\n"
            path.write_text(text, encoding="utf-8")
            log = Log(path, 2, [], True, PolicyStep)
            log.close()
            assert len(log.before) == Health(settings, 10, log.before).steps == 2
            continue
        assert said is not None and said.startswith(f"{path}, line 2: is damaged (")
        assert "cut the file off before it" in said and path.read_text(encoding="utf-8") == text
        if value not in UNREAD:
            assert name in said


def test_a_log_of_sft_has_fewer_figures(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"kind": "step", "step": 1, "loss": 1}\n{"kind": "evaluation", "step": 1}\n')
    assert [r["step"] for r in read_log(path)] == [1, 1]
    assert Log(path, 1, [], True, LoggedStep).before == [{"kind": "step", "step": 1, "loss": 1.0}]
    assert "equal_groups is missing" in (refusal(lambda: Log(path, 1, [], True, PolicyStep)) or "")


def test_a_whole_run_with_damaged_files(toy_model, tmp_path):
    """What a run itself left, by what goes on with it: every file that is read."""
    settings = replace(toy_run(toy_model, tmp_path / "run"), eval_every=1)
    with pytest.raises(KeyboardInterrupt):
        run(settings, Watch(2, interrupt))
    whole = tmp_path / "whole"
    shutil.copytree(tmp_path / "run", whole)
    [checkpoint] = sorted((whole / "checkpoints").iterdir())[-1:]
    files = {
        "log.jsonl": whole / "log.jsonl",
        "progress.json": checkpoint / "progress.json",
        "config.toml": whole / "config.toml",
    }
    damage = {
        "log.jsonl": (b'"equal_groups": ', b'"equal_groups": "x", "was": '),
        "progress.json": (b'"step": 2', b'"step": {}'),
        "config.toml": (b"lr = ", b"lr = [[" + b"9" * 5000 + b"]] #"),
    }
    for name, path in files.items():
        old, new = damage[name]
        shutil.rmtree(settings.out)
        shutil.copytree(whole, settings.out)
        hurt = Path(settings.out) / path.relative_to(whole)
        assert old in hurt.read_bytes()
        hurt.write_bytes(new.join(hurt.read_bytes().rsplit(old, 1)))
        before = {p: p.read_bytes() for p in Path(settings.out).rglob("*") if p.is_file()}
        said = refusal(lambda: run(settings))
        assert said is not None and name in said
        after = {p: p.read_bytes() for p in Path(settings.out).rglob("*") if p.is_file()}
        assert after == before
    shutil.rmtree(settings.out)
    shutil.copytree(whole, settings.out)
    assert run(settings).resumed_from == 2


@pytest.mark.parametrize("value", [v for v in VALUES if v != "huge"])
def test_the_evaluation_of_best(tmp_path, value):
    """Whether it is worth keeping is not guessed from what cannot be read."""
    path = tmp_path / "training.json"
    assert read_best_step(path) is None
    said = {"kind": "grpo", "evaluation": {"step": 7}}
    path.write_text(json.dumps(said))
    assert read_best_step(path) == 7
    for where in (("evaluation",), ("evaluation", "step")):
        path.write_text(with_field(said, where, VALUES[value]))
        line = refusal(lambda: read_best_step(path))
        assert line is not None and line.startswith(f"{path}: is missing or damaged")


TOML = {
    "x = " + "[" * 1000 + "]" * 1000: "nested too deeply",
    "x = " + "{a=" * 1000 + "1" + "}" * 1000: "nested too deeply",
    ".".join(["a"] * 1000) + " = 1": "nested too deeply",
    "x = " + "[" * 101 + "]" * 101: "nested too deeply",
    "x = " + "9" * 5000: "an integer of thousands of digits",
    "x = 0x" + "f" * 5000 + "\nwidth = 9e": "is not TOML",
    "x = 1\nx = 2": "is not TOML",
    "x": "is not TOML",
}


@pytest.mark.parametrize("text", TOML, ids=lambda text: f"{text[:12]} {len(text)}")
def test_toml_that_is_too_much(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text)
    said = refusal(lambda: read_toml(path)) or ""
    assert said.startswith(f"{path}: ") and TOML[text] in said
    ran = CliRunner().invoke(app, ["train", "grpo", str(path)])
    assert ran.exit_code == 2 and re.fullmatch("error: [^\n]+\n", ran.stderr)


@pytest.mark.parametrize(
    "line",
    [
        "width = " + "9" * 4000,
        "lr = " + "9" * 4000,
        "lr = nan",
        "lr = 1e400",
        "lr = inf",
        "width = 1e20",
        "betas = [[[0.9]]]",
        "log = [[]]",
        "task_options = { x = nan }",
        "task_options = { x = 1979-05-27 }",
        "task_options = { x = " + "[" * 90 + "nan" + "]" * 90 + " }",
        'checkpoint = "a\\u0000b"',
        "kind = [1]",
        "kind = 1e400",
    ],
    ids=lambda line: line[:20],
)
def test_settings_that_no_run_has(tmp_path, line):
    given = {"kind": '"grpo"', "checkpoint": '"c"', "out": '"o"', "task": '"t"'}
    given.pop(line.partition(" ")[0], None)
    path = tmp_path / "config.toml"
    path.write_text("".join(f"{key} = {value}\n" for key, value in given.items()) + line + "\n")
    said = refusal(lambda: read_run(tmp_path)) or ""
    assert said.startswith(f"{path}: ") and line.partition(" ")[0] in said
    if not line.startswith("kind"):
        assert refusal(lambda: read_settings("grpo", read_toml(path), "run")) is not None


def test_a_deep_option_of_a_task_is_kept_and_read_again(tmp_path):
    from bridge.files.toml import write_toml

    deep = {"x": json.loads("[" * 90 + '"y"' + "]" * 90)}
    given = {"checkpoint": "c", "out": "o", "task": "t", "task_options": deep}
    settings = read_settings("grpo", given)
    (tmp_path / "config.toml").write_text(write_toml(settings.to_json()))
    assert read_run(tmp_path) == settings


def test_a_task_that_is_a_pipe_is_named(tmp_path):
    import os

    for name in ("x.jsonl", "x"):
        os.mkfifo(tmp_path / name)
        said = refusal(lambda name=name: find_task(str(tmp_path / name))) or ""
        assert said.startswith(f"{tmp_path / name}: is a pipe")


def test_a_class_of_fields_takes_what_it_says():
    """Of the reader itself: types, ranges, what may be missing, what may be more."""
    found = read_as(Progress, {"step": 3, "best": BEST})
    assert found == Progress(3, 0, BEST)  # pyright: ignore[reportArgumentType]
    assert found.best is not None and found.best["accuracy"] == 0.5
    with pytest.raises(BridgeError, match=r"^best\.step must be 0 or above, not -1$"):
        read_as(Progress, {"best": {**BEST, "step": -1}})
    with pytest.raises(BridgeError, match=r"^seed must be in 0\.\.2\^64-1, not 1844674407"):
        read_as(Progress, {"seed": 2**64})
    with pytest.raises(BridgeError, match=r"^it must be an object, not 3$"):
        read_as(Progress, 3)
