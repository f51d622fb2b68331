"""The handler that scores, in the processes of a `Scorer`: a number for a problem and a response.

Whatever a reward raises or gives is a line that says so, after a `!`.
"""

import pickle
from collections.abc import Callable
from math import isfinite
from typing import Any

from bridge.errors import describe, one_line
from bridge.processes.child import Handler


def score_with(payload: bytes) -> Handler:
    """The handler of a `Scorer`: of a pickled task, that takes a pickled problem and response."""
    task = pickle.loads(payload)
    prepare: Callable[[], None] = getattr(task, "prepare", lambda: None)
    prepare()  # imports, which no response should pay for

    def handle(request: bytes) -> bytes:
        try:
            value = task.score(*pickle.loads(request))
        except BaseException as error:  # SystemExit and KeyboardInterrupt too: rewards raise them
            return f"!the reward raised {describe(error)}".encode("utf-8", "replace")
        try:
            return number(value).hex().encode()
        except BaseException as error:
            return f"!{error}".encode("utf-8", "replace")

    return handle


def number(value: Any) -> float:
    """What a reward gave, as a float. Raises ValueError unless it is a finite number."""
    try:
        real = None if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        real = None
    if real is None:
        raise ValueError(f"the reward is no number but {_short(value)}")
    if not isfinite(real):
        raise ValueError(f"the reward is {real}, which is not finite")
    return real


def _short(value: Any) -> str:
    if value is None:
        return "None"
    try:
        return f"{type(value).__name__} {one_line(repr(value))[:80]}"
    except BaseException:
        return type(value).__name__
