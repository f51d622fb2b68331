"""As many threads for every library, said before it is loaded."""

import os
import sys

POOLS = ("OMP", "MKL", "OPENBLAS", "NUMEXPR")
ACCELERATE = "VECLIB_MAXIMUM_THREADS"


def limit_threads(threads: int) -> None:
    """For every library that asks the environment, and, where the system can, for all others."""
    for name in (*(f"{pool}_NUM_THREADS" for pool in POOLS), ACCELERATE):
        os.environ[name] = str(threads)
    if sys.platform == "linux":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
