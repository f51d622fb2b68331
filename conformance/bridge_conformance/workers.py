"""Who carries jobs out: this process, or worker processes that each have the backend.

A job is plain data. Workers are spawned, not forked, since frameworks keep threads; one that dies
is replaced, and the job that killed it is found by running those that were under way alone.
"""

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Any

from bridge.contract import Backend
from bridge.registry import find_backend
from bridge_conformance.cases_json import from_text, readable
from bridge_conformance.checks import CHECKS
from bridge_conformance.examine import Finding, examine, shrink
from bridge_conformance.trial import Target


@dataclass(frozen=True, eq=False)
class Job:
    """Checks to run on a case; or, with a `budget`, one check to shrink from what is known. Equal
    to itself alone."""

    dtype: str
    checks: tuple[str, ...]
    case: str
    number: int  # of the case, in the order drawn
    seed: int = 0
    budget: int = 0
    known: tuple[tuple[str, Finding], ...] = ()


class Worker:
    """Carries out jobs on one backend and device."""

    def __init__(self, backend: Backend | str, device: str) -> None:
        self.name = backend if isinstance(backend, str) else backend.name
        self.backend = None if isinstance(backend, str) else backend
        self.device = device

    def __call__(self, job: Job) -> list[Finding]:
        """What is found; empty where shrinking does not meet the failure again."""
        if self.backend is None:
            self.backend = find_backend(self.name)
        target = Target(self.backend, self.device, job.dtype)
        checks = [CHECKS[name] for name in job.checks]
        if not job.budget:
            return examine(target, checks, from_text(job.case))
        known = [(from_text(text), finding) for text, finding in job.known]
        found = shrink(target, checks[0], job.seed, known, job.budget)
        return [] if found is None else [replace(found[1], case=readable(found[0]))]


def carry_out(
    worker: Worker, jobs: Sequence[Job], workers: int
) -> Iterator[tuple[Job, list[Finding]]]:
    """Each job with what is found, as they are done."""
    if workers == 1:
        for job in jobs:
            yield job, worker(job)
        return
    left = dict.fromkeys(jobs)
    for job, findings in _together(worker, jobs, workers):
        del left[job]
        yield job, findings
    for job in left:  # a worker died: one by one, to see which one does it
        found = list(_together(worker, [job], 1))
        yield found[0] if found else (job, _died(job))


def _together(
    worker: Worker, jobs: Sequence[Job], workers: int
) -> Iterator[tuple[Job, list[Finding]]]:
    """As many as are done before a worker dies."""
    before = set(multiprocessing.active_children())
    # Two processes that each take every core only wait for each other.
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, str(max((os.cpu_count() or 1) // workers, 1)))
    pool = ProcessPoolExecutor(
        min(workers, max(len(jobs), 1)),
        multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(worker,),
    )
    try:
        futures: dict[Future[list[Finding]], Job] = {pool.submit(_work, j): j for j in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()
        pool.shutdown()
    except BrokenProcessPool:
        pass
    finally:  # which Ctrl-C comes to in the middle of the work
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()


def _died(job: Job) -> list[Finding]:
    if job.budget:
        return []
    message = "ends the process that runs it, as a crash of native code does"
    return [Finding(name, "fail", message=message) for name in job.checks]


_here: list[Any] = []


def _start(worker: Worker) -> None:
    """Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _here[:] = [worker]


def _work(job: Job) -> list[Finding]:
    return _here[0](job)
