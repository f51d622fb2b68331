"""Code of the user: functions by their names, and tasks asked; what it raises is one line.

A function is named "module:function", from the working directory or what is installed. Importing a
module runs it, which is what its user asks for. Whatever goes wrong is a BridgeError that names the
function or the task.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from bridge.errors import BridgeError, describe
from bridge.tasks.problem import Problem, Task


def load_function(name: str, field: str) -> Callable[..., Any]:
    """The function of that name; `field` is what the user gave it as.

    Raises BridgeError where the module or the function is not there, or the import fails.
    """
    if not isinstance(name, str) or not all(name.partition(":")[::2]):
        raise BridgeError(f"{field} must be MODULE:FUNCTION, not {name!r}")
    module_name, _, function_name = name.partition(":")
    if "" not in sys.path and "." not in sys.path:
        sys.path.append("")  # the working directory, which a command's own path lacks
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise BridgeError(
                f"{field} {name}: there is no module {missing}, neither here nor installed; run "
                "where it lies, or mend the name"
            ) from None
        raise BridgeError(
            f"{field} {name}: its module needs {missing}, which is not installed; "
            f"try: pip install {missing.partition('.')[0]}"
        ) from None
    except (Exception, SystemExit) as error:
        raise BridgeError(f"{field} {name}: its module fails ({describe(error)})") from None
    function: Any = module
    for part in function_name.split("."):
        function = getattr(function, part, None)
    if not callable(function):
        there = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        near = get_close_matches(function_name, there, n=1)
        hint = f"did you mean {near[0]}?" if near else "mend the name"
        what = "is no function" if function is not None else "is not there"
        raise BridgeError(f"{field} {name}: {function_name} {what} in {module_name}; {hint}")
    return function


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
