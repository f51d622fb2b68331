"""The C library's memory, kept from one training step to the next.

A step makes and frees gigabytes. glibc gives large arrays back to the system as soon as they are
free, and the next ones are paged in anew, which on a CPU is up to a fifth of a step.
"""

import ctypes
import os
import sys

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of malloc.h


def keep_memory() -> None:
    """Have freed memory stay with this process. Does nothing with another C library than glibc, and
    where the environment says how it is to be done (`MALLOC_...`, `GLIBC_TUNABLES`)."""
    said = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if sys.platform != "linux" or said:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, -1)
