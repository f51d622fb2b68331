"""Tests of the tests: faults planted in a backend, one at a time, each of which must be caught.

The faults are `conformance/mutations`; each runs here against the one check that it names, on the
cases that profile `ci` draws. The same cases pass without a fault: test_conformance runs them, and
those of the first level are run here as faults are. Of JAX's faults, each of which is compiled
anew, a few run here and all by `python -m mutations`, or under HYPOTHESIS_PROFILE=thorough.
"""

import importlib
import os
import re
import sys
from pathlib import Path

import pytest

from bridge.checkpoints import reading, shards
from bridge_conformance.checks import CHECKS
from bridge_conformance.runner import PROFILES, WIDEST
from bridge_conformance.tolerance import DTYPES
from bridge_ref.losses import group_advantages
from mutations import FAULTS, harness
from mutations.fault import Edit, StaleFault, load_package, replaced, standing_in

ALL = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
JAX = [
    "jax: windows are counted from each prompt's first token",
    "jax: some layers of a stack are taken for its first ones",
    "jax: states are written where the last one lies",
    "jax: what float32 rounds to 0 is temperature 0",
]
NAMES = [n for n, f in FAULTS.items() if ALL or f.package != "bridge_jax" or n in JAX]
OWN = ("bridge", "bridge_ref")  # of no backend: torch stands in
USED = sorted(
    {
        ("bridge_torch" if f.package in OWN else f.package, f.check, f.dtype)
        for f in FAULTS.values()
        if f.check in CHECKS and f.package != "bridge_jax" and CHECKS[f.check].level == 1
    }
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", NAMES)
def test_a_planted_fault_is_caught(name):
    fault = FAULTS[name]
    assert harness.first_catch(fault) is not None, f"{fault.check} misses it: {fault.harm}"


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_fits_the_source(name):
    fault = FAULTS[name]
    for edit in fault.edits:
        package = Path(importlib.import_module(fault.package).__file__ or "").parent
        path = package / (
            edit.module if edit.module == "fused.c" else f"{edit.module.replace('.', '/')}.py"
        )
        assert replaced(path.read_text(), edit, path) != path.read_text()


@pytest.mark.parametrize("package,check,dtype", USED)
def test_without_a_fault_the_same_cases_pass(package, check, dtype):
    assert list(harness.failing(harness.backend_of(package), dtype, [CHECKS[check]])) == []


def test_the_cases_of_every_fault_are_run_without_it():
    """By test_conformance, which leaves out some checks in narrow dtypes."""
    for fault in FAULTS.values():
        if fault.check in CHECKS and fault.dtype not in WIDEST:
            assert CHECKS[fault.check].cases not in PROFILES["quick"].wide, fault.name


def test_right_advantages_meet_their_vector():
    assert harness.of_advantages(group_advantages) == []


def test_the_readme_lists_every_fault():
    assert sorted(harness.listed_faults()) == sorted(FAULTS)


def test_there_are_enough():
    assert len(FAULTS) >= 200
    for package in harness.BACKENDS:
        assert sum(fault.package == package for fault in FAULTS.values()) >= 20


def test_a_planted_fault_leaves_the_package_as_it_was():
    importlib.import_module("bridge_torch.backend")
    before = {name: sys.modules[name] for name in sys.modules if name.startswith("bridge_torch")}
    planted = FAULTS["groups are ignored"].plant()
    after = {name: sys.modules[name] for name in sys.modules if name.startswith("bridge_torch")}
    assert after == before
    assert planted["block"] is not before["bridge_torch.block"]
    assert planted["cache"].Grid is planted["block"].Grid  # of the copy, throughout


def test_a_fault_of_files_leaves_whoever_reads_them_as_they_were():
    holders = (shards, reading)
    before = [holder.find_tensors for holder in holders]
    with standing_in(FAULTS["a shard is dropped when it is read"].edits):
        during = {holder.find_tensors for holder in holders}
        assert len(during) == 1 and during.isdisjoint(before)
    assert [holder.find_tensors for holder in holders] == before


def test_a_fault_that_does_not_fit_the_source_is_an_error():
    with pytest.raises(StaleFault, match="0 places"):
        load_package("bridge_torch", [Edit("block", "no such text", "")])
    with pytest.raises(StaleFault, match="places for 'self'"):
        load_package("bridge_torch", [Edit("block", "self", "")])


def test_the_table_of_seeds_is_of_todays_checks():
    table = harness.README.read_text().partition("<!-- seeds -->")[2]
    passed = re.findall(r"(?m)^\| \d+ \| (\d+) \|", table.partition("<!-- end of seeds -->")[0])
    assert len(passed) == 20 and set(map(int, passed)) == {len(DTYPES) * len(CHECKS)}
