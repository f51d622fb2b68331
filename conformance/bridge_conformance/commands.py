"""The command line that runs one check on one case again."""

import shlex

from bridge_conformance.checks import Check
from bridge_conformance.results import Report
from bridge_conformance.tolerance import DTYPES


def reproduce(report: Report, dtype: str, check: Check, case: str) -> str:
    """To be pasted into a shell: it fails as long as the backend does."""
    arguments = ["bridge", "conformance", "--backend", report.backend, "--device", report.device]
    arguments += ["--dtype", dtype, "--check", check.name]
    if not check.golden:
        arguments += ["--case", case]
    return shlex.join(arguments)


def again(report: Report) -> str:
    """The command that makes the same run."""
    arguments = ["bridge", "conformance", "--backend", report.backend, "--device", report.device]
    if set(report.dtypes) != set(DTYPES):
        arguments += [part for dtype in report.dtypes for part in ("--dtype", dtype)]
    arguments += ["--profile", report.profile, "--seed", str(report.seed)]
    for name in report.checks_alone:
        arguments += ["--check", name]
    if not report.checks_alone:
        arguments += ["--level", f"L{max(report.levels)}"]
    return shlex.join(arguments)
