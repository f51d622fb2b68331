"""Asking a task, which may be a user's own: whatever it raises is one line that names it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from bridge.errors import BridgeError, describe
from bridge.tasks.problem import Problem, Task


@contextmanager
def calling(task: Task, what: str) -> Iterator[None]:
    """Make of whatever a task raises here a BridgeError that names both."""
    try:
        yield
    except BridgeError:
        raise
    except (Exception, SystemExit) as error:
        raise BridgeError(
            f"task {task.name}: {what} fails ({describe(error)}); mend the task"
        ) from error


def take_size(task: Task, split: str) -> int | None:
    """How many problems a split has; None: it is endless."""
    with calling(task, f"size of {split}"):
        return task.size(split)


def take_problems(task: Task, split: str, numbers: Sequence[int]) -> list[Problem]:
    """Problems of a split by their numbers. Raises BridgeError, naming task and problem, for
    whatever the task raises, and for what is no problem."""
    found = []
    for number in numbers:
        with calling(task, f"problem {number} of {split}"):
            problem = task.problem(split, number)
            for field in ("number", "prompt", "answer"):
                getattr(problem, field)
        found.append(problem)
    return found
