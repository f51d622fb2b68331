"""What this machine holds, in bytes, and refusing in one line what no machine like it can hold."""

import os
import shutil
from pathlib import Path

from bridge.errors import BridgeError

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def machine_memory() -> int:
    """Bytes that this process can ever have: the machine's, or what a container is given."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in LIMITS:
        try:
            said = Path(name).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            continue
        if said.isdecimal():  # `max` is none
            found.append(int(said))
    return min(found)


def check_memory(needed: int, what: str, mend: str) -> None:
    """Refuse what needs more bytes than the machine has."""
    there = machine_memory()
    if needed > there:
        raise BridgeError(
            f"memory: {what} need {_size(needed)}, and this machine has {_size(there)}; {mend}"
        )


def check_disk(directory: Path, needed: int, what: str, mend: str) -> None:
    """Refuse to write more bytes into a directory than its disk has left."""
    there = shutil.disk_usage(directory).free
    if needed > there:
        raise BridgeError(
            f"{directory}: {what} need {_size(needed)}, and {_size(there)} are left there; {mend}"
        )


def _size(number: int) -> str:
    """Bytes, in decimal units."""
    for unit, size in (("PB", 10**15), ("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number} B"
