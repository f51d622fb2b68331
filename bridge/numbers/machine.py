"""What this machine has: processors, and memory and disk in bytes, with what of them is free.
Refuses in one line what cannot fit."""

import os
import shutil
import sys
from pathlib import Path

from bridge.errors import BridgeError

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
# Of the same containers: what is used, and in it files that were read and can be dropped.
USED = (
    ("/sys/fs/cgroup/memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory/memory.usage_in_bytes", "total_inactive_file"),
)
MEMINFO = Path("/proc/meminfo")


def available_processors() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def machine_memory() -> int:
    """Bytes that this process can ever have: the machine's, or what a container is given."""
    found = [_number(Path(name)) for name in LIMITS]
    return min([_physical(), *(limit for limit in found if limit is not None)])


def available_memory() -> int:
    """Bytes that this process could take now, by what the system says and what a container has
    left; where the system says nothing, what this process has not had yet of the machine's."""
    found = []
    said = _field(MEMINFO, "MemAvailable:")
    if said is not None:
        found.append(1024 * said)
    for limit, (used, droppable) in zip(LIMITS, USED, strict=True):
        most, now = _number(Path(limit)), _number(Path(used))
        if most is not None and now is not None:
            dropped = _field(Path(used).with_name("memory.stat"), droppable) or 0
            found.append(most - max(0, now - dropped))
    if not found:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = [_physical() - (peak if sys.platform == "darwin" else 1024 * peak)]
    return max(0, min(found))


def _physical() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _number(path: Path) -> int | None:
    """What a file of one number says; None: there is no such file, or no number in it, as in
    `max`, which is none."""
    try:
        said = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return int(said) if said.isdecimal() else None


def _field(path: Path, name: str) -> int | None:
    """The number after a name in a file of such lines."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    found = [line.split()[1] for line in lines if line.split()[:1] == [name]]
    return int(found[0]) if found and found[0].isdecimal() else None


def check_memory(needed: int, what: str, mend: str) -> None:
    """Refuse what needs more bytes than the machine has."""
    there = machine_memory()
    if needed > there:
        raise BridgeError(
            f"memory: {what} need {size(needed)}, and this machine has {size(there)}; {mend}"
        )


def check_disk(directory: Path, needed: int, what: str, mend: str) -> None:
    """Refuse to write more bytes into a directory than its disk has left."""
    there = shutil.disk_usage(directory).free
    if needed > there:
        raise BridgeError(
            f"{directory}: {what} need {size(needed)}, and {size(there)} are left there; {mend}"
        )


def size(number: int) -> str:
    """Bytes, in decimal units, as messages say them."""
    for unit, least in (("PB", 10**15), ("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if number >= least:
            return f"{number / least:,.1f} {unit}"
    return f"{number} B"
