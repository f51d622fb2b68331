"""Runs faults, and the backend without any, through profile `ci`; and writes what comes of it.

A fault is examined on the cases that `bridge conformance --profile ci --seed 0` draws in the
fault's dtype, by every check that takes the same kind of cases as the one it names, without
shrinking: what catches it here catches it there. The results stand in
`conformance/README.md`, between markers.
"""

import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from bridge.contract import Backend
from bridge_conformance import spec_files
from bridge_conformance.checks import CHECKS, Check
from bridge_conformance.checks_golden import GoldenCase
from bridge_conformance.examine import draw, examine
from bridge_conformance.golden import Vector
from bridge_conformance.runner import PROFILES, run
from bridge_conformance.trial import Target
from mutations import FAULTS
from mutations.fault import Fault, standing_in

README = Path(__file__).parent.parent / "README.md"
PROFILE, SEED = "ci", 0
BACKENDS = {
    "bridge_torch": "TorchBackend",
    "bridge_jax": "JaxBackend",
    "bridge_mlx": "MlxBackend",
}


@dataclass(frozen=True)
class Catch:
    """A check that caught a fault, on the n-th case of the profile, and what it said."""

    check: str
    number: int
    message: str

    @property
    def refused(self) -> bool:
        """Whether the backend raised an error of its own, rather than gave a wrong result."""
        return self.message.startswith("raises ")


@cache
def cases_of(kind: int | str, dtype: str) -> Sequence[Any]:
    """The cases of a kind that the profile draws."""
    return draw(kind, dtype, SEED, PROFILES[PROFILE].cases[kind])


def catches(fault: Fault) -> list[Catch]:
    """The checks on the named one's kind of cases that a backend with this fault fails."""
    if fault.check not in CHECKS:
        return list(_of(fault, []))
    kind = CHECKS[fault.check].cases
    return list(_of(fault, [check for check in CHECKS.values() if check.cases == kind]))


def first_catch(fault: Fault) -> Catch | None:
    """Where the check that the fault names catches it first; None where it does not."""
    named = [CHECKS[fault.check]] if fault.check in CHECKS else []
    with closing(_of(fault, named)) as caught:
        return next(caught, None)


def _of(fault: Fault, checks: Sequence[Check]) -> Generator[Catch]:
    if fault.package == "bridge":
        backend = backend_of(fault.through)  # first: what is imported within would keep the fault
        with standing_in(fault.edits):
            yield from failing(backend, fault.dtype, checks)
        return
    modules = fault.plant()
    if fault.check not in CHECKS:
        yield from of_advantages(modules["losses"].group_advantages)
    else:
        yield from failing(backend_of(fault.package, modules), fault.dtype, checks)


def backend_of(package: str, modules: Mapping[str, Any] | None = None) -> Backend:
    """The backend of a package: of these modules of it, or else as it is."""
    module = import_module(f"{package}.backend") if modules is None else modules["backend"]
    return getattr(module, BACKENDS.get(package, "Reference"))()


def failing(backend: Backend, dtype: str, checks: Sequence[Check]) -> Iterator[Catch]:
    """Each check that fails on a case of the profile, with the first on which it does."""
    target = Target(backend, "cpu", dtype)
    for kind in dict.fromkeys(check.cases for check in checks):
        left = [check for check in checks if check.cases == kind and not check.golden]
        for number, case in enumerate(cases_of(kind, dtype) if left else (), 1):
            failed = [f for f in examine(target, left, case) if f.status == "fail"]
            yield from (Catch(finding.check, number, finding.message) for finding in failed)
            left = [check for check in left if check.name not in {f.check for f in failed}]
    for check in checks:
        if check.golden:
            for finding in examine(target, [check], GoldenCase(check.golden)):
                if finding.status == "fail":
                    yield Catch(check.name, 1, finding.message)


def of_advantages(group_advantages: Callable[..., np.ndarray]) -> list[Catch]:
    """Advantages are the training loop's, not a backend's: their golden vectors hold them."""
    caught = []
    for path in sorted((spec_files.directory() / "golden").glob("7.6-advantages*.safetensors")):
        vector, message = Vector.read(path), ""
        rewards, groups = vector.inputs["rewards"], vector.inputs["groups"]
        for name, want in vector.outputs.items():
            try:
                with np.errstate(all="ignore"):
                    got = group_advantages(rewards, groups, name == "advantages")
            except Exception as error:
                message = message or f"raises {error}"
                continue
            # Advantages are near 1, or 0 exactly; of what is only centred all have one grid.
            grid = 2.0**-28 * np.abs(want).max() if name == "centred" else 0.0
            if not np.allclose(got, want, rtol=2.0**-26, atol=grid):
                message = message or f"{name}: {got}"
        if message:
            caught.append(Catch(f"golden vector {path.stem}", 1, message))
    return caught


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)  # two processes that each take every core wait for each other


def _of_fault(name: str) -> tuple[str, list[Catch]]:
    return name, catches(FAULTS[name])


def _of_seed(seed: int) -> tuple[int, dict[str, Any]]:
    report = run(backend_of("bridge_torch"), device="cpu", profile=PROFILE, seed=seed, workers=1)
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
        "| fault | what goes wrong | in | level | clause | dtype | caught by, on its n-th case |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, caught in results.items():
        fault = FAULTS[name]
        level = f"L{CHECKS[fault.check].level}" if fault.check in CHECKS else "bridge"
        named = [c for c in caught if c.check == fault.check]
        others = sorted((c for c in caught if c.check != fault.check), key=lambda c: c.number)
        by = ", ".join(
            f"`{c.check}` {c.number}{' (refused)' if c.refused else ''}" for c in named + others[:1]
        )
        more = len(caught) - len(named + others[:1])
        by += f" and {more} more" if more > 0 else ""
        package = fault.package.removeprefix("bridge_")
        cells = (name, fault.harm, package, level, fault.clause, fault.dtype, by or "**nothing**")
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
