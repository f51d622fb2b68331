"""`python -m mutations`: run all faults, and write their table into the README.

`--seeds 20` runs the backend as it is under 20 seeds instead; `--only TEXT` runs the faults whose
names contain it, and writes nothing. Exit code 1: a fault was not caught, or a seed failed.
"""

import argparse
import sys
from typing import Any

from mutations import FAULTS, harness


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m mutations", description=__doc__)
    parser.add_argument("--only", default="", help="faults whose names contain this")
    parser.add_argument("--seeds", type=int, help="run the unmutated backend on this many seeds")
    options = parser.parse_args()
    if options.seeds is not None:
        ran: dict[int, dict[str, Any]] = {}

        def note(seed: int, found: dict[str, Any]) -> None:
            print(f"seed {seed}: {found['failures'] or 'passed'}", flush=True)
            ran[seed] = found  # written at once: a long run that is stopped leaves what it did
            harness.write("seeds", harness.seed_table(dict(sorted(ran.items()))))

        harness.run_seeds(options.seeds, note)
        return int(any(found["failures"] for found in ran.values()))
    names = [name for name in FAULTS if options.only in name]

    def say(name: str, caught: list[harness.Catch]) -> None:
        named = any(c.check == FAULTS[name].check for c in caught)
        how = "caught" if named else "caught elsewhere" if caught else "MISSED"
        print(f"{how:16} {name}: " + "; ".join(f"{c.check} {c.number}" for c in caught), flush=True)

    results = harness.run_faults(names, say)
    if not options.only:
        harness.write("faults", harness.fault_table(results))
    missed = [name for name, caught in results.items() if not caught]
    print(f"{len(names) - len(missed)} of {len(names)} faults caught")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
