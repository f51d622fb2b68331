"""Runs faults, and the backend without any, through profile `ci`; and writes what comes of it.

A fault is examined on the cases that `bridge conformance --profile ci --seed 0` draws in the
fault's dtype, by every check, without shrinking: what catches it here catches it there. The
results stand in the README beside this package, between markers.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from bridge.contract import Backend
from bridge_conformance import spec_files
from bridge_conformance.checks import CHECKS, LEVELS, Check
from bridge_conformance.checks_golden import GoldenCase
from bridge_conformance.examine import Finding, draw, examine
from bridge_conformance.golden import Vector
from bridge_conformance.runner import PROFILES, run
from bridge_conformance.trial import Target
from mutations import FAULTS
from mutations.fault import Fault

README = Path(__file__).parent.parent / "README.md"
PROFILE, SEED = "ci", 0


@dataclass(frozen=True)
class Catch:
    """A check that caught a fault: on which of its cases, counted from 1, and what it said."""

    check: str
    cases: int
    message: str

    @property
    def refused(self) -> bool:
        """Whether the backend raised an error of its own, rather than gave a wrong result."""
        return self.message.startswith("raises ")


@cache
def cases_of(level: int, dtype: str) -> Sequence[Any]:
    """The cases that the profile draws for a level's checks."""
    return draw(level, dtype, SEED, PROFILES[PROFILE].cases[level])


def catches(fault: Fault, only: Sequence[str] | None = None) -> list[Catch]:
    """The checks (of all, or of `only`) that a backend with this fault fails, in their order."""
    modules = fault.plant()
    if fault.package == "bridge_ref":
        return _advantages(modules["losses"].group_advantages)
    found: dict[str, Catch] = {}
    checks = [CHECKS[name] for name in (CHECKS if only is None else only)]
    for check, number, finding in findings(modules["backend"].TorchBackend(), fault.dtype, checks):
        if finding.status == "fail":
            found.setdefault(check, Catch(check, number, finding.message))
    return [found[check.name] for check in checks if check.name in found]


def findings(
    backend: Backend, dtype: str, checks: Sequence[Check]
) -> Iterator[tuple[str, int, Finding]]:
    """What each check finds on each of the profile's cases; cases count from 1 for each check."""
    for level in LEVELS:
        here = [check for check in checks if check.level == level]
        drawn = [check for check in here if not check.golden]
        seen = dict.fromkeys((check.name for check in here), 0)
        jobs = [(drawn, case) for case in (cases_of(level, dtype) if drawn else ())]
        jobs += [([check], GoldenCase(check.golden)) for check in here if check.golden]
        for together, case in jobs:
            for finding in examine(Target(backend, "cpu", dtype), together, case):
                seen[finding.check] += 1
                yield finding.check, seen[finding.check], finding


def _advantages(group_advantages: Callable[..., np.ndarray]) -> list[Catch]:
    """Advantages are the training loop's, not a backend's: their golden vector holds them."""
    vector = Vector.read(spec_files.directory() / "golden" / "7.6-advantages.safetensors")
    rewards, groups = vector.inputs["rewards"], vector.inputs["groups"]
    got = group_advantages(rewards, groups)
    if np.allclose(got, vector.outputs["advantages"], rtol=2.0**-26, atol=0):
        return []
    return [Catch("golden vector 7.6-advantages", 1, f"advantages: {got}")]


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)  # two processes that each take every core wait for each other


def _of_fault(name: str) -> tuple[str, list[Catch]]:
    return name, catches(FAULTS[name])


def _of_seed(seed: int) -> tuple[int, dict[str, Any]]:
    from bridge_torch.backend import TorchBackend

    report = run(TorchBackend(), device="cpu", profile=PROFILE, seed=seed, workers=1)
    return seed, {
        "checks": sum(outcome.status == "pass" for outcome in report.outcomes),
        "cases": sum(outcome.cases for outcome in report.outcomes),
        "failures": [f"{f.check} in {f.dtype}: {f.message}" for f in report.failures],
    }


def run_all(work: Callable[[Any], tuple[Any, Any]], items: Sequence[Any], say: Callable) -> dict:
    """`work` on each item in two processes, results in the order of the items."""
    results = {}
    with ProcessPoolExecutor(2, get_context("spawn"), initializer=_one_thread) as pool:
        for future in as_completed([pool.submit(work, item) for item in items]):
            item, result = future.result()
            results[item] = result
            say(item, result)
    return {item: results[item] for item in items}


def run_faults(names: Sequence[str], say: Callable[[str, list[Catch]], None]) -> dict:
    """What catches each fault."""
    return run_all(_of_fault, names, say)


def run_seeds(count: int, say: Callable[[int, dict[str, Any]], None]) -> dict:
    """The backend as it is, under profile `ci` in every dtype, with seeds 0 to `count` - 1."""
    return run_all(_of_seed, range(count), say)


def fault_table(results: dict[str, list[Catch]]) -> str:
    """Markdown: a line a fault."""
    lines = [
        "| fault | what goes wrong | level | clause | dtype | caught by, on its n-th case |",
        "|---|---|---|---|---|---|",
    ]
    for name, caught in results.items():
        fault = FAULTS[name]
        level = f"L{CHECKS[fault.check].level}" if fault.check in CHECKS else "bridge"
        named = [c for c in caught if c.check == fault.check]
        others = sorted((c for c in caught if c.check != fault.check), key=lambda c: c.cases)
        by = ", ".join(
            f"`{c.check}` {c.cases}{' (refused)' if c.refused else ''}" for c in named + others[:1]
        )
        more = len(caught) - len(named + others[:1])
        by += f" and {more} more" if more > 0 else ""
        cells = (name, fault.harm, level, fault.clause, fault.dtype, by or "**nothing**")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def seed_table(results: dict[int, dict[str, Any]]) -> str:
    """Markdown: a line a seed."""
    lines = [
        "| seed | checks passed, over dtypes | cases compared | failures |",
        "|---|---|---|---|",
    ]
    for seed, result in results.items():
        failures = "<br>".join(result["failures"]) or "none"
        lines.append(f"| {seed} | {result['checks']} | {result['cases']} | {failures} |")
    return "\n".join(lines)


def write(marker: str, text: str) -> None:
    """Replace what stands in the README between the two comments of this name."""
    begin, end = f"<!-- {marker} -->", f"<!-- end of {marker} -->"
    before, found, rest = README.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{README}: no {begin} ... {end}")
    README.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def listed_faults() -> list[str]:
    """The faults that the README's table lists, in its order."""
    table = (
        README.read_text().partition("<!-- faults -->")[2].partition("<!-- end of faults -->")[0]
    )
    return [line.group(1) for line in re.finditer(r"(?m)^\| (.+?) \|", table)][1:]
