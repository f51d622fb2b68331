"""The other end of a `Child`: reads requests, lets a handler answer, and survives what it can.

A handler is made once, of the payload; it maps bytes to bytes. What it prints goes nowhere. It is
told apart from us by nothing but its process, so what it breaks here is mended by a new one. This
module imports little, since a bare process starts with it.
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
from bridge.processes.parent import LENGTH

Handler = Callable[[bytes], bytes]


def main(line: str, life: str, memory: str, what: str, handler: str) -> None:
    """Serve until the line is closed; `what` the process is for, in words."""
    _die_with(int(life))
    connection = socket.socket(fileno=int(line))
    try:
        module, _, function = handler.partition(":")
        answer: Handler = getattr(import_module(module), function)(_receive(connection))
    except BridgeError as error:
        return _send(connection, " ".join(str(error).split()).encode("utf-8", "replace"))
    except BaseException as error:
        return _send(connection, f"{what} fails to load: {describe(error)}".encode())
    _limit(int(memory))
    _send(connection, b"")
    own = os.getpid()
    while True:
        reply = answer(_receive(connection))
        if os.getpid() != own:  # a copy that a reward made of us, and that came back
            os._exit(0)
        _send(connection, reply)


def _receive(connection: socket.socket) -> bytes:
    [length] = LENGTH.unpack(_exactly(connection, LENGTH.size))
    return _exactly(connection, length)


def _exactly(connection: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        piece = connection.recv(min(length - len(data), 1 << 20))
        if not piece:
            os._exit(0)  # the line is closed
        data += piece
    return bytes(data)


def _send(connection: socket.socket, data: bytes) -> None:
    connection.sendall(LENGTH.pack(len(data)) + data)


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
