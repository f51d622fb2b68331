"""Tasks by name: a generator of reasoning-gym, a JSONL file, or a function that makes a task."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bridge.errors import BridgeError, describe
from bridge.files.opening import exists
from bridge.tasks.gym import GymTask
from bridge.tasks.gym_datasets import PREFIX
from bridge.tasks.jsonl import JsonlTask
from bridge.tasks.problem import Task
from bridge.tasks.user_code import load_function


def find_task(name: str, **options: Any) -> Task:
    """The task of that name.

        reasoning-gym:NAME     that generator; its config and what `GymTask` takes are options
        PATH                   a JSONL file, which ends in .jsonl or is there; see `JsonlTask`
        MODULE:FUNCTION        what the function returns, called with the options: a `Task`

    A function that scores the problems of a file is not a task but the `reward` of one:
    `find_task("problems.jsonl", reward="module:function")`. Raises BridgeError, in one line, for
    a name that leads nowhere and an option that is not known.
    """
    if name.startswith(PREFIX):
        generator = name.removeprefix(PREFIX)
        return GymTask(generator, **options)
    if name.endswith(".jsonl") or (exists(Path(name)) and not Path(name).is_dir()):
        _check_options(name, JsonlTask, options, name)
        return JsonlTask(name, **options)
    if ":" in name:
        return _made(name, options)
    raise BridgeError(
        f"task {name!r} is not known; give {PREFIX}NAME, a .jsonl file, or MODULE:FUNCTION"
    )


def _made(name: str, options: dict[str, Any]) -> Task:
    function = load_function(name, "task")
    _check_options(name, function, options)
    try:
        task = function(**options)
    except BridgeError:
        raise
    except (Exception, SystemExit) as error:
        raise BridgeError(f"task {name} fails ({describe(error)})") from None
    if not isinstance(task, Task):
        raise BridgeError(
            f"task {name}: the function must return a task, with name, size, problem, score and "
            f"read_answer, not {type(task).__name__}; what scores is the reward of a .jsonl file"
        )
    return task


def _check_options(
    name: str, function: Callable[..., Any], options: dict[str, Any], *given: str
) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of functions in C; calling says what is wrong
        return
    try:
        signature.bind(*given, **options)
    except TypeError as error:
        known = ", ".join([*signature.parameters][len(given) :]) or "none"
        raise BridgeError(f"task {name}: {error} (options: {known})") from None
