"""`python -m tests.fuzz --inputs 200000 --seed 7`: as many inputs as wanted, under a memory limit.

Prints one JSON object: outcomes by kind, and each fault with its recipe. Where native code ends or
hangs the process, the file of --note holds the input that did.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from .run import Tally, run
from .watch import limit_memory

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
    names = tuple(filter(None, options.checkpoints.split(",")))
    began = time.monotonic()
    run(seed=-1, inputs=50, names=names)  # imports and caches, before memory is limited
    limit_memory(MEMORY)
    note = options.note.open("r+b", buffering=0) if options.note else None

    def at(name: str, number: int) -> None:
        if note:
            note.seek(0)
            note.write(f"{name} {number}".ljust(40).encode())
        if not options.quiet and number % 1000 == 0:
            rate = (number - options.start) / (time.monotonic() - began)
            print(f"\r{number} inputs, {rate:.0f} a second ", end="", file=sys.stderr, flush=True)

    tally: Tally = run(
        options.seed,
        options.inputs,
        names,
        start=options.start,
        at=at,
        most_faults=options.faults,
    )
    if not options.quiet:
        print(file=sys.stderr)
    print(json.dumps({"outcomes": tally.outcomes, "faults": tally.faults}))
    return 1 if tally.faults else 0


sys.exit(main())
