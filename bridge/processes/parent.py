"""What we hold of a process of our own: its line, its time limit, and its end.

It is a fresh interpreter, not a copy of ours, so that no script runs again and no thread or device
is shared; it hashes texts the same way in every run. It is killed, with all that it started, when
it takes too long, when we close it, and when we die ourselves, even by SIGKILL; Ctrl-C is not for
it, and what it prints goes nowhere. Bytes go in and come out; what they mean is up to the handler
that it is started with (`child.py`).

No package that we know of keeps all of this. pebble comes nearest: it kills a worker that is late,
but not what the worker has started; a worker that is held in C outlives a SIGKILL of its parent;
what it prints is printed; and a few bytes written into its descriptors stop the whole pool, whose
workers share a pipe. Like all that builds on multiprocessing (multiprocess, mpire) it copies us,
threads and all, or imports the script that runs once more, which fails without `if __name__ ==
"__main__"`. loky and joblib do neither, but end no task that hangs.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

from bridge.errors import BridgeError
from bridge.processes.line import TooLong, receive, send

START_LIMIT = 120.0  # seconds until a child has imported what it needs
MOST = 1 << 26  # bytes of an answer
PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
# A package whose modules can be imported without what `bridge/__init__.py` imports for its users.
ALONE = (
    "import types; bridge = sys.modules['bridge'] = types.ModuleType('bridge'); "
    f"bridge.__path__ = [{PACKAGE!r}]; "
)
SERVE = "import bridge.processes.child; bridge.processes.child.main(*sys.argv[2:])"


class ChildLost(Exception):
    """The child is gone, and why: in words that finish the sentence "the reward ..."."""


class ChildLate(ChildLost):
    """It was killed because its time was up."""


class Child:
    """One worker process and the line to it: one question at a time, each with its time limit.

    `ask` waits for the answer; who has several children gives each its question with `begin`, and
    takes an answer with `take` once there is something on the `line`, or the `deadline` is past.
    """

    def __init__(
        self,
        handler: str,
        payload: bytes,
        memory: int | None = None,
        *,
        what: str = "the task",
        bare: bool = False,
    ) -> None:
        """Start `handler`, "module:function", which makes of `payload` what answers requests.

        `memory`: bytes that it may take on top of what it holds once it is ready, where the system
        can limit that. `what`: what it is for, as messages say it. `bare`: without what `import
        bridge` and the site's own modules load, so that it is there at once. Does not wait until it
        is ready: its first answer says so, to `ready`. Raises BridgeError where no process can be
        started.
        """
        self.what = what
        self.line, theirs = socket.socketpair()
        ends, self.life = os.pipe()  # closed when we end, however we end
        arguments = [
            json.dumps(_path()),
            str(theirs.fileno()),
            str(ends),
            str(memory or 0),
            what,
            handler,
        ]
        # Modules are those that we find: none of the working directory's own (-P).
        flags, start = (["-S"], START + ALONE) if bare else ([], START)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", *flags, "-c", start + SERVE, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), ends),
                start_new_session=True,  # Ctrl-C is for us, and what it starts dies with it
                env=os.environ | {"PYTHONHASHSEED": "0"},
            )
        except (OSError, ValueError) as error:  # a ValueError where a system lacks what it takes
            self.line.close()
            os.close(self.life)
            raise BridgeError(f"a process for {what} cannot be started ({error})") from None
        finally:
            theirs.close()
            os.close(ends)
        self.starting = True
        self.begin(payload, START_LIMIT)

    def ready(self) -> None:
        """Wait until it can answer. Raises BridgeError, of one line, where it never will."""
        if not self.starting:
            return
        try:
            answer = self.take()
        except ChildLost as error:
            raise BridgeError(f"the process for {self.what} did not start: it {error}") from None
        self.starting = False
        if answer:
            self.close()
            raise BridgeError(answer.decode("utf-8", "replace"))

    def ask(self, request: bytes, limit: float) -> bytes:
        """The answer, within `limit` seconds. Raises ChildLost where none comes: it is killed."""
        self.ready()
        self.begin(request, limit)
        return self.take()

    def begin(self, request: bytes, limit: float) -> None:
        """Give it a question, which it has `limit` seconds to answer."""
        self.limit, self.deadline = limit, time.monotonic() + limit
        self.busy = True
        try:
            send(self.line, request, self.deadline)
        except OSError:  # it is gone, or does not read: taking the answer says which
            pass
        except BaseException:
            self.close()
            raise

    def take(self) -> bytes:
        """The answer to the question that it has. Raises ChildLost where none comes in time."""
        self.busy = False
        try:
            return receive(self.line, self.deadline, MOST)
        except TooLong:
            self.close()
            raise ChildLost("wrote into the line to its own process") from None
        except TimeoutError:
            self.close()
            raise ChildLate(f"took more than {self.limit:g} s") from None
        except OSError:
            raise ChildLost(self._cause()) from None
        except BaseException:  # Ctrl-C leaves an answer on its way, which the next must not read
            self.close()
            raise

    def _cause(self) -> str:
        """How it came to its end."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(1.0)
        code = self.process.returncode
        self.close()
        if code is None:
            return "closed the line to its own process"
        if code >= 0:
            return f"ended its process (exit status {code})"
        names = {number.value: number.name for number in signal.Signals}
        return f"killed its process ({names.get(-code, f'signal {-code}')})"

    @property
    def closed(self) -> bool:
        """Whether it has been killed, or found dead."""
        return self.line.fileno() == -1

    def leave(self) -> None:
        """Let go of it without an end to it: for a fork of the process that it belongs to."""
        self.line.close()
        os.close(self.life)

    def close(self) -> None:
        """Kill it and all that it started; may be called again."""
        if self.closed:
            return
        self.leave()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()


def _path() -> list[str]:
    """Where we find modules, as a process elsewhere finds them."""
    return [os.path.abspath(place) if place else os.getcwd() for place in sys.path]
