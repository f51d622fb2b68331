"""Every property of the contract, for every backend that is here, in every dtype (chapter 10).

The checks are `bridge_conformance`'s, run as `bridge conformance` runs them, a level a test; the
reference itself must pass them too. Narrow dtypes on JAX, where every case is compiled anew, run
profile `quick` here and `ci` by the command; long texts and lives run in narrow dtypes by the
command alone. HYPOTHESIS_PROFILE=thorough runs many cases.
"""

import os

# Test processes whose threads outnumber the cores wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

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


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: f"L{level}")
@pytest.mark.parametrize("backend,device,dtype", TARGETS)
def test_conformance(backend, device, dtype, level):
    brief = backend == "jax" and dtype in ("bfloat16", "float16")
    profile = "thorough" if THOROUGH else "quick" if brief else "ci"
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
