"""What runs in a process of our own: it reads requests, lets a handler answer, and does no more.

The handler is made once, of the payload, which is the first message; it maps bytes to bytes, and
what it prints goes nowhere. Nothing but the process keeps it apart from the code here, so what it
breaks is mended by a new one. This module imports little, since a bare process starts with it.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module

from bridge.errors import BridgeError, describe
from bridge.processes.line import receive, send

Handler = Callable[[bytes], bytes]


def main(line_end: str, life: str, memory: str, what: str, handler: str) -> None:
    """Serve until the line is closed. `life`: the pipe that is closed when the parent ends;
    `what`: what the process is for, in words."""
    _die_with(int(life))
    line = socket.socket(fileno=int(line_end))
    try:
        module, _, function = handler.partition(":")
        answer: Handler = getattr(import_module(module), function)(_next(line))
    except BridgeError as error:
        return send(line, " ".join(str(error).split()).encode("utf-8", "replace"))
    except BaseException as error:
        return send(line, f"{what} fails to load: {describe(error)}".encode())
    _limit(int(memory))
    send(line, b"")
    own = os.getpid()
    while True:
        reply = answer(_next(line))
        if os.getpid() != own:  # a copy that a reward made of us, and that came back
            os._exit(0)
        send(line, reply)


def _next(line: socket.socket) -> bytes:
    try:
        return receive(line)
    except ConnectionResetError:
        os._exit(0)  # the line is closed


def _die_with(life: int) -> None:
    """End, with all that we started, as soon as the other end of a pipe is closed.

    Linux sends the signal itself, whatever we are doing; a thread sees to it elsewhere.
    """
    os.set_inheritable(life, False)
    if sys.platform == "linux":
        import fcntl

        signal.signal(signal.SIGIO, signal.SIG_DFL)
        fcntl.fcntl(life, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(life, fcntl.F_SETFL, fcntl.fcntl(life, fcntl.F_GETFL) | os.O_ASYNC)

    def watch() -> None:
        os.read(life, 1)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _limit(memory: int) -> None:
    """No core files, and at most `memory` bytes more than now."""
    import resource

    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory and sys.platform == "linux":
        with open("/proc/self/statm") as file:
            held = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (held + memory, held + memory))
