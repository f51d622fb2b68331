"""The command line: each command on a tiny checkpoint, its JSON, its sources, its refusals."""

import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
from contextlib import contextmanager
from fcntl import ioctl
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_host import CHAT, write_host
from typer.testing import CliRunner

import bridge
from bridge.checkpoints.initialise import init
from bridge.decoding.events import Started, Token
from bridge_cli.main import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = (
    *("init", "generate", "inspect", "backends", "convert", "train sft", "train grpo", "eval"),
    *("conformance", "agree", "bench"),
)
BRIDGE = [sys.executable, "-m", "bridge_cli.main"]
# What would change how rich writes, and is not ours to choose: pytest-xdist sets COLUMNS.
OTHERS = ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "GITHUB_ACTIONS", "PY_COLORS")
PLAIN = dict.fromkeys(OTHERS)
NUMPY = ("--backend", "numpy", "--dtype", "float32")
VOTE = {
    "type": "object",
    "required": ["answer", "count", "total", "tallies", "tied"],
    "properties": {
        "answer": {"type": ["string", "null"]},
        "count": {"type": "integer"},
        "total": {"type": "integer"},
        "tallies": {"type": "object", "additionalProperties": {"type": "integer"}},
        "tied": {"type": "boolean"},
    },
    "additionalProperties": False,
}
RESPONSE = {
    "type": "object",
    "required": ["text", "tokens", "finish_reason"],
    "properties": {
        "text": {"type": "string"},
        "tokens": {"type": "array", "items": {"type": "integer"}, "minItems": 1},
        "finish_reason": {"enum": ["eos", "stop", "length"]},
    },
    "additionalProperties": False,
}
PROMPT = {
    "type": "object",
    "required": ["prompt", "prompt_tokens", "responses"],
    "properties": {
        "prompt": {"type": "string"},
        "prompt_tokens": {"type": "array", "items": {"type": "integer"}, "minItems": 1},
        "responses": {"type": "array", "items": RESPONSE},
        "vote": VOTE,
    },
    "additionalProperties": False,
}
TIMING = (
    "prompt_tokens",
    "prefill_seconds",
    "rows",
    "new_tokens",
    "decode_seconds",
    "tokens_per_second",
    "tokens_per_second_per_row",
    *("row_steps", "alive_share"),
)
ANSWER = {
    "type": "object",
    "required": [
        *("checkpoint", "backend", "device", "dtype", "width", "max_new_tokens", "stop", "chat"),
        *("temperature", "top_k", "top_p", "min_p", "seed", "prompts", "timing"),
    ],
    "properties": {
        "prompts": {"type": "array", "items": PROMPT},
        "timing": {
            "required": list(TIMING),
            "additionalProperties": {"type": "number", "minimum": 0},
        },
    },
}


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return write_host(tmp_path_factory.mktemp("cli") / "host")


@pytest.fixture(scope="module")
def model(host):
    """A Bridge model whose blocks do something."""
    out = host.parent / "model"
    init(host, out, heads=2, head_dim=4)
    tensors = load_file(out / "model.safetensors")
    rng = np.random.default_rng(1)
    for name in tensors:
        if name.endswith("bridge.o_proj.weight"):
            tensors[name] = rng.normal(size=tensors[name].shape).astype(np.float32)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def run(*arguments, stdin=None, code=0):
    """Run a command line within this process; its stdout."""
    result = CliRunner(env=PLAIN).invoke(app, [str(a) for a in arguments], input=stdin)
    if result.exit_code != code:
        raise AssertionError(f"exit {result.exit_code}: {result.output}") from result.exception
    return result.stdout


def refused(*arguments, stdin=None):
    """The one line that a mistake gets."""
    result = CliRunner(env=PLAIN).invoke(app, [str(a) for a in arguments], input=stdin)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr


def generate(model, *arguments, stdin=None):
    """The JSON of a short generation."""
    options = ("--json", "--max-new-tokens", 5, "--width", 3, *NUMPY)
    said = json.loads(run("generate", model, *options, *arguments, stdin=stdin))
    jsonschema.validate(said, ANSWER)
    return said


# Help


def test_help_teaches():
    said = run("--help")
    assert all(f" {command.split()[0]} " in said for command in COMMANDS)
    for command in COMMANDS:
        assert f"Example: bridge {command}" in run(*command.split(), "--help")


def test_the_version_is_the_packages():
    assert run("--version") == f"bridge {bridge.__version__}\n"


def test_help_imports_no_framework():
    code = (
        "import sys; from bridge_cli.main import app\n"
        "try: app(['generate', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'torch', 'tokenizers', 'transformers', 'bridge'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "arguments", [["convert"], ["nothing"], ["init", "host"], ["inspect", ".", "--sideways"]]
)
def test_usage_errors_are_explained(arguments):
    done = subprocess.run([*BRIDGE, *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert "Error" in done.stderr and "Traceback" not in done.stderr


def test_the_readme_uses_commands_and_options_that_exist():
    commands = "|".join(COMMANDS)
    lines = re.findall(rf"^    .*?bridge ({commands}) (.*)$", README, re.MULTILINE)
    assert len(lines) >= 8
    for command, rest in lines:
        known, words = run(*command.split(), "--help"), rest.split()
        assert all(re.search(rf"{w.strip(';,')}\b", known) for w in words if w.startswith("--"))
    targets = re.findall(r"\bmake ([a-z]+)", README)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


# init


def test_init_makes_a_checkpoint_and_says_what_it_made(host, tmp_path):
    out = tmp_path / "a model"
    said = run("init", host, out, "--heads", 2, "--head-dim", 4, "--layers", "0-1")
    assert "2 attention blocks" in said
    assert f"Try: bridge generate '{out}'" in said
    opened = json.loads((out / "config.json").read_text())["bridge"]
    assert (opened["layers"], opened["num_heads"], opened["head_dim"]) == ([0, 1], 2, 4)
    sizes = (a.size for n, a in load_file(out / "model.safetensors").items() if ".bridge." in n)
    again = json.loads(run("init", host, tmp_path / "b", "--heads", 2, "--head-dim", 4, "--json"))
    assert again["bridge_parameters"] * 2 == sum(sizes) * 3  # three layers and two
    assert again["share"] == again["bridge_parameters"] / again["host_parameters"]


def test_init_of_an_adapter_runs_on_its_base(host, tmp_path):
    out = tmp_path / "adapter"
    run("init", host, out, "--kind", "mlp", "--heads", 1, "--head-dim", 4, "--adapter")
    plain = generate(host, "hello")
    assert generate(out, "hello")["prompts"] == plain["prompts"]  # fresh blocks are the identity
    host.rename(tmp_path / "moved")
    try:
        assert "--base" in refused("generate", out, "hello", *NUMPY)
        found = generate(out, "hello", "--base", tmp_path / "moved")
    finally:
        (tmp_path / "moved").rename(host)
    assert found["prompts"] == plain["prompts"]


def test_init_overwrites_nothing(host, model):
    before = (model / "model.safetensors").read_bytes()
    assert "exists already" in refused("init", host, model)
    assert (model / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--layers", "9"), "layers"),
        (("--layers", "x"), "layers"),
        (("--kind", "magic"), "kind"),
        (("--heads", "0"), "heads must be 1 or above"),
        (("--dtype", "int8"), "dtype"),
        (("--seed", "-1"), "seed"),
    ],
)
def test_init_refuses(host, tmp_path, options, named):
    assert named in refused("init", host, tmp_path / "new", *options)
    assert not list(tmp_path.iterdir())


# generate


def test_generate_is_the_library(model):
    said = generate(model, "hello", "--seed", 3, "--top-k", 50, "--vote")
    loaded = bridge.load(model, backend="numpy", dtype="float32")
    options = {"width": 3, "max_new_tokens": 5, "seed": 3, "top_k": 50, "chat": True}
    [answers] = loaded.generate("hello", **options)
    want = answers.to_json()
    vote = said["prompts"][0].pop("vote")
    assert said["prompts"] == [want]
    assert vote["total"] == 3
    settings = ("backend", "device", "dtype", "width", "seed", "top_k", "temperature", "chat")
    assert [said[name] for name in settings] == ["numpy", "cpu", "float32", 3, 3, 50, 1.0, True]
    assert said["timing"]["new_tokens"] == sum(len(r["tokens"]) for r in want["responses"])
    assert said["timing"]["prompt_tokens"] == len(want["prompt_tokens"])


def test_answers_in_a_pipe_are_plain_text(model):
    said = run("generate", model, "hello", "-n", 2, "--max-new-tokens", 4, "--vote", *NUMPY)
    assert "row 0 · 4 tokens · length" in said and "row 1 · 4 tokens · length" in said
    assert "no row gave an answer" in said or "majority answer" in said
    assert "prefill: " in said and "a row" in said
    assert "\x1b" not in said


def test_the_chat_template_is_used_unless_raw(model):
    def fed(*options):
        tokens = generate(model, "hi", *options)["prompts"][0]["prompt_tokens"]
        return bridge.load(model, backend="numpy").tokenizer.decode(tokens)

    assert fed() == "<user>hi\n<assistant>"
    assert fed("--system", "be brief") == "<system>be brief\n<user>hi\n<assistant>"
    assert fed("--raw") == "hi"


def prompts_of(model, *arguments, stdin=None):
    return [p["prompt"] for p in generate(model, *arguments, stdin=stdin)["prompts"]]


def test_prompts_come_from_arguments_files_and_standard_input(model, tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text("one\n\n two \r\n")
    records = tmp_path / "records.jsonl"
    turns = [{"role": "system", "content": "brief"}, {"role": "user", "content": "four"}]
    records.write_text(json.dumps({"prompt": "three"}) + "\n" + json.dumps({"messages": turns}))
    assert prompts_of(model, "a", "b") == ["a", "b"]
    assert prompts_of(model, "a", "--file", lines) == ["a", "one", " two "]
    assert prompts_of(model, "--file", records) == ["three", "four"]
    assert prompts_of(model, stdin="a question\nof two lines\n") == ["a question\nof two lines"]
    assert prompts_of(model, "a", "-", stdin="b\n") == ["a", "b"]
    assert prompts_of(model, "--file", "-", stdin="a\nb\n") == ["a", "b"]
    assert prompts_of(model, "--file", "-", stdin=records.read_text()) == ["three", "four"]


def test_messages_go_through_the_template(model, tmp_path):
    file = tmp_path / "chat.jsonl"
    turns = [{"role": r, "content": c} for r, c in (("user", "a"), ("bot", "b"), ("user", "c"))]
    file.write_text(json.dumps({"messages": turns}))
    [answers] = generate(model, "--file", file)["prompts"]
    tokenizer = bridge.load(model, backend="numpy").tokenizer
    assert tokenizer.decode(answers["prompt_tokens"]) == "<user>a\n<bot>b\n<user>c\n<assistant>"


def test_several_prompts_are_answered_as_they_would_be_alone(model):
    both = generate(model, "a", "b", "--temperature", 0)["prompts"]
    alone = [generate(model, p, "--temperature", 0)["prompts"][0] for p in ("a", "b")]
    assert both == alone
    said = run("generate", model, "a", "b", "-n", 2, "--max-new-tokens", 3, *NUMPY)
    assert said.index("prompt 1: a") < said.index("prompt 2: b") and said.count("row 0") == 2


def test_stop_ends_a_row_before_its_text(model):
    [answer] = generate(model, "hello", "-n", 1, "--temperature", 0, "--raw")["prompts"]
    whole = answer["responses"][0]["text"]
    stop = next(c for c in whole if c.isprintable() and c != "\ufffd")
    options = ("hello", "-n", 1, "--temperature", 0, "--raw", "--stop", stop)
    [stopped] = generate(model, *options)["prompts"][0]["responses"]
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == whole[: whole.index(stop)]


def test_hostile_words_of_a_prompt_do_not_reach_the_terminal(model):
    said = run("generate", model, "\x1b[2Ja", "[red]b", "-n", 1, "--max-new-tokens", 1, *NUMPY)
    assert "\x1b" not in said
    assert "prompt 1: ␛[2Ja" in said and "prompt 2: [red]b" in said


@pytest.mark.parametrize(
    ("arguments", "stdin", "named"),
    [
        (["hi", "--width", "0"], None, "width"),
        ([""], None, "empty"),
        ([" \n"], None, "empty"),
        ([], "", "standard input"),
        (["-", "-"], "a", "only once"),
        (["\udcff"], None, "UTF-8"),
        (["hi", "--backend", "nothing"], None, "backend 'nothing'"),
        (["hi", "--device", "cuda:9"], None, "device 'cuda:9'"),
        (["hi", "--dtype", "int3"], None, "dtype 'int3'"),
        (["hi", "--max-new-tokens", "0"], None, "max_new_tokens"),
        (["hi", "--max-new-tokens", "200000"], None, "past the context"),
        (["hi", "--temperature", "-1"], None, "temperature"),
        (["hi", "--top-k", "0"], None, "top_k"),
        (["hi", "--top-p", "1.5"], None, "top_p"),
        (["hi", "--min-p", "2"], None, "min_p"),
        (["hi", "--seed", "-1"], None, "seed"),
        (["hi", "--stop", ""], None, "stop"),
        (["hi", "--stop", "\udcff"], None, "stop must be text in UTF-8"),
        (["hi", "--base", "."], None, "no adapter"),
        (["hi", "--raw", "--system", "x"], None, "--raw"),
        (["--file", "nowhere.txt"], None, "nowhere.txt"),
        (["--file", "-"], '{"prompt": "a"}\n{"promt": "b"}', "line 2"),
        (["--file", "-"], '{"messages": []}', "line 1"),
        (["--file", "-", "--raw"], '{"messages": [{"role": "user", "content": "a"}]}', "--raw"),
        (["--file", "-"], '{"prompt": "\\ud800"}', "half a surrogate pair"),
    ],
)
def test_generate_refuses(model, arguments, stdin, named):
    options = [] if {"--backend", "--dtype"} & set(arguments) else NUMPY
    assert named in refused("generate", model, *arguments, *options, stdin=stdin)


def test_checkpoints_that_are_not_there_are_refused(tmp_path):
    assert "nowhere" in refused("generate", tmp_path / "nowhere", "hi")
    assert "nowhere" in refused("inspect", tmp_path / "nowhere")
    assert "nowhere" in refused("init", tmp_path / "nowhere", tmp_path / "new")
    assert "config.json" in refused("generate", tmp_path, "hi")
    assert "no␛[31mname x" in refused("inspect", tmp_path / "no\x1b[31mname\nx")


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    made = write_host(tmp_path / "host", eos=False)
    assert "eos" in refused("generate", made, "hi", *NUMPY)


def test_a_prompt_past_the_context_is_refused(tmp_path):
    made = write_host(tmp_path / "host", max_position_embeddings=32)
    assert "past the context of 32" in refused("generate", made, "x" * 40, *NUMPY)


def test_without_a_chat_template_prompts_are_raw(tmp_path):
    made = write_host(tmp_path / "host", chat=False)
    assert generate(made, "hi")["chat"] is False
    assert "no chat template" in refused("generate", made, "hi", "--system", "x", *NUMPY)
    stdin = '{"messages": [{"role": "user", "content": "a"}]}'
    assert "chat_template" in refused("generate", made, "--file", "-", *NUMPY, stdin=stdin)


def test_a_chat_template_that_fails_is_one_line(tmp_path):
    made = write_host(tmp_path / "host")
    settings = {"eos_token": "<eos>", "chat_template": "{{ 1 / 0 }}" + CHAT}
    (made / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "chat_template fails" in refused("generate", made, "hi", *NUMPY)


# inspect and backends


def test_inspect_shows_sizes_and_memory(model):
    said = run("inspect", model, "--width", 4, "--length", 100)
    for word in ("llama", "3 attention blocks of 2 x 4", "memory at width 4", "FFN", "spec 1.0"):
        assert word in said
    assert "model.layers.0.bridge.o_proj.weight" not in said
    assert "model.layers.0.bridge.o_proj.weight" in run("inspect", model, "--tensors")


def test_inspect_as_json(model):
    options = ("--json", "--width", 4, "--length", 100, "--prompt", 10, "--dtype", "bf16")
    said = json.loads(run("inspect", model, *options, "--tensors"))
    names = load_file(model / "model.safetensors")
    assert {n: t["shape"] for n, t in said["tensors"].items()} == {
        n: list(a.shape) for n, a in names.items()
    }
    memory = said["memory"]
    assert (memory["width"], memory["prompt"], memory["length"]) == (4, 10, 100)
    assert memory["total"] == sum(memory[k] for k in ("weights", "prompt_cache", "row_caches"))
    assert memory["weights"] == 2 * sum(a.size for a in names.values())
    assert said["share"] == said["bridge_parameters"] / said["host_parameters"]


def test_inspect_refuses(model):
    assert "length" in refused("inspect", model, "--length", "0")
    assert "dtype" in refused("inspect", model, "--dtype", "int8")


def test_backends_are_listed():
    said = {info["name"]: info for info in json.loads(run("backends", "--json"))}
    assert said["numpy"]["installed"] and said["numpy"]["devices"] == ["cpu"]
    assert "float64" in said["numpy"]["dtypes"]["cpu"]
    assert all(name in run("backends") for name in said)


def test_a_backend_that_does_not_work_says_what_mends_it(monkeypatch):
    mend = "try: pip install 'bridge-llm[torch]'"
    found = [bridge.BackendInfo("torch", installed=False, problem=mend)]
    monkeypatch.setattr("bridge.registry.backends", lambda: found)
    assert mend in run("backends")


def test_what_the_system_refuses_is_one_line(monkeypatch):
    def full():
        raise OSError(28, "No space left on device", "/full/file")

    monkeypatch.setattr("bridge.registry.backends", full)
    assert refused("backends") == "error: /full/file: No space left on device\n"


def test_our_own_bugs_are_not_hidden(monkeypatch):
    def broken():
        raise ZeroDivisionError

    monkeypatch.setattr("bridge.registry.backends", broken)
    assert isinstance(CliRunner(env=PLAIN).invoke(app, ["backends"]).exception, ZeroDivisionError)


# Terminals, signals and pipes, in processes of their own


def terminal(columns, lines):
    """Both ends of a terminal of that size."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    return ours, theirs


@contextmanager
def started(model, *arguments, **ends):
    """A `bridge generate` of its own, which is not left behind."""
    process = subprocess.Popen([*BRIDGE, "generate", str(model), *arguments], **ends)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def read_until(ours, pattern):
    """What a terminal was told, up to where it was told this; fails at its end, or where it is
    told nothing for minutes.

    A read ends where the writer happened to be, which may be within a character: decode what
    this and `read_all` return together, never one of them.
    """
    said = b""
    while not re.search(pattern, said):
        part = read_some(ours)
        assert part, said[-2000:]
        said += part
    return said


def read_all(ours):
    return b"".join(iter(lambda: read_some(ours), b""))


def read_some(ours):
    """What a terminal is told next; nothing at its end."""
    there, _, _ = select.select([ours], [], [], 300)  # bounds a hang, and nothing else
    assert there, "nothing more is said"
    try:
        return os.read(ours, 65536)
    except OSError:  # the other end is closed
        return b""


ENDLESS = ("--temperature", "0", "--max-new-tokens", "150000", *NUMPY)
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in PLAIN} | {"TERM": "xterm-256color"}


def test_ctrl_c_on_a_terminal_keeps_what_was_said(model):
    ours, theirs = terminal(120, 40)
    ends = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "env": ENVIRONMENT}
    with started(model, "hello", "-n", "3", *ENDLESS, **ends) as process:
        os.close(theirs)
        early = read_until(ours, "row 2 · [1-9]".encode())  # rows are some tokens in
        process.send_signal(signal.SIGINT)
        said = (early + read_all(ours)).decode()
        assert process.wait() == 130
    kept = said[said.rindex("row 0 ") :]  # after the view has gone
    assert all(f"row {n} " in kept for n in range(3)) and "running" in kept
    assert "Traceback" not in said and "error" not in said
    os.close(ours)


def test_ctrl_c_in_a_pipe_keeps_what_was_said(model):
    ours, theirs = terminal(80, 24)
    ends = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": theirs}
    with started(model, "hello", "-n", "2", *ENDLESS, **ends, env=ENVIRONMENT) as process:
        os.close(theirs)
        read_until(ours, "answers done · [1-9]".encode())  # the count on stderr
        process.send_signal(signal.SIGINT)
        with process.stdout:
            said = process.stdout.read().decode()
        read_all(ours)
        assert process.wait() == 130
    assert "row 0 · " in said and "row 1 · " in said and "\x1b" not in said
    os.close(ours)


def test_ctrl_c_leaves_no_half_json(model, monkeypatch):
    def interrupted(*arguments, **options):
        yield Started([5], 0.1)
        yield Token(0, 0, 7, "a")
        raise KeyboardInterrupt

    monkeypatch.setattr(bridge.Model, "stream", interrupted)
    assert run("generate", model, "hello", "--json", *NUMPY, code=130) == ""
    said = run("generate", model, "hello", "there", *NUMPY, code=130)
    assert "prompt 1 · row 0 · 1 token · running" in said and "row 1" not in said


def test_a_terminal_sees_the_view_and_then_the_answers(model):
    ours, theirs = terminal(200, 50)
    options = ("-n", "8", "--max-new-tokens", "20", "--temperature", "0", *NUMPY)
    ends = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "env": ENVIRONMENT}
    with started(model, "hello", *options, **ends) as process:
        os.close(theirs)
        said = read_all(ours).decode()
        assert process.wait() == 0
    assert "answers done" in said  # the view
    final = said[said.rindex("row 0 · ") :]
    assert all(f"row {n} · 20 tokens · " in final for n in range(8))
    assert "tokens/s over 8 rows" in final
    os.close(ours)


def test_a_reader_that_leaves_is_no_error(model):
    command = [*BRIDGE, "inspect", str(model), "--tensors"]
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    assert done.stderr == b"" and done.returncode == 1
