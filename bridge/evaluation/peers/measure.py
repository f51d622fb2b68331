"""The run: every engine in a process of its own, asked in turn, round after round.

In: an opened checkpoint, a plan and sizes. Out: `Results`. An engine that fails, dies or is too
slow is reported, and the others go on.
"""

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from bridge.checkpoints.reading import Checkpoint
from bridge.evaluation.peers.engine import Call, Entry, Setup
from bridge.evaluation.peers.host import write_host
from bridge.evaluation.peers.limit import step_parameters
from bridge.evaluation.peers.plan import Absent, Plan
from bridge.evaluation.peers.results import Found, Results, Seconds, Workload
from bridge.evaluation.peers.worker import EngineFailed, Rates, Worker
from bridge.numbers.machine import check_disk, check_memory

WARM = 8  # tokens of the call that foretells how long others take
WARMING = 600.0  # seconds, where something is compiled
SETTLE = 0.3  # seconds until the threads of the engine before are asleep
PATIENCE = 10.0  # times as long as foretold, and a call is taken to hang
# Bytes of a weight.
SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1.1, "int4": 0.6}


def run(
    opened: Checkpoint,
    plan: Plan,
    device: str,
    workload: Workload,
    tell: Callable[[str], None] = lambda text: None,
) -> Results:
    """Measure all of a plan. `tell` hears what is going on.

    Raises BridgeError, before any work, for sizes out of their range or the machine's memory.
    """
    config = opened.config
    workload.check(config.max_position_embeddings)
    parameters = step_parameters(config.without_bridge())
    _check_fits(plan, parameters)
    results = Results(workload, parameters, plan.absent)
    with tempfile.TemporaryDirectory(prefix="bridge-peers-") as scratch, ExitStack() as stack:
        running = []
        for number, entry in enumerate(plan.entries):
            tell(f"loading {entry.label}")
            setup = _setup(opened, entry, device, workload, Path(scratch), number)
            try:
                worker = stack.enter_context(closing(Worker(setup)))
            except EngineFailed as error:
                results.failed.append(Absent(entry.label, str(error)))
                continue
            found = Found(entry, _version(entry.package))
            results.found.append(found)
            running.append((worker, found))
        prompt = np.random.default_rng(0).integers(0, config.vocab_size, workload.prompt_tokens)
        ids = tuple(prompt.tolist())
        for worker, found in running:
            tell(f"warming up {found.entry.label}")
            _warm_up(worker, found, ids, workload, results.failed)
        rates = stack.enter_context(closing(Rates(workload.threads)))
        for turn in range(workload.rounds):
            results.limit = rates.look()
            for width in workload.widths:
                for worker, found in running if turn % 2 == 0 else reversed(running):
                    if width in found.new and not worker.closed:
                        tell(
                            f"round {turn + 1} of {workload.rounds}, width {width}, "
                            f"{found.entry.label}"
                        )
                        _measure(worker, found, ids, width, turn, workload, results.failed)
        results.limit = rates.look()
    return results


def _setup(
    opened: Checkpoint, entry: Entry, device: str, workload: Workload, scratch: Path, number: int
) -> Setup:
    """What an entry needs, its files written."""
    host, own = scratch / "host", scratch / str(number)
    own.mkdir()
    if not entry.backend and not host.exists():
        write_host(opened, host)
    return Setup(
        entry=entry,
        checkpoint=opened.path.resolve(),
        host=host,
        scratch=own,
        device=device,
        threads=workload.threads,
        widest=max(workload.widths),
        context=workload.prompt_tokens + workload.new,
    )


def _warm_up(
    worker: Worker, found: Found, prompt: tuple[int, ...], workload: Workload, failed: list[Absent]
) -> None:
    """Find out what it says, and, from the narrowest width on, how many tokens a call may have
    within its seconds."""
    new = min(WARM, workload.new)
    for width in sorted(workload.widths):
        try:
            if not found.likeliest:
                likeliest = worker.decode(Call(prompt, 1, new, temperature=0.0), WARMING)
                found.likeliest = likeliest.tokens[0]
            worker.decode(Call(prompt, width, 2), WARMING)  # which compiles
            call = worker.decode(Call(prompt, width, new), WARMING)
        except EngineFailed as error:
            failed.append(Absent(f"{found.entry.label}, width {width}", str(error)))
            if worker.closed:
                return
            continue
        step = (call.all - call.first) / (new - 1)
        fit = 1 + int((workload.seconds - call.first) / step)
        if fit < 2:
            why = f"a call of two tokens takes {call.first + step:.0f} s"
            found.left_out |= {w: why for w in workload.widths if w >= width}
            return
        found.new[width] = min(workload.new, fit)


def _measure(
    worker: Worker,
    found: Found,
    prompt: tuple[int, ...],
    width: int,
    turn: int,
    workload: Workload,
    failed: list[Absent],
) -> None:
    time.sleep(SETTLE)
    try:
        call = Call(prompt, width, found.new[width], turn + 1)
        decoded = worker.decode(call, PATIENCE * max(workload.seconds, 6.0))
    except EngineFailed as error:
        failed.append(Absent(f"{found.entry.label}, width {width}", str(error)))
        return
    found.seconds.setdefault(width, []).append(Seconds(decoded.first, decoded.all))


def _check_fits(plan: Plan, parameters: int) -> None:
    """Refuse more engines than the memory holds at once, or the disk beside."""
    mend = "name fewer with --engines or --weights"
    held = sum(SIZES[entry.weights] * parameters for entry in plan.entries)
    check_memory(int(held), f"{len(plan.entries)} engines at once", mend)
    written = 4 * parameters + sum(
        SIZES[entry.weights] * parameters for entry in plan.entries if entry.prepares
    )
    check_disk(Path(tempfile.gettempdir()), int(written), "their files", mend)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "?"
