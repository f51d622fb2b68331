"""The example for porters: installed like a third party's backend, it passes conformance unchanged.

Everything runs in processes of its own, which alone see where the package was installed. What
`docs/porting.md` says is tested too: its Python runs, and what it names is there.
"""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from bridge_cli.main import app
from bridge_conformance.checks import CHECKS

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "bridge_example_backend"
PORTING = (ROOT / "docs" / "porting.md").read_text(encoding="utf-8")
CLAUSES = re.findall(r"^### (\d+\.\d+) ", (ROOT / "spec" / "bridge-1.0.md").read_text(), re.M)

# What a port may read of ours: the contract and the parts that are the same for every framework.
SHARED = {
    f"bridge.{name}"
    for name in (
        *("config", "contract", "errors", "philox", "rope"),
        *("decoding.inputs", "decoding.rows", "decoding.uniforms"),
    )
}

# One check, on the same examples each time. `FAULT` is code that breaks the backend first.
EXAMINE = """
import os
from hypothesis import Phase, given, settings, strategies as st
from bridge.registry import find_backend
from bridge_conformance.checks import CASES, CHECKS
from bridge_conformance.trial import Target

exec(os.environ["FAULT"])
check = CHECKS[os.environ["CHECK"]]
target = Target(find_backend("example"), "cpu", "float32", check.clause)

@settings(max_examples=20, phases=[Phase.generate], derandomize=True, database=None, deadline=None)
@given(st.data())
def run(data):
    check.run(target, data.draw(CASES[check.cases].filter(check.applies)))

run()
"""

# By name: code that plants the fault, and the check that must then fail.
FAULTS = {
    "a mask by product lets NaN through": (
        "import bridge_example.block as m\nm.where = lambda mask, x: x * mask.astype('float32')",
        "blocked_rows_have_no_influence_on_the_block",
    ),
    "groups are ignored": (
        "import bridge_example.model as m\ngrid = m.Grid\nm.Grid = lambda groups: grid(groups * 0)",
        "other_groups_have_no_influence",
    ),
    "caches stay where they were": (
        "from bridge_example.decode import Decoder as D\n"
        "compact = D._compact\n"
        "def wrong(self, rows):\n"
        "    own = self.own\n"
        "    compact(self, rows)\n"
        "    self.own = [cache[:, : len(rows)] for cache in own]\n"
        "D._compact = wrong",
        "cached_decoding_equals_teacher_forcing",
    ),
    "rows are numbered anew when others end": (
        "from dataclasses import replace\n"
        "from bridge_example.decode import Decoder as D\n"
        "compact = D._compact\n"
        "def wrong(self, rows):\n"
        "    compact(self, rows)\n"
        "    self.rows = replace(self.rows, row_ids=self.rows.row_ids * 0)\n"
        "D._compact = wrong",
        "sampled_tokens_follow_the_rule",
    ),
    "rows of all groups are as far as the first": (
        "import numpy as np\n"
        "from dataclasses import replace\n"
        "from bridge_example.decode import Decoder as D\n"
        "forward = D._forward\n"
        "def wrong(self, tokens):\n"
        "    rows = self.rows\n"
        "    steps = rows.steps[np.unique(rows.group, return_index=True)[1]]\n"
        "    self.rows = replace(rows, lengths=rows.lengths + steps[0] - steps)\n"
        "    logits, self.rows = forward(self, tokens), rows\n"
        "    return logits\n"
        "D._forward = wrong",
        "groups_that_come_are_answered_as_if_alone",
    ),
    "a group that comes is put in place of another": (
        "from bridge_example.decode import Decoder as D\n"
        "admit = D.admit\n"
        "def wrong(self, *arguments, **options):\n"
        "    admit(self, *arguments, **options)\n"
        "    self.prefix[0] = self.prefix[-1]\n"
        "D.admit = wrong",
        "groups_that_come_are_answered_as_if_alone",
    ),
    "every row draws by the first one's settings": (
        "import bridge_example.decode as m\n"
        "first = lambda s: s if isinstance(s, m.Sampling) else s[0]\n"
        "m.alike = lambda sampling: [(first(sampling), None)]",
        "rows_draw_by_settings_of_their_own",
    ),
    "a draw is fed to whoever stands in its place": (
        "import numpy as np\n"
        "from bridge_example.decode import Decoder as D\n"
        "admit = D.admit\n"
        "def wrong(self, *arguments, **options):\n"
        "    drawn = self.drawn\n"
        "    admit(self, *arguments, **options)\n"
        "    self.drawn = None if drawn is None else np.resize(drawn, (len(self.rows), 1))\n"
        "D.admit = wrong",
        "what_may_not_come_is_refused",
    ),
    "no gradient crosses rows": (
        "import bridge_example.block as m\n"
        "mix = m.mix\n"
        "m.mix = lambda q, k, v, *rest: mix(q, m.Var(k.value), m.Var(v.value), *rest)",
        "loss_and_gradients_are_within_the_numerics_rule",
    ),
    "each batch is divided by its own targets": (
        "import bridge_example.train as m\n"
        "loss = m.loss\n"
        "m.loss = lambda logits, batch, objective, count: loss(logits, batch, objective)",
        "accumulated_batches_are_one_update",
    ),
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A fresh directory with the example in it, and nothing else."""
    target = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", target]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, EXAMPLE], check=True)
    return target


def python(site: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """What a Python process prints that has `site` on its path."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**kept, "PYTHONPATH": str(site), **variables}
    command = [sys.executable, "-W", "error::RuntimeWarning", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_it_registers_itself(installed):
    code = "import bridge; print([i.name for i in bridge.backends() if i.dtypes], bridge.__file__)"
    listed = python(installed, "-c", code).stdout
    assert "'example'" in listed and str(installed) not in listed


def test_it_is_written_against_the_contract_alone(installed):
    files = sorted((installed / "bridge_example").glob("*.py"))
    names = {file.stem for file in files}
    assert names > {"backend", "block", "model", "decode", "sampling", "train"}
    imported = set()
    for node in (node for f in files for node in ast.walk(ast.parse(f.read_text("utf-8")))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    own = {f"bridge_example.{name}" for name in names}
    foreign = {name for name in imported if name.partition(".")[0] not in sys.stdlib_module_names}
    assert foreign - own - SHARED == {"numpy"}

    code = "import sys, bridge_example.backend; print(*sys.modules)"
    loaded = python(installed, "-c", code).stdout.split()
    assert "bridge_example.train" in loaded
    assert not {"bridge_ref", "bridge_conformance", "torch", "jax", "mlx"} & set(loaded)


@pytest.mark.parametrize("profile", ["quick", pytest.param("ci", marks=pytest.mark.slow)])
def test_it_passes_conformance_unchanged(installed, profile):
    """All six levels, as `bridge conformance` runs them on anybody's backend."""
    options = ("--backend", "example", "--profile", profile, "--json")
    result = python(installed, "-m", "bridge_cli.main", "conformance", *options)
    assert result.returncode == 0, result.stderr or result.stdout[-3000:]
    report = json.loads(result.stdout)
    assert report["verdict"] == {"level": "L6", "asked": "L6", "dtype": "float32", "passed": True}
    outcomes = {o["check"]: o for o in report["outcomes"] if o["dtype"] == "float32"}
    assert outcomes.keys() == CHECKS.keys()
    assert all(o["status"] == "pass" and o["cases"] > 0 for o in outcomes.values())
    assert {o["status"] for o in report["outcomes"] if o["dtype"] != "float32"} == {"skip"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_planted_in_it_is_caught(installed, fault):
    code, check = FAULTS[fault]
    result = python(installed, "-c", EXAMINE, FAULT=code, CHECK=check)
    assert result.returncode == 1
    assert f"Nonconformance: clause {CHECKS[check].clause}, backend example on cpu" in result.stderr


def test_without_a_fault_the_same_check_passes(installed):
    check = "accumulated_batches_are_one_update"
    result = python(installed, "-c", EXAMINE, FAULT="", CHECK=check)
    assert result.returncode == 0, result.stderr


def test_the_python_of_the_guide_runs(installed):
    blocks = re.findall(r"^```python\n(.*?)^```", PORTING, re.M | re.S)
    assert blocks
    result = python(installed, "-c", "\n".join(blocks))
    assert result.returncode == 0, result.stderr


def test_what_the_guide_names_is_there():
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PORTING)
    local = [link for link in links if not link.startswith("https://")]
    assert local and [link for link in local if not (ROOT / "docs" / link).exists()] == []
    anchors = set(re.findall(r"\]\(#([^)]+)\)", PORTING))
    headings = re.findall(r"^## (.+)$", PORTING, re.M)
    assert anchors == {heading.lower().replace(" ", "-") for heading in headings}
    pairs = re.findall(r"[Cc]lauses? (\d+\.\d+)(?: (?:and|to) (\d+\.\d+))?", PORTING)
    cited = {clause for pair in pairs for clause in pair if clause}
    assert cited and cited <= set(CLAUSES)
    named = set(re.findall(r"→ `(\w+)`", PORTING))
    assert named and named <= CHECKS.keys()


def test_the_commands_of_the_guide_are_there():
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    used = re.findall(r"^    bridge (\S+)(.*)$", PORTING, re.M)
    used += re.findall(r"`bridge ([a-z]+)([^`]*)`", PORTING)
    assert {"backends", "conformance", "generate"} <= {name for name, _ in used}
    for name, rest in used:
        options = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= options, name
