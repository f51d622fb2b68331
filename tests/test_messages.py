"""What a message quotes is at most a line of it, with both ends, wherever it was made."""

import pickle
import re
from pathlib import Path

import pytest
from training_toys import write_model
from typer.testing import CliRunner

import bridge
from bridge.config import parse_config, read_config
from bridge.errors import LINE, MESSAGE, BridgeError, one_line, shorten, shorten_message, show
from bridge.model import BUNDLED as BUNDLED_MODEL
from bridge.tasks import find_task
from bridge.training import read_settings
from bridge_cli.main import app

NAME = "begin" + "x" * 99_990 + "ended"
ENDS = re.compile(r"begin.*…x+ended")


def test_both_ends_of_a_long_text_stay():
    assert shorten("a" * LINE) == "a" * LINE
    assert shorten("abc" + "x" * LINE + "def") == "abc" + "x" * 117 + "…" + "x" * 76 + "def"
    assert len(shorten(NAME)) == LINE and len(shorten(NAME, 10)) == 10
    assert shorten("abcdefghijk", 10) == "abcdef…ijk"


@pytest.mark.parametrize(
    "quoted",
    [
        NAME,
        repr(NAME),
        repr(f"begin{'one two ' * 12_000}ended"),
        repr(f"begin'{' q' * 50_000}ended"),
    ],
    ids=["bare", "quoted", "with spaces", "with quotes"],
)
def test_what_is_ours_in_a_message_stays(quoted):
    said = str(BridgeError(f"the file {quoted}, line 3: is wrong; it's yours to mend, isn't it?"))
    assert said.startswith("the file ") and "begin" in said and "…" in said and "ended" in said
    assert said.endswith(", line 3: is wrong; it's yours to mend, isn't it?")
    assert len(said) < LINE + 80


def test_a_message_of_many_things_has_an_end():
    said = str(BridgeError(f"first {'ab cd ' * 50_000}last"))
    assert said.startswith("first ab cd ") and said.endswith("ab cd last") and len(said) == MESSAGE
    short = "it's one of 'a b', \"c\" and d's; " * 6 + "isn't it?"
    assert str(BridgeError(short)) == short == shorten_message(short)


def test_quotations_that_do_not_end_are_not_sought_without_end():
    """The work is bounded, not only the message: it is of the text's length, not of its square."""
    for text in ("\\'" * 10**6, "' " * 10**6, "\" '" * 10**6, '\\"' * 10**6):
        said = str(BridgeError(f"at {text}: is wrong"))
        assert said.startswith("at ") and said.endswith(": is wrong") and len(said) <= MESSAGE
    two = str(BridgeError(f"{NAME!r} and then {NAME[::-1]!r}: are wrong"))
    assert re.fullmatch(r"'beginx+…x+ended' and then 'dednex+…x+nigeb': are wrong", two)


def test_a_message_stays_as_it_is_when_it_travels():
    error = BridgeError(f"{NAME!r} is not known; {'a b ' * 1000}")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == str(BridgeError(str(error)))


def test_values_are_shown_by_their_ends():
    assert ENDS.fullmatch(one_line(NAME)) and len(one_line(NAME)) == LINE
    assert show([1] * 100_000).startswith("[1, 1") and show([1] * 100_000).endswith("1, 1]")
    assert show(10**5000) == "a int too long to show"


def said_by(*arguments: str) -> str:
    """What a command line is refused with."""
    ran = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1"}).invoke(app, list(arguments))
    assert ran.exit_code == 2 and ran.stdout == "", ran.output
    return ran.stderr


BUNDLED = str(BUNDLED_MODEL)
TASK = ("--task", "bridge.tasks.chain:chain")
LINES: dict[str, tuple[str, ...]] = {
    "a file's name": ("inspect", NAME),
    "a path": ("generate", f"/nowhere/{NAME}", "hi"),
    "a name to make": ("convert", BUNDLED, f"/tmp/{NAME}", "--to", "mlx"),
    "a form": ("convert", BUNDLED, "made", "--to", NAME),
    "a number": ("generate", BUNDLED, "hi", "--width", NAME),
    "a list of numbers": ("eval", BUNDLED, *TASK, "--width", NAME),
    "a backend": ("generate", BUNDLED, "1 2", "--backend", NAME),
    "a task": ("eval", BUNDLED, "--task", NAME),
    "a task's file": ("eval", BUNDLED, "--task", f"{NAME}.jsonl"),
    "a task's module": ("eval", BUNDLED, "--task", f"{NAME}:f"),
    "a task's function": ("eval", BUNDLED, "--task", f"os:{NAME}"),
    "a generator": ("eval", BUNDLED, "--task", f"reasoning-gym:{NAME}"),
    "an option of a task": ("eval", BUNDLED, *TASK, "--task-options", f"{NAME}=1"),
    "no option of a task": ("eval", BUNDLED, *TASK, "--task-options", NAME),
    "a file of prompts": ("generate", "--file", NAME),
    "a setting": ("train", "grpo", BUNDLED, "--out", "x", *TASK, "--schedule", NAME),
    "a tensor": ("train", "grpo", BUNDLED, "--out", "x", *TASK, "--trainable", NAME),
    "a file of settings": ("train", "grpo", f"{NAME}.toml"),
    "a directory of runs": ("train", "grpo", BUNDLED, "--out", NAME, *TASK),
    "a figure": ("bench", BUNDLED, "--figures", NAME),
    "a check": ("conformance", "--check", NAME),
    "a report": ("conformance", "--backend", "numpy", "--report", NAME),
}
USAGE = {
    "a command": (NAME,),
    "a kind of training": ("train", NAME),
    "an option": (f"--{NAME}",),
    "an option of a command": ("generate", f"--{NAME}"),
    "one argument more": ("inspect", BUNDLED, NAME),
}


@pytest.mark.parametrize("what", LINES)
def test_names_of_100_000_characters(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = said_by(*LINES[what])
    assert re.fullmatch("error: [^\n]+\n", said) and len(said) <= MESSAGE + 8
    assert "begin" in said and "…" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", USAGE)
def test_what_is_typed_wrongly_is_quoted_shortly(what):
    said = said_by(*USAGE[what])
    assert len(said) < 2 * MESSAGE and "begin" in said and "…" in said


def refused(call) -> str:
    with pytest.raises(BridgeError) as error:
        call()
    said = str(error.value)
    assert len(said) < MESSAGE and "\n" not in said and "…" in said, said
    return said


def test_names_in_files(tmp_path):
    write_model(tmp_path / "model")
    data = tmp_path / "x.jsonl"
    data.write_text(f'{{"{NAME}": 1, "{NAME}": 2}}\n')
    assert "begin" in refused(lambda: find_task(str(data)))
    data.write_text(f'{{"prompt": "a", "answer": "1", "split": "{NAME}"}}\n')
    assert refused(lambda: find_task(str(data))).endswith("ended'")
    toml = tmp_path / "x.toml"
    toml.write_text(f'checkpoint = "c"\n{NAME} = 1\n')
    assert "is no setting" in said_by("train", "grpo", str(toml))
    given = {"checkpoint": "c", "out": "o", "task": "t"}
    assert "is no setting" in refused(lambda: read_settings("grpo", {**given, NAME: 1}))
    for wrong in ({"lr": NAME}, {"log": [NAME]}, {"betas": [0.9] * 50_000}, {"task_options": NAME}):
        assert next(iter(wrong)) in refused(
            lambda wrong=wrong: read_settings("grpo", given | wrong)
        )
    config = tmp_path / "model" / "config.json"
    raw = read_config(config)[1]
    assert "unknown setting" in refused(lambda: parse_config({**raw, NAME: 1}))
    assert "model_type" in refused(lambda: parse_config({**raw, "model_type": NAME}))


def test_names_in_tensors(tmp_path):
    from safetensors.numpy import load_file, save_file

    model = write_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, NAME: tensors["model.norm.weight"]}, model / "model.safetensors")
    assert "model.safetensors" in refused(lambda: bridge.load(model, backend="numpy"))
    for call in (
        lambda: bridge.load(NAME),
        lambda: bridge.load(backend=NAME),
        lambda: bridge.load(device=NAME, backend="numpy"),
        lambda: bridge.load(dtype=NAME, backend="numpy"),
        lambda: bridge.load(backend="numpy").generate("1 2", width=NAME),
    ):
        assert "begin" in refused(call)
    assert Path(model).is_dir()
