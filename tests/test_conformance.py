"""Every property of the contract, for every backend that is here, in every dtype (chapter 10).

The checks are `bridge_conformance`'s, run as `bridge conformance` runs them, a level a test; the
reference itself must pass them too. Profile `ci` of JAX, where every case is compiled anew, and of
the reference is among the slow tests, and `quick` here; in narrow dtypes JAX runs `ci` by the
command, and so do long texts, groups that come and lives on every backend.
HYPOTHESIS_PROFILE=thorough runs many cases.
"""

import os

import pytest
from rich.console import Console

from bridge.registry import backends
from bridge_conformance.card import card
from bridge_conformance.checks import CHECKS, LEVELS
from bridge_conformance.runner import PROFILES, WIDEST, run

TARGETS = [
    (info.name, device, dtype)
    for info in backends()
    for device in info.devices
    for dtype in info.dtypes[device]
]
THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"


def profiles(backend, dtype):
    """That of `make test` and that of `make test-slow`, if any."""
    if THOROUGH:
        return "thorough", None
    if backend == "jax" and dtype not in WIDEST:  # float16 is the same code as bfloat16
        return (None, "quick") if dtype == "float16" else ("quick", None)
    return ("quick", "ci") if backend in ("jax", "numpy") else ("ci", None)


def runs():
    for backend, device, dtype in TARGETS:
        for profile, marks in zip(profiles(backend, dtype), ([], [pytest.mark.slow]), strict=True):
            if profile:
                yield pytest.param(backend, device, dtype, profile, marks=marks)


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: f"L{level}")
@pytest.mark.parametrize("backend,device,dtype,profile", list(runs()))
def test_conformance(backend, device, dtype, profile, level):
    left_out = () if THOROUGH or dtype in WIDEST else PROFILES["quick"].wide
    report = run(
        backend,
        device=device,
        dtypes=[dtype],
        profile=profile,
        checks=[
            check.name
            for check in CHECKS.values()
            if check.level == level and check.cases not in left_out
        ],
        workers=1,
    )
    if not report.ok:
        console = Console(width=100, highlight=False)
        for part in card(report, str):
            console.print(part, soft_wrap=True)
    assert report.ok, report.failures[0].message if report.failures else "checks were skipped"
