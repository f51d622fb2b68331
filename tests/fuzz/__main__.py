"""`python -m tests.fuzz --inputs 200000 --seed 7`: as many inputs as wanted, under a memory limit.

Prints one JSON object: outcomes by kind, and each fault with its recipe. Where native code ends a
process, the file of --note holds the input that did.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from .run import run
from .watch import limit_memory

CHUNK = 5000  # inputs a process
MEMORY = 128 << 20  # bytes that a checkpoint of a few kilobytes may take, whatever it says


def main() -> int:
    """Run, and exit with 1 if there was a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first input")
    parser.add_argument("--checkpoints", default="", help="seed checkpoints, by comma; all")
    parser.add_argument("--note", type=Path, help="file for the number of the input being tried")
    parser.add_argument("--faults", type=int, default=20, help="stop after so many")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    options = parser.parse_args()
    if options.inputs > CHUNK:
        return _in_chunks(options)
    names = tuple(filter(None, options.checkpoints.split(",")))
    run(seed=-1, inputs=50, names=names)  # imports and caches, before memory is limited
    limit_memory(MEMORY)
    warnings.simplefilter("error")  # what would be written beside our one line is a fault
    note = options.note.open("r+b", buffering=0) if options.note else None

    def at(name: str, number: int) -> None:
        if note:
            note.seek(0)
            note.write(f"{name} {number}".ljust(40).encode())

    start, most = options.start, options.faults
    tally = run(options.seed, options.inputs, names, start=start, at=at, most_faults=most)
    print(json.dumps({"outcomes": tally.outcomes, "faults": tally.faults}))
    return 1 if tally.faults else 0


def _in_chunks(options: argparse.Namespace) -> int:
    """Run in one process after another, each told by its inputs, so that none grows old and the
    death of one is a fault like any other."""
    outcomes: Counter[str] = Counter()
    faults: list[dict[str, Any]] = []
    began, end = time.monotonic(), options.start + options.inputs
    with tempfile.NamedTemporaryFile() as note:
        for start in range(options.start, end, CHUNK):
            given = {
                "--seed": options.seed,
                "--start": start,
                "--inputs": min(CHUNK, end - start),
                "--checkpoints": options.checkpoints,
                "--faults": options.faults,
                "--note": note.name,
            }
            flags = [f"{name}={value}" for name, value in given.items()]
            command = [sys.executable, "-m", "tests.fuzz", *flags]
            ran = subprocess.run(command, capture_output=True, text=True)
            if ran.stdout:
                part = json.loads(ran.stdout)
                outcomes.update(part["outcomes"])
                faults += part["faults"]
            else:
                where = Path(note.name).read_text().strip()
                faults.append(
                    {"input": where, "said": f"ended with {ran.returncode}: {ran.stderr}"}
                )
            done = start + given["--inputs"] - options.start
            if not options.quiet:
                rate = done / (time.monotonic() - began)
                print(f"\r{done} inputs, {rate:.0f} a second ", end="", file=sys.stderr, flush=True)
            if len(faults) >= options.faults:
                break
    if not options.quiet:
        print(file=sys.stderr)
    print(json.dumps({"outcomes": outcomes, "faults": faults}))
    return 1 if faults else 0


sys.exit(main())
