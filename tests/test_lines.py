"""Files of lines: one rule for text and JSON, wherever one is read, and of our own what we wrote.

Each row of the table says what a file's bytes come to; every public entrance is held to it.
"""

import json
import os
from pathlib import Path

import pytest
from training_toys import LETTERS, write_model

import bridge
from bridge.errors import BridgeError
from bridge.evaluation.records import RESULTS, Group, Journal, Row, kept
from bridge.files.jsonl import lines_of, read_lines, read_objects, read_own, to_line
from bridge.files.utf8 import whole_text
from bridge.tasks import find_task
from bridge.training import SFTSettings
from bridge.training.log import Log, read_log
from bridge.training.sft import read_samples
from bridge_cli.prompts import read_prompts

pytestmark = pytest.mark.usefixtures("one_thread")

MARK = b"\xef\xbb\xbf"
ENDS = (
    "\u2028\u2029\x85\x0b\x0c\x1c"  # what str.splitlines takes for ends of lines, and JSON does not
)
DEEP = b'{"x": ' + b"[" * 100 + b"]" * 100 + b', "key": "a"}'

# What a file is, with {"key": ...} in each line, and the values of `key`; or what is wrong with it.
TABLE: list[tuple[bytes, list[str] | str]] = [
    (b'{"key": "a"}\n{"key": "b"}\n', ["a", "b"]),
    (b'{"key": "a"}\n{"key": "b"}', ["a", "b"]),
    (b'{"key": "a"}\r\n{"key": "b"}\r\n', ["a", "b"]),
    (MARK + b'{"key": "a"}\n{"key": "b"}\n', ["a", "b"]),
    (MARK + b'\n{"key": "a"}\n', ["a"]),
    (b'\n \t\n{"key": "a"}\n\r\n{"key": "b"}\n\n', ["a", "b"]),
    ('\u2003\n{"key": "a"}\n'.encode(), ["a"]),
    (f'{{"key": "a{ENDS[:3]}"}}\n{{"key": "b"}}\n'.encode(), ["a" + ENDS[:3], "b"]),
    (json.dumps({"key": "a" + ENDS}).encode() + b"\n", ["a" + ENDS]),
    (b'{"key": "a\\ud83d\\ude00"}\n', ["a\U0001f600"]),
    (b'{"key": "a", "n": 1e308, "x": [-0.0, 1]}\n', ["a"]),
    (b'{"key": "a"}\n{"key": "b", "key": "c"}\n', "line 2: {the key 'key' comes twice"),
    (b'{"key": "a", "x": [{"y": 1, "y": 1}]}\n', "line 1: {the key 'y' comes twice"),
    (b'\n{"key": "a", "x": NaN}\n', "line 2: x is NaN, no number of JSON"),
    (b'{"key": "a", "x": {"y": [1, -Infinity]}}\n', "line 1: x.y[1] is -Infinity, no number"),
    (b'{"key": "a", "x": 1e400}\n', "line 1: x is 1e400, no number of JSON"),
    (b'{"key": "a", "x": ' + b"9" * 5000 + b"}\n", "line 1: {an integer of thousands of digits"),
    (b'{"key": "\\ud83d"}\n', "line 1: holds half a surrogate pair"),
    (b'{"key": "a"}\n\xff\n', "line 2: is not UTF-8 (at byte 0 of it)"),
    (b'{"key": "a"}\n' + MARK + b'{"key": "b"}\n', "line 2: {"),
    (b'{"key": "a"}\n[1]\n', "line 2: must be a JSON object"),
    (b'{"key": "a"}\n"b"\n', "line 2: must be a JSON object"),
    (b'{"key": "a"}\n{"key": \n', "line 2: {"),
    (b'{"key": "a"} {"key": "b"}\n', "line 1: {Extra data"),
    (DEEP + b"\n", "line 1: {nested too deeply"),
    (b"[" * 100_000 + b"\n", "line 1: {nested too deeply"),
    ('{"key": "a"}\n'.encode("utf-16"), "line 1: is not UTF-8"),
]


def named(said: str) -> str:
    """What a row of the table wants a message to say."""
    return said.replace("{", "is not readable as JSON (")


def prompts_of(path: Path) -> list[str]:
    return read_prompts([], path)


def task_of(path: Path) -> list[str]:
    task = find_task(str(path), match="exact")
    return [str(task.problem("train", i).prompt) for i in range(task.size("train") or 0)]


def objects_of(path: Path) -> list[str]:
    return [value["key"] for _, value in read_objects(path)]


def write(path: Path, data: bytes, start: str) -> str:
    """The table's lines with what an entrance needs at their start; the name of its `key`."""
    key = start.split('"')[-2]
    if not data.startswith(b"\xff\xfe"):
        data = data.replace(b'{"key": ', start.encode())
        data = data.replace(b', "key": ', f', "{key}": '.encode())
    path.write_bytes(data)
    return key


READERS = {
    "objects": (objects_of, '{"key": '),
    "generate --file": (prompts_of, '{"prompt": '),
    "a task": (task_of, '{"split": "train", "answer": "1", "prompt": '),
}


@pytest.mark.parametrize("entrance", READERS)
@pytest.mark.parametrize("data, wanted", TABLE)
def test_bytes_mean_the_same_at_every_entrance(tmp_path, entrance, data, wanted):
    read, start = READERS[entrance]
    path = tmp_path / "data.jsonl"
    key = write(path, data, start)
    if isinstance(wanted, list):
        assert read(path) == wanted
        return
    with pytest.raises(BridgeError) as error:
        read(path)
    said = str(error.value)
    assert said.startswith(f"{path}, line ") and "\n" not in said
    assert named(wanted).replace("'key'", f"'{key}'") in said


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return bridge.load(write_model(tmp_path_factory.mktemp("lines") / "model"), backend="numpy")


@pytest.mark.parametrize("data, wanted", TABLE)
def test_samples_are_read_by_the_same_rule(tmp_path, model, data, wanted):
    path = tmp_path / "data.jsonl"
    ids = '"prompt_tokens": [1, 2], "tokens": [[4, 0], [5, 0]]'
    key = write(path, data, f'{{"responses": ["3", "3"], {ids}, "prompt": ')
    settings = SFTSettings(checkpoint="c", out="o", data=str(path))
    if isinstance(wanted, list):
        found = read_samples(path, model, settings)
        assert [correct.responses for correct in found] == [[[4, 0], [5, 0]]] * len(wanted)
        return
    with pytest.raises(BridgeError) as error:
        read_samples(path, model, settings)
    assert str(error.value).startswith(f"{path}, line ")
    assert named(wanted).replace("'key'", f"'{key}'") in str(error.value)


@pytest.mark.parametrize("data, wanted", TABLE)
def test_our_own_files_are_read_by_the_same_rule(tmp_path, data, wanted):
    """And what follows the last newline is half a line, which a kill has left."""
    path = tmp_path / "log.jsonl"
    path.write_bytes(data)
    if isinstance(wanted, list):
        whole = [line.to_object()["key"] for line in read_own(path, "mend it")]
        assert whole == (wanted if data.endswith(b"\n") else wanted[:-1])
        return
    with pytest.raises(BridgeError, match=r"is damaged \(.*\); mend it$"):
        [line.to_object() for line in read_own(path, "mend it")]


def test_lines_say_where_they_end(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(MARK + b"a\r\n\n \nb\xe2\x80\xa8c\nhalf")
    assert [(x.number, x.text, x.end) for x in read_lines(path)] == [
        (1, "a", 6),
        (4, "b\u2028c", 15),
        (5, "half", 19),
    ]
    assert [line.end for line in read_own(path, "")] == [6, 15]


def test_one_line_is_in_memory_at_a_time():
    """The file is asked for a line, and only then for the next."""

    class Endless:
        asked = 0

        def readline(self, most):
            self.asked += 1
            return b'{"key": 1}\n'

    file = Endless()
    lines = lines_of(file, "endless")  # pyright: ignore[reportArgumentType]
    assert [next(lines).number for _ in range(3)] == [1, 2, 3] and file.asked == 3


def test_a_line_that_never_ends_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("bridge.files.jsonl.MAX_TEXT", 1_000_000)
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n' + b" " * 1_000_001)
    with pytest.raises(BridgeError, match=r"x\.jsonl, line 2: is larger than 1 MB"):
        read_prompts([], path)


@pytest.mark.parametrize(
    "text", [ENDS, "half \ud83d pair", "\ude00\ud83d", '"\\\n\r\x00', "\ufeff"]
)
def test_what_we_write_we_read(tmp_path, text):
    """Of text that is none, what can be kept of it."""
    log = Log(tmp_path / "log.jsonl", 0, [])
    log.write({"kind": "step", "step": 1, "bad_reward": text})
    log.close()
    [record] = read_log(tmp_path / "log.jsonl")
    assert record["bad_reward"] == whole_text(text)
    assert whole_text(text).encode().decode() == whole_text(text)
    assert len(whole_text(text)) == len(text)
    assert whole_text("a\ud83d\ude00b") == "a\U0001f600b"
    assert json.loads(to_line({"x": text})) == {"x": whole_text(text)}

    answer = Row(text, 1, "eos", text, 1.0)
    with Journal(tmp_path, {}) as journal:
        journal.append([Group(1, 0, 0, "d", (answer,))])
        written = dict(journal.groups)
    with Journal(tmp_path, {}) as journal:
        assert journal.groups == written and journal.groups[1, 0, 0].rows[0].text == whole_text(
            text
        )
    assert kept(tmp_path) == [(1, 0, 0)]


def test_a_line_that_is_not_text_hides_none_that_is(tmp_path):
    with Journal(tmp_path, {}) as journal:
        rows = (Row("a", 1, "eos", None, 0.0),)
        journal.append([Group(1, problem, 0, "d", rows) for problem in range(3)])
    first, second, third = (tmp_path / RESULTS).read_bytes().splitlines(keepends=True)
    (tmp_path / RESULTS).write_bytes(first + b"\xff" + second + third)
    assert kept(tmp_path) == [(1, 0, 0), (1, 2, 0)]
    with pytest.raises(BridgeError, match=r"results.jsonl, line 2: is damaged \(is not UTF-8"):
        Journal(tmp_path, {})


def test_a_log_goes_on_where_a_step_is_done(tmp_path):
    """With blank lines and a mark that somebody's editor has left; what is past it is cut off."""
    path = tmp_path / "log.jsonl"
    lines = [{"kind": "step", "step": n} for n in (1, 2, 3)]
    path.write_bytes(MARK + b"\r\n" + b"\n".join(to_line(line) for line in lines) + b'{"ki')
    log = Log(path, 2, [])
    assert [record["step"] for record in log.before] == [1, 2] and log.told == {("step", 3)}
    log.write({"kind": "step", "step": 3, "loss": 1.0})
    log.close()
    assert [record.get("loss") for record in read_log(path)] == [None, None, 1.0]


def test_texts_keep_what_is_no_end_of_a_line(tmp_path):
    path = tmp_path / "questions.txt"
    path.write_bytes(MARK + f"one {ENDS} two\r\n\r\n  three\n{{not json\n".encode())
    assert read_prompts([], path) == [f"one {ENDS} two", "  three", "{not json"]


@pytest.mark.parametrize("name", ["questions.txt", "questions.jsonl"])
def test_prompts_in_json_are_never_fed_as_they_are(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(
        MARK + b'{"prompt": "what?"}\n{"messages": [{"role": "user", "content": "x"}]}'
    )
    assert read_prompts([], path) == ["what?", [{"role": "user", "content": "x"}]]
    for damaged in (b'{"prompt": "what?"\n', b'{"prompt": "a", "prompt": "b"}', b'{"prompt": NaN}'):
        path.write_bytes(damaged)
        with pytest.raises(BridgeError, match=f"{name}, line 1: "):
            read_prompts([], path)


SPECIAL = {
    "a pipe": lambda path: os.mkfifo(path),
    "a directory": lambda path: path.mkdir(),
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_is_named_and_not_waited_for(tmp_path, model, kind):
    for name, read in {
        "x.jsonl": lambda path: find_task(str(path)),
        "prompts.jsonl": lambda path: read_prompts([], path),
        "data.jsonl": lambda path: read_samples(
            path, model, SFTSettings(checkpoint="c", out="o", data=str(path))
        ),
        "run.toml": lambda path: bridge_toml(path),
        "log.jsonl": lambda path: read_log(path),
        "results.jsonl": lambda path: Journal(path.parent, {}),
    }.items():
        path = tmp_path / name
        SPECIAL[kind](path)
        with pytest.raises(BridgeError) as error:
            read(path)
        said = str(error.value)
        assert str(path) in said or str(tmp_path) in said
        assert kind in said or "cannot be" in said or "link to outside" in said, said
        assert "\n" not in said


def bridge_toml(path: Path) -> object:
    from bridge.files.toml import read_toml

    return read_toml(path)


def test_a_file_that_the_user_names_may_be_a_link_to_anywhere(tmp_path, model):
    (tmp_path / "there").mkdir()
    line = b'{"prompt": "1+1=", "answer": "2", "responses": ["2", "2"]}\n'
    (tmp_path / "there" / "real").write_bytes(line)
    link = tmp_path / "x.jsonl"
    link.symlink_to(tmp_path / "there" / "real")
    assert read_prompts([], link) == ["1+1="]
    assert sum(find_task(str(link)).size(s) or 0 for s in ("train", "validation", "test")) == 1
    settings = SFTSettings(checkpoint="c", out="o", data=str(link))
    assert len(read_samples(link, model, settings)) == 1
    (tmp_path / "there" / "toml").write_text("a = 1\n")
    toml = tmp_path / "x.toml"
    toml.symlink_to(tmp_path / "there" / "toml")
    assert bridge_toml(toml) == {"a": 1}


def test_a_run_goes_on_from_the_samples_that_it_wrote(tmp_path):
    """With what only str.splitlines takes for ends of lines in the prompts."""
    from training_toys import InProcess, Sums

    from bridge.training import train

    class Odd(Sums):
        def problem(self, split, number):
            found = super().problem(split, number)
            return type(found)(found.number, f"{found.prompt}{ENDS}", found.answer)

        def score(self, problem, response):
            return 1.0

    assert not set(ENDS) & set(LETTERS)
    made = write_model(tmp_path / "model")
    settings = SFTSettings(
        checkpoint=str(made),
        out=str(tmp_path / "run"),
        task="odd",
        backend="torch",
        problems=4,
        samples=2,
        max_rows=4,
        max_new_tokens=2,
        epochs=1,
    )
    result = train(settings, task=Odd(), scorer=InProcess(Odd()))
    samples = tmp_path / "run" / "samples.jsonl"
    assert [value["prompt"][-len(ENDS) :] for _, value in read_objects(samples)] == [ENDS] * 4
    more = {"checkpoint": str(made), "data": str(samples), "epochs": 1, "backend": "torch"}
    assert train(SFTSettings(out=str(tmp_path / "more"), **more)).steps == result.steps == 1
