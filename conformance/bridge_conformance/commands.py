"""The command line that runs one check on one case again."""

import shlex

from bridge_conformance.checks import Check
from bridge_conformance.results import Report


def reproduce(report: Report, dtype: str, check: Check, case: str) -> str:
    """To be pasted into a shell: it fails as long as the backend does."""
    arguments = ["bridge", "conformance", "--backend", report.backend, "--device", report.device]
    arguments += ["--dtype", dtype, "--check", check.name]
    if not check.golden:
        arguments += ["--case", case]
    return shlex.join(arguments)
