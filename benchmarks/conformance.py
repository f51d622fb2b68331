"""How long conformance takes, by backend and profile, processes' start included.

    python benchmarks/conformance.py [--backend torch] [--profile quick]

Runs `bridge conformance` as a user would, one run at a time, and keeps what each reports. Asked of
two cores: 60 seconds for `quick` and four minutes for `ci`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from record import RESULTS, record

from bridge_cli.machine import processor

BACKENDS = ("numpy", "torch", "jax", "mlx")
PROFILES = ("quick", "ci")


def timed(backend: str, profile: str) -> dict[str, Any]:
    """One run: its seconds by the clock on the wall, and what it says of itself."""
    command = [Path(sys.executable).parent / "bridge", "conformance", "--json"]
    start = time.perf_counter()
    done = subprocess.run(
        [*command, "--backend", backend, "--profile", profile],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - start
    report = json.loads(done.stdout)
    passed = [outcome for outcome in report["outcomes"] if outcome["status"] == "pass"]
    return {
        "backend": backend,
        "profile": profile,
        "seconds": seconds,
        "passed": report["verdict"]["passed"],
        "level": report["verdict"]["level"],
        "dtypes": list(dict.fromkeys(outcome["dtype"] for outcome in passed)),
        "checks_passed": len(passed),
        "cases": sum(outcome["cases"] for outcome in passed),
        "versions": report["versions"],
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="repeatable; else all")
    parser.add_argument("--profile", action="append", choices=PROFILES, help="repeatable; else all")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    runs = []
    for profile in options.profile or PROFILES:
        for backend in options.backend or BACKENDS:
            run = timed(backend, profile)
            print(
                f"{profile:6} {backend:6} {run['seconds']:6.1f} s, {run['checks_passed']} checks "
                f"passed on {run['cases']} cases in {len(run['dtypes'])} dtypes, {run['level']}",
                flush=True,
            )
            runs.append(run)
    where = {"device": processor(), "cores": os.cpu_count()}
    record({"machine": where, "runs": runs}, "conformance", options.out)


if __name__ == "__main__":
    main()
