"""What the stages of accelerator.py measure: each a generator of figures, written as they come.

Run by accelerator.py alone, one stage a process. A stage yields `(key, figures, line)`: a place in
the JSON, what stands there, and how a person would read it.
"""

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Found = tuple[str, Any, str]
DTYPES = ("float32", "bfloat16", "float16")
TINY_LEVEL = 1  # of conformance, in a rehearsal


def main() -> None:
    """Measure, and keep what there is after each figure; Ctrl-C ends it with that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs us may ignore it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    asked = json.loads(sys.argv[1])
    backend, _, kind = asked["stage"].rpartition("-")
    kinds: dict[str, Callable[..., Iterator[Found]]] = {
        "machine": lambda _, asked: machine(asked),
        "quick": lambda backend, asked: conformance(backend, "quick", asked, note),
        "ci": lambda backend, asked: conformance(backend, "ci", asked, note),
        "decode": lambda backend, asked: speed(backend, asked, "decode"),
        "train": lambda backend, asked: speed(backend, asked, "train"),
        "update": lambda backend, asked: speed(backend, asked, "update"),
        "peers": lambda backend, asked: speed(backend, asked, "peers"),
        "kernels": lambda backend, asked: speed(backend, asked, "kernels"),
        "ahead": lambda backend, asked: speed(backend, asked, "ahead"),
        "padding": lambda backend, asked: speed(backend, asked, "padding"),
    }
    kept: dict[str, Any] = {"lines": [], "figures": {}}

    def note(key: str, figures: Any) -> None:
        kept["figures"][key] = figures
        _keep(kept, asked["out"])

    for key, figures, line in kinds[kind](backend, asked):
        kept["lines"].append(line)
        print(line)
        note(key, figures)


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def _keep(kept: dict[str, Any], out: str) -> None:
    partial = Path(f"{out}.partial")
    partial.write_text(json.dumps(kept), encoding="utf-8")
    partial.replace(out)


def machine(asked: dict[str, Any]) -> Iterator[Found]:
    """Names and versions, and the two ceilings that figures are held against."""
    from bridge_cli.machine import processor

    name = processor()
    yield "processor", name, f"{name}, {os.cpu_count()} cores, {platform.platform()}"
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit"]
    try:
        done = subprocess.run([*query, "--format=csv,noheader"], capture_output=True, text=True)
        gpus = done.stdout.strip().splitlines()
    except FileNotFoundError:
        gpus = []
    yield "gpus", gpus, "; ".join(gpus) or "no nvidia-smi"
    device = gpus[0].partition(",")[0] if gpus else name
    yield "device", device, f"results are filed under {device}"
    for framework in (_torch_machine, _jax_machine):
        try:
            yield from framework(asked)
        except Exception as error:  # a driver can cause any; the other framework may work
            yield framework.__name__, str(error), f"{type(error).__name__}: {error}"


def _torch_machine(asked: dict[str, Any]) -> Iterator[Found]:
    import torch

    device = asked["device"] or ("cuda:0" if torch.cuda.is_available() else "cpu")
    cuda = device.startswith("cuda")
    yield "torch_device", device, f"torch {torch.__version__}, CUDA {torch.version.cuda}, {device}"
    if cuda:
        found = torch.cuda.get_device_properties(device)
        yield "device", found.name, f"{found.name} with {found.total_memory / 2**30:.1f} GiB"
    large = asked["size"] != "tiny"
    source = torch.ones(2**31 if large else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = median(lambda: target.copy_(source), device)
    rate = 2 * source.numel() / copy
    yield "bandwidth", rate, f"copies move {rate / 1e9:.0f} GB/s, counting reads and writes"
    n = 8192 if large else 256
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
    rate = 2 * n**3 / median(lambda: a @ b, device)
    yield "gemm", rate, f"bf16 GEMM of {n}: {rate / 1e12:.2f} TFLOP/s"


def _jax_machine(asked: dict[str, Any]) -> Iterator[Found]:
    import jax

    devices = [str(device) for device in jax.local_devices()]
    yield "jax_devices", devices, f"jax {jax.__version__} on {', '.join(devices)}"


def median(run: Callable[[], Any], device: str, rounds: int = 20) -> float:
    """Seconds of one of ten calls in a row, each round waited for once."""
    import torch

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)

    seconds = []
    for turn in range(rounds + 3):
        wait()
        start = time.perf_counter()
        for _ in range(10):
            run()
        wait()
        if turn >= 3:
            seconds.append((time.perf_counter() - start) / 10)
    return statistics.median(seconds)


def conformance(
    backend: str, profile: str, asked: dict[str, Any], note: Callable[[str, Any], None]
) -> Iterator[Found]:
    """A run in each dtype, by itself; stopped in the middle, it says what it had found. `note`
    keeps how far it is, for when it cannot even be stopped."""
    # Thousands of tiny functions are compiled, none of which is worth a search for its best kernel.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0".strip()
    from bridge.registry import find_backend, resolve_device
    from bridge_conformance.checks import LEVELS
    from bridge_conformance.runner import run

    found = find_backend(backend)
    device = resolve_device(found, asked["device"])
    level = TINY_LEVEL if asked["size"] == "tiny" else max(LEVELS)
    for dtype in DTYPES:
        if dtype not in found.dtypes(device):
            yield dtype, {"skipped": True}, f"{dtype}: not offered on {device}"
            continue
        report = run(
            found,
            device=device,
            dtypes=[dtype],
            profile=profile,
            level=level,
            progress=lambda p, dtype=dtype: note(
                dtype, {"cases": p.done, "of": p.total, "failed": p.failed}
            ),
        )
        ran = [outcome for outcome in report.outcomes if outcome.status != "skip"]
        passed = [outcome for outcome in ran if outcome.status == "pass"]
        failures = [
            {"check": f.check, "clause": f.clause, "message": f.message[:2000]}
            | {"command": f.command[:2000]}
            for f in report.failures[:20]
        ]
        figures = {
            "device": device,
            "passed": report.ok,
            "failed": bool(report.failures),
            "complete": report.complete,
            "level": str(report.verdict),
            "checks": len(ran),
            "checks_passed": len(passed),
            "cases": sum(outcome.cases for outcome in ran),
            "seconds": round(report.seconds, 1),
            "worst_by_clause": report.to_json()["worst_by_clause"],
            "failures": failures,
            "versions": report.versions,
        }
        end = "" if report.complete else ", stopped before its end"
        line = f"{profile} in {dtype} on {device}: {len(passed)} of {len(ran)} checks passed"
        yield dtype, figures, f"{line}, {report.verdict}, {report.seconds:.0f} s{end}"
        for f in report.failures[:20]:
            yield f"{dtype}: {f.check}", f.message[:2000], f"  {f.check} ({f.clause}): {f.message}"
        if not report.complete:
            return


def speed(backend: str, asked: dict[str, Any], kind: str) -> Iterator[Found]:
    """Figures of a random host; see accelerator_speed.py."""
    import accelerator_peers
    import accelerator_speed
    import accelerator_train

    from bridge.registry import find_backend, resolve_device

    found = find_backend(backend)
    device = resolve_device(found, asked["device"])
    if device == "cpu" and asked["size"] != "tiny":
        raise SystemExit(f"{backend} has no accelerator here; --size tiny rehearses on a CPU")
    measures = {
        "decode": accelerator_speed.decode,
        "train": accelerator_speed.train,
        "update": accelerator_train.updates,
        "peers": accelerator_peers.peers,
    }
    if backend == "torch":
        import accelerator_torch

        measures |= {
            "kernels": accelerator_torch.kernels,
            "ahead": accelerator_torch.ahead,
            "padding": accelerator_torch.padding,
        }
    yield from measures[kind](found, device, asked["size"], asked["machine"])


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
