"""Tests of the tests: faults planted in a backend, one at a time, each of which must be caught.

The faults are `conformance/mutations`; each runs here against the one check that it names, on the
cases that profile `ci` draws. The same cases must pass without a fault.
"""

import re
import sys

import pytest

import bridge.conversion
from bridge import checkpoint
from bridge_conformance import checks_checkpoint
from bridge_conformance.checks import CHECKS
from bridge_conformance.tolerance import DTYPES
from bridge_ref.losses import group_advantages
from bridge_torch.backend import TorchBackend
from mutations import FAULTS, harness
from mutations.fault import Edit, StaleFault, load_package, standing_in

# Other backends run the same cases in `test_conformance.py`.
OF_TORCH = ("bridge_torch", "bridge")
USED = sorted(
    {(f.check, f.dtype) for f in FAULTS.values() if f.check in CHECKS and f.package in OF_TORCH}
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name):
    fault = FAULTS[name]
    assert harness.first_catch(fault) is not None, f"{fault.check} misses it: {fault.harm}"


@pytest.mark.parametrize("check,dtype", USED)
def test_without_a_fault_the_same_cases_pass(check, dtype):
    assert list(harness.failing(TorchBackend(), dtype, [CHECKS[check]])) == []


def test_right_advantages_meet_their_vector():
    assert harness.of_advantages(group_advantages) == []


def test_the_readme_lists_every_fault():
    assert sorted(harness.listed_faults()) == sorted(FAULTS)


def test_there_are_enough():
    assert len(FAULTS) >= 60


def test_a_planted_fault_leaves_the_package_as_it_was():
    before = {name: sys.modules[name] for name in sys.modules if name.startswith("bridge_torch")}
    planted = FAULTS["groups are ignored"].plant()
    after = {name: sys.modules[name] for name in sys.modules if name.startswith("bridge_torch")}
    assert after == before
    assert planted["block"] is not before["bridge_torch.block"]
    assert planted["decode"].Grid is planted["block"].Grid  # of the copy, throughout


def test_a_fault_of_files_leaves_whoever_reads_them_as_they_were():
    holders = (checkpoint, bridge.conversion, checks_checkpoint)
    before = [holder.open_checkpoint for holder in holders]
    with standing_in(FAULTS["a shard is dropped when it is read"].edits):
        during = {holder.open_checkpoint for holder in holders}
        assert len(during) == 1 and during.isdisjoint(before)
    assert [holder.open_checkpoint for holder in holders] == before


def test_a_fault_that_does_not_fit_the_source_is_an_error():
    with pytest.raises(StaleFault, match="0 places"):
        load_package("bridge_torch", [Edit("block", "no such text", "")])
    with pytest.raises(StaleFault, match="places for 'self'"):
        load_package("bridge_torch", [Edit("block", "self", "")])


def test_the_table_of_seeds_is_of_todays_checks():
    table = harness.README.read_text().partition("<!-- seeds -->")[2]
    passed = re.findall(r"(?m)^\| \d+ \| (\d+) \|", table.partition("<!-- end of seeds -->")[0])
    assert len(passed) == 20 and set(map(int, passed)) == {len(DTYPES) * len(CHECKS)}
