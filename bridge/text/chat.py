"""Chat templates: code from a checkpoint, so it runs in a process of its own that can be ended.

A template, messages and special tokens go in, the text of a prompt comes out. What a template may
take is bounded from around it, whatever it does: the processor's time by the kernel, memory by the
kernel or by looking, time by the clock and the length of the text by us. The process
(`bridge.text.chat_process`) imports Jinja and little else; it starts with the first chat, stays for
the next ones, and ends with us.
"""

import atexit
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from typing import Any, TypeGuard

from bridge.errors import BridgeError, one_line
from bridge.processes.parent import MOST, Child, ChildLate, ChildLost

MAX_SOURCE = 200_000  # characters of a template
SECONDS = 5.0  # of processor time; a chat of a million characters takes some hundredths
WAIT = 60.0  # seconds by the clock, of which a busy machine may give us few
MEMORY = 1 << 29  # bytes; a chat of ten million characters takes a quarter
LOOK = 0.1  # seconds between looks at its memory, where the system does not limit it

Message = Mapping[str, str]


def are_messages(value: Any) -> TypeGuard[list[Message]]:
    """Whether a value of a file is the messages of a chat: one or more objects, each with texts as
    role and content."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(message, Mapping)
            and all(isinstance(message.get(key), str) for key in ("role", "content"))
            for message in value
        )
    )


def render_chat(
    template: str,
    messages: Sequence[Message],
    tokens: Mapping[str, str],
    *,
    seconds: float = SECONDS,
) -> str:
    """The text of a conversation up to where the assistant speaks, as transformers makes it.

    `tokens` are the special tokens that templates name (`bos_token`, `eos_token`, ...). `seconds`:
    of processor time. May be called from any thread. Raises BridgeError, in one line, for whatever
    goes wrong in the template.
    """
    if len(template) > MAX_SOURCE:
        raise _failing(f"it is longer than {MAX_SOURCE} characters")
    if not all(isinstance(message, Mapping) for message in messages):
        raise BridgeError("messages: each must be an object with role and content")
    # As in transformers, keys without a value are as good as none.
    said = [{key: value for key, value in m.items() if value is not None} for m in messages]
    try:
        text = json.dumps([seconds, template, said, dict(tokens)], ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BridgeError(f"messages: hold what is no JSON ({one_line(error)})") from None
    request = text.encode("utf-8", "surrogatepass")
    if len(request) > MOST:
        raise BridgeError(f"messages: are longer than {MOST >> 20} MB; shorten the chat")
    try:
        answer = renderer.ask(request, seconds).decode("utf-8", "replace")
    except ChildLost as error:
        answer = f"!it {error}"
    if answer.startswith("="):
        return answer[1:]
    raise _failing(answer[1:])


def _failing(reason: str) -> BridgeError:
    where = "tokenizer_config.json: chat_template fails"
    return BridgeError(f"{where}: {one_line(reason)}; try a raw prompt")


class Renderer:
    """The process that renders, for all threads of ours, one chat at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.child: Child | None = None

    def ask(self, request: bytes, seconds: float) -> bytes:
        """Its answer. Raises ChildLost, in words that follow "it", where there is none."""
        with self.lock:
            if self.child is not None and not self.child.closed:
                try:
                    return _ask(self.child, request, seconds)
                except ChildLate:
                    raise
                except ChildLost:
                    pass  # what it rendered before may be at fault: a fresh one will tell
            self.child = start()
            return _ask(self.child, request, seconds)

    def close(self) -> None:
        """End the process, if there is one; the next chat starts another."""
        if self.child is not None:
            self.child.close()
            self.child = None

    def leave(self) -> None:
        """In a fork of ours, the process is not ours, and the lock may be held for ever."""
        if self.child is not None and not self.child.closed:
            self.child.leave()
        self.lock, self.child = threading.Lock(), None


renderer = Renderer()
atexit.register(renderer.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=renderer.leave)


def start() -> Child:
    """A process that renders. Raises BridgeError where there can be none."""
    try:
        child = Child(
            "bridge.text.chat_process:render_with", b"", MEMORY, what="chat_template", bare=True
        )
        child.ready()
    except BridgeError as error:
        raise BridgeError(f"tokenizer_config.json: {error}; try a raw prompt") from None
    return child


def _ask(child: Child, request: bytes, seconds: float) -> bytes:
    try:
        child.begin(request, WAIT)
        if sys.platform != "linux":
            watch(child)
        return child.take()
    except ChildLate:
        raise
    except ChildLost:
        code = child.process.returncode
        if code == -signal.SIGPROF:
            raise ChildLate(f"takes more than {seconds:g} s of processor time") from None
        if code == errno.ENOMEM:
            raise ChildLost(f"takes more than {MEMORY >> 20} MB of memory") from None
        raise
    except BaseException:  # Ctrl-C leaves an answer on its way, which the next must not read
        child.close()
        raise


def watch(child: Child) -> None:
    """Until it answers, look at the memory that it has, and end it where that is too much."""
    while time.monotonic() < child.deadline and not wait([child.line], LOOK):
        command = ["ps", "-o", "rss=", "-p", str(child.process.pid)]  # in units of 1024 bytes
        seen = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        if seen.isdecimal() and int(seen) << 10 > MEMORY:
            child.close()
            raise ChildLost(f"takes more than {MEMORY >> 20} MB of memory")
