"""How `bridge conformance` is used wrongly, and what it says before anything runs."""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from bridge.errors import BridgeError
from bridge_cli.main import app
from bridge_conformance.cases_json import from_text, readable
from bridge_conformance.checks import WORST


@pytest.mark.parametrize("text", ("", "{}", "z:", "z:AAAA", '{"is":"rows"}', "[1]", '{"is":"cow"}'))
def test_what_is_no_case_is_refused(text):
    with pytest.raises(BridgeError, match=r"^--case: is not a case .*copy it whole"):
        from_text(text)


def block_case(change=lambda case: None):
    """The text of a block case of two rows, once `change` has had it."""
    raw = {
        "model_type": "llama",
        "vocab_size": 8,
        "hidden_size": 4,
        "intermediate_size": 4,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "bridge": {"spec_version": "1.0", "kind": "mlp", "num_heads": 1, "head_dim": 2},
    }
    raw["bridge"] |= {"layers": [1], "norm_eps": 1e-6}
    rows = {
        "is": "rows",
        "model": {"raw": raw, "seed": 1, "magnitudes": "plain"},
        "tokens": [[1, 2], [3, 4]],
        "groups": [0, 0],
        "active": ["11", "01"],
        "positions": [[0, 1], [0, 0]],
    }
    case = {"is": "block", "rows": rows, "layer": 1, "seed": 2}
    change(case)
    return json.dumps(case)


def setting(path, value):
    """A change of one place of a case, such as `rows.model.seed`."""
    *outer, last = path.split(".")

    def change(case):
        for key in outer:
            case = case[key]
        case[last] = value

    return block_case(change)


BLOCK = "block_is_within_the_numerics_rule"
ENDS = "samplings_hold_at_their_ends"


def run_case(check, text):
    options = ("--backend", "numpy", "--dtype", "float32", "--check", check, "--case", text)
    return CliRunner().invoke(app, ["conformance", *options])


def test_a_case_of_ones_own_is_run():
    assert run_case(BLOCK, block_case()).exit_code == 0


@pytest.mark.parametrize(
    "path,value,message",
    [
        ("layer", 5, "layer: 5 is not one of 1"),
        ("layer", True, "layer: True is not a whole number"),
        ("seed", "x", "seed: 'x' is not a whole number of 0 or above"),
        ("seed", -3, "seed: -3 is not a whole number"),
        ("rows.model.seed", -3, "seed: -3 is not a whole number"),
        ("rows.model.magnitudes", "huge", "magnitudes: 'huge' is not one of plain"),
        ("rows.model.raw.model_type", "gpt", "is not supported (known: llama"),
        ("rows.model.raw.bridge", None, "raw: has no Bridge blocks"),
        ("rows.tokens", [[1, 8], [3, 4]], "tokens: 8 is not in 0..7"),
        ("rows.tokens", [[1, 1.5], [3, 4]], "tokens: is not whole numbers"),
        ("rows.positions", [[0, 64], [0, 0]], "positions: 64 is not in 0..63"),
        ("rows.groups", [0], "groups: is not whole numbers, [2] of them"),
        ("rows.active", [], "tokens: is not whole numbers"),
    ],
)
def test_a_case_that_is_never_drawn_is_not_blamed_on_the_backend(path, value, message):
    result = run_case(BLOCK, setting(path, value))
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert result.stderr.count("\n") == 1 and not result.stdout


def life_case(program):
    """The text of a life of which `program` is done."""
    case = json.loads(readable(WORST["life"][0]))
    return json.dumps(case | {"program": program})


COMING = "groups_that_come_are_answered_as_if_alone"


def coming_case(**changes):
    """The text of the worst case of groups that come, with changes."""
    return json.dumps(json.loads(readable(WORST["coming"][0])) | changes)


LIFE = "a_models_life_is_the_references"


def test_a_life_of_ones_own_is_run():
    program = [["save", 0, []], ["step", 0, []], ["restore", 0, []], ["read", 0, []]]
    assert run_case(LIFE, life_case(program)).exit_code == 0


@pytest.mark.parametrize(
    "program,message",
    [
        ([["dance", 0, []]], "program: 'dance' may not be number 0"),
        ([["advance", 0, []]], "'advance' may not be number 0"),
        ([["prefill", 0, [7]]], "'prefill' may not be number 0"),
        ([["prefill", 0, [0]], ["advance", 0, [3]]], "'advance' may not be number 1"),
        ([["prefill", 0, [0]], ["advance", 0, [1, 0]]], "'advance' may not be number 1"),
        ([["prefill", 0, [0]], ["step", 0, []], ["advance", 0, []]], "may not be number 2"),
        ([["save", 0, []], ["restore", 1, []]], "'restore' may not be number 1"),
        ([["step", 0.0, []]], "program: 0.0 is not a whole number"),
        ([["step", -1, []]], "program: -1 is not a whole number"),
    ],
)
def test_a_life_that_is_never_lived_is_refused(program, message):
    result = run_case(LIFE, life_case(program))
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert result.stderr.count("\n") == 1 and not result.stdout


@pytest.mark.parametrize(
    "check,text,message",
    [
        (LIFE, '{"is":"ends","vocab_size":8,"seed":0}', "is of the kind ends, but"),
        (ENDS, '{"is":"ends","vocab_size":7,"seed":0}', "7 is not a whole number of 8 or above"),
        (COMING, coming_case(waves=[[1, 7]]), "waves: do not hold 6 prompts in all"),
        (COMING, coming_case(waves=[[0, 6]]), "waves: 0 is not a whole number of 1 or above"),
        (COMING, coming_case(text=json.loads(block_case())), "text: is not of the kind decode"),
        (BLOCK, '{"is":"golden","name":"3.6-block"}', "is of the kind golden, but"),
        ("golden-3.6-block", block_case(), "golden-3.6-block takes golden"),
        ("golden-3.6-block", '{"is":"golden","name":"../x"}', "name: '../x' is not one of"),
        ("logits_are_within_the_numerics_rule", block_case(), "takes rows"),
        ("width_one_adds_the_rows_own_value", block_case(), "does not apply to this case"),
    ],
)
def test_a_case_of_another_check_is_refused(check, text, message):
    result = run_case(check, text)
    assert result.exit_code == 2 and message in result.stderr, result.output


def test_nothing_is_counted_twice():
    twice = [part for name in ("dtype", "check") for part in 2 * [f"--{name}", ONE_OF[name]]]
    result = CliRunner().invoke(app, ["conformance", "--backend", "numpy", *twice, "--json"])
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and len(report["outcomes"]) == 1
    assert report["dtypes"] == ["float32"] and report["checks_alone"] == ["golden-3.6-block"]


def test_a_level_lists_its_checks():
    listed = CliRunner().invoke(app, ["conformance", "--list", "--level", "L1", "--json"])
    assert {item["level"] for item in json.loads(listed.stdout)} == {"L1"}


@pytest.mark.parametrize(
    "arguments,message",
    [
        ((), "--backend is missing"),
        (("--list", "--backend", "nope"), "'nope' is not known"),
        (("--list", "--level", "L9"), "--level L9 is not known"),
        (("--list", "--profile", "slow"), "known: quick, ci, thorough"),
        (("--backend", "numpy", "--check", "x", "--level", "L1"), "--level goes without --check"),
        (("--backend", "numpy", "--report", f"{'x' * 250}.json"), "cannot be written"),
        pytest.param(
            ("--backend", "numpy", "--report", "/proc/x.json"),
            "/proc/x.json: cannot be written",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc"),
        ),
        (("--backend", "nope"), "'nope' is not known"),
        (("--backend", "numpy", "--profile", "slow"), "known: quick, ci, thorough"),
        (("--backend", "numpy", "--level", "L7"), "--level L7 is not known"),
        (("--backend", "numpy", "--dtype", "int8"), "dtype 'int8' is not known"),
        (("--backend", "numpy", "--device", "tpu"), "device 'tpu' is not there"),
        (("--backend", "numpy", "--check", "x"), "check 'x' is not known"),
        (("--backend", "numpy", "--case", "x"), "--case goes with one --check"),
        (("--backend", "numpy", "--workers", "0"), "workers must be 1 or above"),
        (("--backend", "numpy", "--report", "x.pdf"), "a report ends in .json or .html"),
        (("--backend", "numpy", "--report", "nowhere/x.json"), "no such directory"),
    ],
)
def test_wrong_usage_is_one_line(arguments, message):
    result = CliRunner().invoke(app, ["conformance", *arguments])
    assert result.exit_code == 2 and message in result.stderr
    assert len(result.stderr.splitlines()) == 1 and not result.stdout


ONE_OF = {"dtype": "float32", "check": "golden-3.6-block"}
ONE = ("--backend", "numpy", *(part for name in ONE_OF for part in (f"--{name}", ONE_OF[name])))


def test_a_report_is_replaced_only_with_force(tmp_path):
    path = tmp_path / "x.json"
    invoke = CliRunner().invoke
    assert invoke(app, ["conformance", *ONE, "--report", str(path)]).exit_code == 0
    before = path.read_bytes()
    refused = invoke(app, ["conformance", *ONE, "--report", str(path)])
    assert refused.exit_code == 2 and "exists already; --force replaces it" in refused.stderr
    assert path.read_bytes() == before
    assert invoke(app, ["conformance", *ONE, "--force", "--report", str(path)]).exit_code == 0
    assert os.listdir(tmp_path) == ["x.json"]
    for other in (tmp_path, tmp_path / "link.html"):
        if not other.exists():
            other.symlink_to(path)
        options = ["conformance", *ONE, "--force", "--report", str(other)]
        assert invoke(app, options).exit_code == 2


def test_without_hypothesis_it_says_what_to_install():
    code = "import sys; sys.modules['hypothesis'] = None; from bridge_cli.main import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, "conformance", *ONE], capture_output=True, text=True
    )
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "pip install 'bridge-llm[conformance]'" in result.stderr
