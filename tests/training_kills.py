"""Kills runs at random moments and goes on with them, until a number of kills is reached.

    python training_kills.py BACKEND KILLS SEED DIRECTORY

A run is a forked child, so that a framework is imported once. It is killed (SIGKILL) after a random
time, or, every other life, by itself at a random one of the interpreter's audit events: files being
opened, renamed and removed are among them. Whatever a run ends with must be, to the byte, what an
undisturbed run of the same settings ends with. Prints JSON: kills, runs compared, what differed.
"""

import importlib
import json
import os
import random
import signal
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from training_toys import Graded, InProcess, write_model

from bridge.training import GRPOSettings, Settings, SFTSettings, train
from bridge.training.log import read_log


def runs(model: Path, backend: str, steps: int) -> list[Settings]:
    """A run of either kind: every step is saved, and evaluations, sampling, minibatches and a
    reference are in them."""
    common = {
        "checkpoint": str(model),
        "out": "x",
        "task": "sums",
        "backend": backend,
        "max_new_tokens": 2,
        "save_every": 1,
        "keep": 2,
        "eval_problems": 2,
        "seed": 3,
    }
    grpo = {"problems": 2, "width": 4, "lr": 1e-2}
    if backend != "jax":  # which compiles for seconds in every life what these add
        grpo |= {"minibatches": 2, "beta": 0.1}
    sft = {"problems": 32, "samples": 8, "max_rows": 16, "groups": 4, "epochs": 4}
    return [
        GRPOSettings(**common, **grpo, steps=steps, eval_every=5),
        SFTSettings(**common, **sft, eval_every=4),
    ]


def live(settings: Settings, events: int | None = None) -> int:
    """Start or go on with a run in a child; its process id. The child kills itself at the audit
    event number `events`, or else writes how many there were beside the run."""
    pid = os.fork()
    if pid:
        return pid
    try:
        count = 0

        def hear(event: str, arguments: tuple) -> None:
            nonlocal count
            count += 1
            if count == events:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hear)
        task = Graded()
        train(settings, task=task, scorer=InProcess(task))
        Path(f"{settings.out}.events").write_text(str(count))
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def ended(pid: int) -> int:
    """Wait for a child: its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outcome(out: Path) -> dict[str, Any]:
    """What a run ended with: every file of weights and of optimizer state, and its log."""
    found: dict[str, Any] = {
        str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.safetensors")
    }
    found["log"] = [
        {k: v for k, v in r.items() if not k.startswith("seconds") and "per_second" not in k}
        for r in read_log(out / "log.jsonl")
    ]
    found["hidden"] = [p.name for p in out.rglob(".*") if p.name != ".lock"]
    return found


def undisturbed(settings: Settings) -> tuple[dict[str, Any], float, int]:
    """A run that nothing happens to: what it ends with, its seconds, and its audit events. Its
    steps all move the weights, or the comparison would say nothing."""
    start = time.monotonic()
    code = ended(live(settings))
    assert code == 0, code
    seconds = time.monotonic() - start
    events = int(Path(f"{settings.out}.events").read_text())
    found = outcome(Path(settings.out))
    assert all(r["grad_norm"] > 0 for r in found["log"] if r["kind"] == "step"), found["log"]
    return found, seconds, events


def main(backend: str, kills: int, seed: int, directory: Path) -> None:
    importlib.import_module(f"bridge_{backend}.backend")
    if backend == "torch":
        import torch
        import torch._dynamo  # which an optimizer imports, for seconds

        torch.set_num_threads(1)
    rng = random.Random(seed)
    model = write_model(directory / "model")
    kinds = runs(model, backend, 12)
    kinds = [replace(settings, out=str(directory / settings.kind)) for settings in kinds]
    expected = cache(lambda which: undisturbed(kinds[which]))
    done = compared = life = 0
    differing: list[str] = []
    moments: list[str] = []
    while done < kills:
        which = compared % len(kinds)
        settings = replace(kinds[which], out=str(directory / f"run-{compared}"))
        want, seconds, events = expected(which)
        code = -signal.SIGKILL
        while code == -signal.SIGKILL:
            life += 1
            if done >= kills:
                code = ended(live(settings))
            elif life % 2:
                code = ended(live(settings, events=1 + rng.randrange(events)))
            else:
                pid, moment = live(settings), rng.random() * seconds
                time.sleep(moment)
                os.kill(pid, signal.SIGKILL)
                code = ended(pid)
            if code == -signal.SIGKILL:
                done += 1
                moments.append(_latest(Path(settings.out)))
        assert code == 0, f"exit {code} after {moments[-1:]}"
        got = outcome(Path(settings.out))
        compared += 1
        differing += [
            f"run {compared}: {name}"
            for name in sorted(want.keys() | got.keys())
            if want.get(name) != got.get(name)
        ]
    print(json.dumps({"kills": done, "runs": compared, "differing": differing, "at": moments}))


def _latest(out: Path) -> str:
    """How far a killed run was."""
    steps = sorted(p.name for p in (out / "checkpoints").glob("step-*"))
    return steps[-1] if steps else "before the first"


if __name__ == "__main__":
    name, kills, seed, directory = sys.argv[1:]
    main(name, int(kills), int(seed), Path(directory))
