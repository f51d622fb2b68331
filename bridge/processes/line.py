"""Messages on the line between two processes: the length of each in eight bytes, then its bytes.

Both ends read and write them here. What anybody else writes into the line begins, nearly always,
with a length that no message has.
"""

import socket
import struct
import time

LENGTH = struct.Struct("!Q")


class TooLong(Exception):
    """What came is no message: it would be longer than any is."""


def send(line: socket.socket, message: bytes, deadline: float | None = None) -> None:
    """Write one. Raises OSError where nobody reads it, a TimeoutError at the `deadline`."""
    _wait_until(line, deadline)
    line.sendall(LENGTH.pack(len(message)) + message)


def receive(line: socket.socket, deadline: float | None = None, most: int | None = None) -> bytes:
    """Read one, of at most `most` bytes.

    `deadline`: of `time.monotonic`; None waits for ever. Raises OSError where none comes: a
    TimeoutError where it is late, ConnectionResetError where the other end is closed.
    """
    [length] = LENGTH.unpack(_exactly(line, LENGTH.size, deadline))
    if most is not None and length > most:
        raise TooLong
    return _exactly(line, length, deadline)


def _exactly(line: socket.socket, length: int, deadline: float | None) -> bytes:
    data = bytearray()
    while len(data) < length:
        _wait_until(line, deadline)
        piece = line.recv(min(length - len(data), 1 << 20))
        if not piece:
            raise ConnectionResetError
        data += piece
    return bytes(data)


def _wait_until(line: socket.socket, deadline: float | None) -> None:
    # What is there came in time, however late we look.
    line.settimeout(None if deadline is None else max(0.001, deadline - time.monotonic()))
