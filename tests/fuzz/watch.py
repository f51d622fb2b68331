"""What a piece of code opens, lists and writes, seen from outside, and limits on what it may take.

Python tells of every file that it opens through audit events, and cannot be asked to stop. What
takes too long is stopped by a signal in Python code; native code is left to who started us.
"""

import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS = 10  # of processor time, for an input that takes a few thousandths
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Events that no reader of a checkpoint has a reason for.
FORBIDDEN = (
    *("os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir"),
    *("os.symlink", "os.truncate", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn"),
    *("os.system", "pty.spawn", "subprocess.Popen", "pickle.find_class", "ctypes.dlopen"),
    *("socket.connect", "socket.bind", "socket.getaddrinfo", "urllib.Request", "os.putenv"),
    *("shutil.copyfile", "shutil.move", "shutil.rmtree", "tempfile.mkstemp", "tempfile.mkdtemp"),
)

PYTHON = tuple(os.path.realpath(place) + os.sep for place in (sys.base_prefix, sys.prefix))

_seen: list[str] | None = None


class Hang(BaseException):
    """The input took longer than any valid one could; no handler for errors may swallow it."""


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is None:
        return
    if event == "open":
        path, _mode, flags = arguments
        if isinstance(path, int):
            return
        where = os.path.realpath(os.fsdecode(path))
        plain = os.path.isfile(where) or os.path.isdir(where) or not os.path.exists(where)
        if not plain and not (flags or 0) & os.O_NONBLOCK:
            raise Hang(f"opens {where}, which is no file, and waits for it")
        _seen.append(f"{'write' if (flags or 0) & WRITES else 'read'} {where}")
    elif event in ("os.listdir", "os.scandir") and not isinstance(arguments[0], int):
        _seen.append(f"read {os.path.realpath(os.fsdecode(arguments[0] or '.'))}")
    elif event in FORBIDDEN:
        _seen.append(f"{event} {arguments!r}")


sys.addaudithook(_audit)


@contextmanager
def watched() -> Iterator[list[str]]:
    """What happens within: `read PATH`, `write PATH`, or another event; paths without links."""
    global _seen
    seen: list[str] = []

    def stop(_number: int, _frame: Any) -> None:
        raise Hang(f"still running after {SECONDS} s of processor time")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    _seen = seen
    try:
        yield seen
    finally:
        _seen = None
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def misdeeds(seen: list[str], allowed: tuple[Path, ...]) -> list[str]:
    """Events that are more than reading a file of an allowed directory, or of its updates, or
    listing it."""
    inside = [os.path.realpath(directory) for directory in allowed]
    inside += [os.path.join(directory, "lora") for directory in inside]
    bad = []
    for event in seen:
        kind, _, path = event.partition(" ")
        code = path.endswith((".py", ".pyc", ".so")) or os.path.isdir(path)
        late_import = code and path.startswith(PYTHON)
        here = path in inside or os.path.dirname(path) in inside
        if kind != "read" or not (here or late_import):
            bad.append(event)
    return bad


def limit_memory(extra: int) -> None:
    """Let this process have `extra` bytes of address space more than now, and no core file."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + extra
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
