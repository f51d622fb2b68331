"""The run: every engine in a process of its own, asked in turn, round after round.

In: an opened checkpoint, a plan and sizes. Out: `Results`. An engine that fails, dies or is too
slow is reported, and the others go on.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from bridge.checkpoints.reading import Checkpoint
from bridge.evaluation.peers.engine import Call, Decoded, Setup
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
    workload.check(opened.config.max_position_embeddings)
    parameters = step_parameters(opened.config.without_bridge().without_lora())
    _check_fits(plan, parameters)
    results = Results(workload, parameters, plan.absent)
    with tempfile.TemporaryDirectory(prefix="bridge-peers-") as scratch, ExitStack() as stack:
        running = []
        for setup in _setups(opened, plan, device, workload, Path(scratch)):
            tell(f"loading {setup.entry.label}")
            try:
                worker = stack.enter_context(closing(Worker(setup)))
            except EngineFailed as error:
                results.failed.append(Absent(setup.entry.label, str(error)))
                continue
            found = Found(setup.entry, _version(setup.entry.package))
            results.found.append(found)
            running.append(_Running(worker, found, results))
        prompt = np.random.default_rng(0).integers(
            0, opened.config.vocab_size, workload.prompt_tokens
        )
        ids = tuple(prompt.tolist())
        for one in running:
            tell(f"warming up {one.found.entry.label}")
            one.warm_up(ids)
        rates = stack.enter_context(closing(Rates(device, workload.threads)))
        for turn in range(workload.rounds):
            results.limit = rates.look()
            for width in workload.widths:
                for one in running if turn % 2 == 0 else reversed(running):
                    what = f"width {width}, {one.found.entry.label}"
                    tell(f"round {turn + 1} of {workload.rounds}, {what}")
                    one.measure(ids, width, seed=turn + 1)
        results.limit = rates.look()
    return results


def _setups(
    opened: Checkpoint, plan: Plan, device: str, workload: Workload, scratch: Path
) -> Iterator[Setup]:
    """What each entry is loaded from, its files written when it is its turn."""
    host = scratch / "host"
    for number, entry in enumerate(plan.entries):
        own = scratch / str(number)
        own.mkdir()
        if not entry.backend and not host.exists():
            write_host(opened, host)
        yield Setup(
            entry=entry,
            checkpoint=opened.path.resolve(),
            host=host,
            scratch=own,
            device=device,
            threads=workload.threads,
            widest=max(workload.widths),
            context=workload.prompt_tokens + workload.new,
        )


@dataclass(frozen=True)
class _Running:
    """An engine under way, and where its figures go."""

    worker: Worker
    found: Found
    results: Results

    def warm_up(self, prompt: tuple[int, ...]) -> None:
        """Find out what it says, and, from the narrowest width on, how many tokens a call may have
        within its seconds."""
        work, found = self.results.workload, self.found
        new = min(WARM, work.new)
        if (said := self._decode(Call(prompt, 1, new, temperature=0.0), WARMING)) is None:
            return
        found.likeliest = said.tokens[0]
        for width in sorted(work.widths):
            if found.entry.backend:  # which may compile
                self._decode(Call(prompt, width, 2), WARMING)
            if (call := self._decode(Call(prompt, width, new), WARMING)) is None:
                continue
            step = max((call.all - call.first) / (new - 1), 1e-9)
            fit = 1 + int((work.seconds - call.first) / step)
            if fit >= 2:
                found.new[width] = min(work.new, fit)
            if call.first + step > work.seconds / 2:  # nor are wider ones faster
                why = f"{call.first + step:.0f} s for two tokens at width {width}"
                wider = width if fit < 2 else width + 1
                found.left_out |= {w: why for w in work.widths if w >= wider}
                return

    def measure(self, prompt: tuple[int, ...], width: int, seed: int) -> None:
        """One call that counts, where there is a figure to be had."""
        if width not in self.found.new or self.worker.closed:
            return
        time.sleep(SETTLE)
        limit = PATIENCE * max(self.results.workload.seconds, 6.0)
        call = Call(prompt, width, self.found.new[width], seed)
        if (decoded := self._decode(call, limit)) is not None:
            seconds = Seconds(decoded.first, decoded.all)
            self.found.seconds.setdefault(width, []).append(seconds)

    def _decode(self, call: Call, limit: float) -> Decoded | None:
        """A call; None where it failed, which is reported once a width."""
        if self.worker.closed:
            return None
        try:
            return self.worker.decode(call, limit)
        except EngineFailed as error:
            failed = Absent(f"{self.found.entry.label}, width {call.width}", str(error))
            if failed not in self.results.failed:
                self.results.failed.append(failed)
            return None


def _check_fits(plan: Plan, parameters: int) -> None:
    """Refuse more engines than the memory holds at once, or the disk beside."""
    mend = "name fewer with --engines or --dtypes"
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
