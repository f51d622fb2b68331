"""How torch's threads on a CPU wait for each other: awake for a moment, then asleep.

A step of decoding is hundreds of parallel regions, and at the end of each the threads wait for the
last. libgomp lets them spin for milliseconds, which beside other busy processes is the core that
the last one needs: many times slower, from run to run. Asleep at once (`OMP_WAIT_POLICY=passive`)
they must be woken for each region, also where nobody else wants the core. `benchmarks/beside.py`
has the figures. libgomp reads its settings once, when torch loads it.
"""

import os
import sys

# Of libgomp, which has 300,000: still longer than the next region is away on a quiet machine.
SPINS = 30_000
SAID = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def import_torch() -> None:
    """Import torch with a bounded spin. Does nothing where the environment says how to wait, or
    where torch is there already; the environment is left as it was, for children to have theirs."""
    if "torch" in sys.modules or any(name in os.environ for name in SAID):
        return
    os.environ["GOMP_SPINCOUNT"] = str(SPINS)
    try:
        import torch  # noqa: F401
    finally:
        del os.environ["GOMP_SPINCOUNT"]
