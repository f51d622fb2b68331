"""Hostile checkpoints: whatever the files say, a correct load or one line of ours, nothing else.

The bulk runs in processes of their own, whose memory is limited and whose death is an outcome. What
an input must not do is told in tests/fuzz/trial.py. More: `python -m tests.fuzz --help`.
"""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from fuzz.mutate import mutant
from fuzz.run import from_recipe, to_recipe
from fuzz.seeds import Link, Special, seeds
from fuzz.trial import Workspace, bases
from fuzz.watch import misdeeds, watched
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from bridge import convert
from bridge.checkpoints.reading import open_checkpoint
from bridge.errors import BridgeError
from bridge_cli.main import app

ROOT = Path(__file__).resolve().parent.parent
CORPUS = sorted((Path(__file__).parent / "fuzz" / "corpus").glob("*.json"))
INPUTS, PARTS = 3_500, 6  # in each part, and parts, of which make test runs the first


@pytest.fixture(scope="module")
def spaces(tmp_path_factory) -> dict[str, Workspace]:
    """A directory for each seed checkpoint."""
    root = tmp_path_factory.mktemp("fuzz")
    return {name: Workspace(root / name, tree) for name, tree in seeds().items()}


@pytest.mark.parametrize(
    "part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, PARTS))]
)
def test_damaged_checkpoints_load_correctly_or_get_one_line(part, tmp_path):
    note, count = tmp_path / "note", INPUTS
    note.touch()
    numbers = ("--seed", "0", "--start", str(part * count), "--inputs", str(count))
    command = (sys.executable, "-m", "tests.fuzz", "--quiet", "--note", str(note), *numbers)
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    if not ran.stdout:
        pytest.fail(f"input {note.read_text()} ended the process ({ran.returncode}): {ran.stderr}")
    tally = json.loads(ran.stdout)
    assert tally["faults"] == []
    assert sum(tally["outcomes"].values()) == count
    # Damage must neither always be refused at the first look, nor mostly do nothing.
    assert 0.02 * count < tally["outcomes"]["load"] < 0.5 * count


@pytest.mark.parametrize("name", seeds())
def test_every_seed_loads(spaces, name):
    assert spaces[name].attempt({}).kind == "load"
    assert spaces[name].attempt({}, headers_only=True).kind == "load"


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_what_once_found_a_fault(spaces, path):
    recipe = json.loads(path.read_text())
    outcome = spaces[recipe["seed"]].attempt(from_recipe(recipe))
    assert outcome.kind == recipe["expect"], outcome.said
    if outcome.kind == "error":
        assert re.search(recipe["says"], outcome.said), outcome.said


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(st.characters(categories=["Cs", "Cc", "L", "N", "P", "Z"]), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
documents = [(n, p) for n, tree in seeds().items() for p in tree if p.endswith(".json")]


@settings(max_examples=20 * settings().max_examples)
@given(data=st.data())
def test_any_json_value_anywhere(spaces, data):
    name, path = data.draw(st.sampled_from(documents))
    entry = seeds()[name][path]
    assert isinstance(entry, bytes)
    root = {"": json.loads(entry)}
    node, key = root, ""
    while isinstance(node[key], dict | list) and node[key] and data.draw(st.integers(0, 3)):
        node = node[key]
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = data.draw(st.sampled_from(keys))
    node[key] = data.draw(json_values)
    outcome = spaces[name].attempt({path: json.dumps(root[""]).encode()})
    assert outcome.kind != "fault", outcome.said


@pytest.mark.parametrize("to", ["torch", "jax", "mlx"])
def test_conversion_of_damaged_checkpoints_is_whole_or_nothing(to, spaces, tmp_path):
    names, target = list(spaces), tmp_path / "made"
    codes = Counter()
    for number in range(100):
        name = names[number % len(names)]
        space, changes = spaces[name], mutant(name, 1, number)
        with space.changed(changes) as source, watched() as seen:
            ran = CliRunner().invoke(app, ["convert", str(source), str(target), "--to", to])
            allowed = (source, tmp_path, target, *bases(source))
        codes[ran.exit_code] += 1
        recipe = to_recipe(name, changes)
        reads = [event for event in seen if event.startswith("read ")]
        assert misdeeds(reads, allowed) == [], recipe
        if ran.exit_code == 0:
            assert open_checkpoint(target).form == to
            shutil.rmtree(target)
        else:
            assert ran.exit_code == 2, (ran.exception, recipe)
            assert re.fullmatch("error: [^\n]+\n", ran.stderr), (ran.stderr, recipe)
        assert list(tmp_path.iterdir()) == [], recipe
    assert codes[2] > codes[0] > 5


def test_conversion_copies_nothing_from_outside(spaces, tmp_path):
    secret = {"model/chat_template.jinja": Link("../outside/secret.txt")}
    with (
        spaces["torch"].changed(secret) as source,
        pytest.raises(BridgeError, match="link to outside"),
    ):
        convert(source, tmp_path / "made", "torch")
    assert list(tmp_path.iterdir()) == []


def test_a_fault_is_seen(spaces, monkeypatch):
    """The watch itself: reading outside, writing, hanging, taking memory, saying two lines."""
    space = spaces["torch"]
    outside = space.root / "outside" / "secret.txt"

    def two_lines(path, **_):
        raise BridgeError(f"{path}: one\ntwo")

    def nameless(path, **_):
        raise BridgeError("something is wrong")

    def out_of_memory(path, **_):
        raise MemoryError

    deeds = {
        "secret.txt": lambda path, **_: outside.read_bytes(),
        "write": lambda path, **_: (path / "new").write_bytes(b""),
        "fifo": lambda path, **_: (path / "pipe").read_bytes(),
        "printable": two_lines,
        "names no file": nameless,
        "MemoryError": out_of_memory,
    }
    for said, deed in deeds.items():
        monkeypatch.setattr("fuzz.trial.open_checkpoint", deed)
        changes = {"model/pipe": Special("fifo"), "model/new": Link("gone")}
        outcome = space.attempt(changes if said == "fifo" else {"model/new": Special("absent")})
        assert outcome.kind == "fault", said
        assert said in outcome.said or said == "fifo"
