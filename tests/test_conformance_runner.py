"""The runner of conformance: what it says of backends that fail, offer little, or crash.

The faulty backends are registered as a third party's are, by a package on the path of the command.
"""

import json
import os
import re
import signal
import subprocess
import sys

import jsonschema
import numpy as np
import pytest
from hypothesis.internal.conjecture import providers
from typer.testing import CliRunner

from bridge_cli.main import app
from bridge_conformance import checks, spec_files
from bridge_conformance.cases_given import KINDS
from bridge_conformance.cases_json import from_text, readable, to_text
from bridge_conformance.checks import CASES, CHECKS, LEVELS
from bridge_conformance.examine import draw
from bridge_conformance.results import EDGES, Failure, Outcome, bin_of
from bridge_conformance.runner import PROFILES, Progress, run
from bridge_ref.backend import Reference, ReferenceModel

BRIDGE = [sys.executable, "-m", "bridge_cli.main"]
FAULTY = '''
"""Backends with a fault each."""
import os
import time

from bridge_ref.backend import Reference, ReferenceModel


class Model(ReferenceModel):
    def block(self, layer, hidden, groups, active):
        out = super().block(layer, hidden, groups, active)
        return out * 1.01 if len(groups) > 1 and active.any() else out

    def prefill(self, *arguments, **options):
        raise RuntimeError("first line\\nno <b>cache</b> yet")

    def trainer(self, *arguments, **options):
        raise NotImplementedError("no training")


class Faulty(Reference):
    name = "faulty"
    model = Model

    def dtypes(self, device):
        return ["float32", "bfloat16"]

    def load(self, config, tensors, *, device, dtype):
        model = super().load(config, tensors, device=device, dtype=dtype)
        return self.model(model.config, model._tensors, dtype)


class CrashModel(ReferenceModel):
    def logits(self, *arguments):
        os._exit(7)


class Crash(Faulty):
    name = "crash"
    model = CrashModel


class SlowModel(ReferenceModel):
    def block(self, *arguments):
        time.sleep(0.2)
        return super().block(*arguments)


class Slow(Faulty):
    name = "slow"
    model = SlowModel
'''
POINTS = """[bridge.backends]
faulty = faulty_backends:Faulty
crash = faulty_backends:Crash
slow = faulty_backends:Slow
"""
NUMBER = {"anyOf": [{"type": "number"}, {"enum": ["inf", "-inf", "nan"]}]}
TEXT, COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}


def exactly(properties):
    names = list(properties)
    return {
        "type": "object",
        "required": names,
        "properties": properties,
        "additionalProperties": False,
    }


def list_of(items):
    return {"type": "array", "items": items}


def dict_of(items):
    return {"type": "object", "additionalProperties": items}


WORST = exactly(
    {
        "what": TEXT,
        "index": list_of(COUNT),
        **dict.fromkeys(("got", "want", "error", "ulps", "allowances"), NUMBER),
    }
)
OUTCOME = exactly(
    {
        "dtype": TEXT,
        "level": COUNT,
        "clause": TEXT,
        "check": TEXT,
        "status": {"enum": ["pass", "fail", "skip"]},
        "cases": COUNT,
        "worst": NUMBER,
        "seconds": {"type": "number"},
        "reason": {"type": ["string", "null"]},
    }
)
FAILURE = exactly(
    {
        **dict.fromkeys(
            ("dtype", "clause", "title", "check", "property", "message", "case", "command"), TEXT
        ),
        "level": COUNT,
        "shrunk": {"type": "boolean"},
        "worst": {"anyOf": [WORST, {"type": "null"}]},
    }
)
REPORT = exactly(
    {
        "schema": {"const": 1},
        "verdict": exactly(
            {
                "level": {"pattern": "^(none|L[1-6])$"},
                "asked": {"pattern": "^L[1-6]$"},
                "dtype": TEXT,
                "passed": {"type": "boolean"},
            }
        ),
        **dict.fromkeys(("backend", "device", "profile", "started"), TEXT),
        "dtypes": list_of(TEXT),
        "levels": dict_of(TEXT),
        "seed": {"type": "integer"},
        "versions": dict_of(TEXT),
        "seconds": {"type": "number"},
        "complete": {"type": "boolean"},
        "checks_alone": list_of(TEXT),
        "outcomes": list_of(OUTCOME),
        "failures": list_of(FAILURE),
        "errors": dict_of({**list_of(COUNT), "minItems": len(EDGES), "maxItems": len(EDGES)}),
        "worst_by_clause": dict_of(NUMBER),
        "edges": list_of(NUMBER),
    }
)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A directory to put on PYTHONPATH, with the faulty backends installed in it."""
    path = tmp_path_factory.mktemp("site")
    (path / "faulty_backends.py").write_text(FAULTY)
    info = path / "faulty_backends-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty-backends\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    return path


def environment(package):
    return {**os.environ, "PYTHONPATH": str(package), "COLUMNS": "100"}


def command(package, *arguments):
    return subprocess.run(
        [*BRIDGE, "conformance", *arguments],
        env=environment(package),
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def faulty(package, tmp_path_factory):
    """The run of the faulty backend by the command: its result, its JSON and its HTML."""
    where = tmp_path_factory.mktemp("reports")
    reports = (where / "faulty.json", where / "faulty.html")
    options = [part for path in reports for part in ("--report", str(path))]
    result = command(package, "--backend", "faulty", *options)
    return result, json.loads(reports[0].read_text()), reports[1].read_text()


def failure_of(report, check):
    return next(f for f in report["failures"] if f["check"] == check)


def test_a_fault_is_a_failure_with_clause_case_and_figures(faulty):
    result, report, _ = faulty
    assert result.returncode == 1, result.stderr
    failure = failure_of(report, "block_is_within_the_numerics_rule")
    assert (failure["clause"], failure["title"], failure["level"]) == ("3.6", "Output", 1)
    assert failure["shrunk"] and failure["dtype"] == "float32"
    rows = json.loads(failure["case"])["rows"]
    # The plainest that shows it.
    assert len(rows["groups"]) == 2 and rows["model"]["raw"]["num_hidden_layers"] == 1
    worst = failure["worst"]
    # The fault is a hundredth of the value.
    assert worst["got"] == pytest.approx(1.01 * worst["want"], rel=1e-5)
    assert worst["error"] == pytest.approx(abs(worst["got"] - worst["want"]), rel=1e-3)
    assert worst["ulps"] == pytest.approx(0.01 * 2**23, rel=0.1)
    assert worst["allowances"] > 1000
    for said in (failure["command"], "FAIL clause 3.6 Output", "also fails in bfloat16"):
        assert said in result.stdout


def test_the_command_of_a_failure_fails_again(faulty, package):
    failure = failure_of(faulty[1], "block_is_within_the_numerics_rule")
    line = failure["command"]
    assert line.startswith("bridge conformance --backend faulty --device cpu --dtype float32 ")
    line = line.replace("bridge", f"{sys.executable} -m bridge_cli.main", 1)
    again = subprocess.run(
        f"{line} --json", shell=True, env=environment(package), capture_output=True, text=True
    )
    assert again.returncode == 1, again.stderr
    (same,) = json.loads(again.stdout)["failures"]
    assert same["case"] == failure["case"] and same["worst"] == failure["worst"]
    assert same["command"] == failure["command"]


def test_an_exception_is_a_failure_and_what_is_not_offered_a_skip(faulty):
    result, report, _ = faulty
    message = failure_of(report, "cached_decoding_equals_teacher_forcing")["message"]
    assert message == "raises RuntimeError: no <b>cache</b> yet"
    training = [o for o in report["outcomes"] if o["level"] == 5 and o["dtype"] != "float16"]
    assert {o["status"] for o in training} == {"skip"}
    assert {o["reason"] for o in training} == {
        "not offered: NotImplementedError: no training",
        "not offered: dtypes() does not name float64",
    }
    assert "no training" in result.stdout and "does not name float64" in result.stdout
    passed = {o["status"] for o in report["outcomes"] if o["level"] in (2, 4, 6)}
    assert passed == {"pass", "skip"}
    assert report["verdict"]["level"] == "none"
    assert report["versions"]["faulty-backends"] == "1.0"


def test_the_json_has_its_schema(faulty):
    jsonschema.validate(faulty[1], REPORT)


def test_the_page_needs_nothing_else_and_escapes_what_it_shows(faulty):
    text = faulty[2]
    assert not re.search(r"https?:|src=|href=|url\(|@import|<script|<link|<img", text)
    assert "prefers-color-scheme: dark" in text and text.count("<figure>") == 2
    assert "no &lt;b&gt;cache&lt;/b&gt; yet" in text and "<b>cache" not in text
    assert "bridge conformance --backend faulty --device cpu --dtype float32 --check" in text


def test_a_crash_is_a_failure_of_the_checks_that_were_run(package):
    one = ("--check", "logits_are_within_the_numerics_rule")
    result = command(package, "--backend", "crash", "--dtype", "float32", *one, "--json")
    report = json.loads(result.stdout)
    assert result.returncode == 1
    failed = failure_of(report, "logits_are_within_the_numerics_rule")
    assert failed["message"].startswith("ends the process")


def test_ctrl_c_shows_what_was_found(package):
    process = subprocess.Popen(
        [*BRIDGE, "conformance", "--backend", "slow", "--level", "L1", "--workers", "1"],
        env=environment(package),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    while "examining: 0" in (line := process.stderr.readline()):
        pass
    assert line.startswith("examining: ")  # some are done
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "L1 the block" in out and "no verdict" in out and "Traceback" not in errors


class Nothing(Reference):
    """Offers no dtype."""

    name = "nothing"

    def dtypes(self, device):
        return []


class Refuses(Reference):
    """Offers float32, and then nothing in it."""

    name = "refuses"

    def dtypes(self, device):
        return ["float32"]

    def load(self, config, tensors, *, device, dtype):
        raise NotImplementedError("later")


@pytest.mark.parametrize("backend", (Nothing(), Refuses()), ids=lambda b: b.name)
def test_who_offers_nothing_does_not_pass(backend):
    report = run(backend)
    assert not report.ok and str(report.verdict) == "none" and not report.failures
    assert {o.status for o in report.outcomes} == {"skip"}
    assert len(report.outcomes) == 4 * len(CHECKS)


class Partial(Reference):
    """Lacks checkpoints of anything, and all dtypes but one."""

    name = "partial"

    def dtypes(self, device):
        return ["float32"]

    def load(self, config, tensors, *, device, dtype):
        model = super().load(config, tensors, device=device, dtype=dtype)
        return PartialModel(model.config, model._tensors, dtype)


class PartialModel(ReferenceModel):
    def prefill(self, *arguments, **options):
        raise NotImplementedError


def test_a_level_that_is_not_offered_is_not_passed():
    report = run(Partial(), level=3)
    assert str(report.verdict) == "L2" and not report.ok
    assert run(Partial(), level=2).ok


def test_the_same_seed_runs_the_same_cases():
    for level in LEVELS:
        first, again, other = (
            [readable(case) for case in draw(level, "float32", seed, 3)] for seed in (1, 1, 2)
        )
        assert first == again
        assert not set(first) & set(other)
        assert len(first) >= 3


@pytest.mark.parametrize("kind", checks.WORST)
def test_the_worst_cases_come_before_those_drawn_in_every_profile(kind):
    first, again, other = (draw(kind, "float32", seed, 2) for seed in (1, 1, 2))
    known = len(checks.WORST[kind])
    for drawn in (first, other):
        assert drawn[:known] == list(checks.WORST[kind]) and len(drawn) == known + 2
    texts = [[readable(case) for case in drawn[known:]] for drawn in (first, again, other)]
    assert texts[0] == texts[1] and not set(texts[0]) & set(texts[2])
    assert draw(kind, "float32", 1, 0) == list(checks.WORST[kind])


def test_quick_runs_the_worst_cases_in_the_widest_dtypes():
    def ran(dtypes, profile):
        report = run(
            Reference(), dtypes=dtypes, checks=["samplings_hold_at_their_ends"], profile=profile
        )
        assert report.ok
        return [outcome.dtype for outcome in report.outcomes]

    assert ran(["bfloat16", "float32", "float64"], "quick") == ["float32", "float64"]
    assert ran(["bfloat16"], "quick") == ["bfloat16"]
    assert ran(["bfloat16", "float32"], "ci") == ["bfloat16", "float32"]


def test_cases_do_not_depend_on_numbers_that_hypothesis_finds_in_modules(monkeypatch):
    def cases():
        return [readable(case) for case in draw(4, "float32", 0, 10)]

    before = cases()
    found = type(providers._local_constants)(integers=set(range(5000)))
    monkeypatch.setattr(providers, "_get_local_constants", lambda: found)
    providers.CONSTANTS_CACHE.cache.clear()
    assert cases() == before


def test_a_run_is_the_same_again():
    def facts():
        report = run(Partial(), level=2, seed=3)
        return [(o.check, o.status, o.cases, o.worst) for o in report.outcomes], report.errors

    assert facts() == facts()


@pytest.mark.parametrize("kind", CASES)
def test_cases_travel_as_text(kind):
    for case in draw(kind, "float16", 5, 4):
        text = to_text(case)
        again = from_text(text)
        assert readable(again) == readable(case) and "\n" not in text
        assert len(text) <= (2000 if kind == "trainable" else 1500)  # to be pasted
        arrays = getattr(case, "rows", case), getattr(again, "rows", again)
        for one, other in zip(*(a.model.tensors("float16").items() for a in arrays), strict=True):
            assert one[0] == other[0] and one[1].tobytes() == other[1].tobytes()
        if kind == "life":
            assert again.trainable == case.trainable and again.program == case.program
        if kind in (4, 5):
            assert again.trainable == case.trainable and again.objective == case.objective


def test_progress_counts_every_case():
    seen: list[Progress] = []
    run(Partial(), level=1, progress=seen.append)
    assert [p.done for p in seen] == list(range(seen[-1].total + 1))


def test_every_check_has_a_level_a_clause_of_the_spec_and_its_property_in_words():
    for check in CHECKS.values():
        assert check.level in LEVELS and check.clause in spec_files.titles()
        assert check.property.startswith(("Clause", "Chapter")) and check.property.endswith(".")
    assert {check.level for check in CHECKS.values()} == set(LEVELS)
    assert {check.cases for check in CHECKS.values()} == set(CASES) == set(KINDS)
    assert set(LEVELS) < set(CASES) and set(checks.WORST) == set(CASES) - set(LEVELS)
    assert all(set(profile.cases) == set(CASES) for profile in PROFILES.values())
    listed = CliRunner().invoke(app, ["conformance", "--list", "--json"])
    assert [item["check"] for item in json.loads(listed.stdout)] == list(CHECKS)


def test_errors_are_binned_by_what_they_are_of_the_allowance():
    assert bin_of(0.0) == 0 and EDGES[bin_of(0.9)] == 1.0 and EDGES[bin_of(1.1)] == np.inf
    assert bin_of(float("inf")) == bin_of(2.0) == len(EDGES) - 1


def test_figures_that_json_lacks_are_texts():
    report = run(Nothing())
    outcome = Outcome("float32", 1, "3.6", "x", "fail", 1, float("inf"), 0.0)
    report.outcomes = [outcome]
    report.failures = [
        Failure("float32", 1, "3.6", "", "x", "", "", "{}", True, "", {"ulps": "inf"})
    ]
    text = json.dumps(report.to_json(), allow_nan=False)
    assert json.loads(text)["outcomes"][0]["worst"] == "inf"
