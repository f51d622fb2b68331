"""Peak memory of decoding SmolLM2-135M with blocks, against transformers' `generate` of the host.

    python benchmarks/memory.py [--backend torch] [--device cpu] [--width 16]

Each runs alone in a process: its peak is of resident bytes on a CPU, of allocated ones on a GPU.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
from beside import make
from record import RESULTS, record

from bridge.checkpoints.reading import open_checkpoint
from bridge.evaluation.peers import bridge_engine, transformers_engine
from bridge.evaluation.peers.engine import Call, Entry, Setup
from bridge.evaluation.peers.host import write_host
from bridge_cli.machine import device_name

THEIRS = "transformers"


def main() -> None:
    """Measure both, print the ratio, and keep it."""
    parser = argparse.ArgumentParser(description="Peak memory against transformers.")
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        name, scratch = options.peak
        return peak(name, scratch, options)
    names = (options.backend, THEIRS)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = make(Path(scratch))
        write_host(open_checkpoint(checkpoint), Path(scratch) / "plain")
        found = {}
        for name in names:
            command = [sys.executable, __file__, *sys.argv[1:], "--peak", name, scratch]
            found[name] = int(subprocess.run(command, capture_output=True, check=True).stdout)
    ratio = found[options.backend] / found[THEIRS]
    print(f"{options.backend} {ratio:.2f} times {THEIRS}' ({found[THEIRS] / 1e6:.0f} MB)")
    sizes = {k: getattr(options, k) for k in ("width", "prompt_tokens", "new")}
    machine = {"device": device_name(options.device)} | {name: version(name) for name in names}
    results = {"machine": machine, **sizes, "bytes": found, "ratio": ratio}
    record(results, f"memory-{options.backend}", options.out)


def peak(name: str, scratch: str, options: argparse.Namespace) -> None:
    """Run one engine, and print its peak."""
    engine = transformers_engine if name == THEIRS else bridge_engine
    backend = "" if name == THEIRS else name
    setup = Setup(
        entry=Entry(name, "float32", bool(backend), engine.__name__, name, backend),
        checkpoint=Path(scratch) / "bridge",
        host=Path(scratch) / "plain",
        scratch=Path(scratch),
        device=options.device,
        threads=0,
        widest=options.width,
        context=options.prompt_tokens + options.new,
    )
    prompt = np.random.default_rng(0).integers(100, 40000, options.prompt_tokens).tolist()
    engine.load(setup).decode(Call(tuple(prompt), options.width, options.new))
    status = Path("/proc/self/status")
    if options.device.startswith("cuda"):
        import torch

        print(torch.cuda.max_memory_allocated())
    elif status.exists():  # what getrusage says there, a child inherits
        print(int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024)
    else:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


if __name__ == "__main__":
    main()
