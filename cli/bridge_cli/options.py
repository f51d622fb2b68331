"""Options that several commands share, so that each means and says the same everywhere.

Defaults stand with each command.
"""

import json
import tomllib
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import typer


class Ranged:
    """Reads a number of an option as `bridge.numbers.ranges` has it: one line, before any work, for
    any that is out of its range."""

    def __init__(self, name: str) -> None:
        """`name`: in the table there."""
        self.name = name

    def __call__(self, value: Any) -> Any:
        """Of a text, or of the default. Raises BridgeError."""
        from bridge.numbers.ranges import RANGES

        return RANGES[self.name].read(self.name.rpartition(".")[2], value)


def number(name: str, kind: type[Any], *declared: str, **option: Any) -> Any:
    """A typer option for a number: `name` is in the table of ranges, the rest as `typer.Option`
    takes it; `kind` is int or float."""
    metavar = "INTEGER" if kind is int else "FLOAT"
    return typer.Option(*declared, parser=Ranged(name), metavar=metavar, **option)


def integer(name: str, *declared: str, **option: Any) -> Any:
    """The same for an integer."""
    return number(name, int, *declared, **option)


MaxNewTokens = Annotated[
    int | None,
    integer("max_new_tokens", help="Of each row; else 256, or what the context leaves."),
]
Temperature = Annotated[float, number("temperature", float, help="0 takes the likeliest token.")]
TopK = Annotated[int | None, integer("top_k", help="Keep the k likeliest tokens.")]
TopP = Annotated[float | None, number("top_p", float, help="Keep the likeliest, up to this sum.")]
MinP = Annotated[
    float | None, number("min_p", float, help="Keep what has this fraction of the likeliest.")
]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="A text that ends a row, or the name of a special token; repeat it."),
]
System = Annotated[str | None, typer.Option(help="The system message of the chat.")]
Raw = Annotated[
    bool, typer.Option("--raw", help="Feed prompts as they are, without a chat template.")
]
AnswerSeed = Annotated[int, integer("seed", help="The same seed gives the same answers.")]
Backend = Annotated[str | None, typer.Option(help="See bridge backends; else the best.")]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:0; else the best.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16, float64.")]
Weights = Annotated[
    str | None,
    typer.Option(help="int8 or int4: make the host's matrices integers; else as they are."),
]
Base = Annotated[Path | None, typer.Option(help="The host of an adapter.")]


def read_task_options(pairs: Sequence[str]) -> dict[str, Any]:
    """The options of a task, each KEY=VALUE.

    A value that TOML or JSON reads as a finite number, a text in quotes, true, false, null, or a
    list or table of such is that; every other, such as a word, nan or a date, stands for itself as
    a text. Raises BridgeError for what is not KEY=VALUE.
    """
    from bridge.errors import BridgeError, show
    from bridge.files.utf8 import is_text

    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise BridgeError(f"--task-options {pair!r}: write KEY=VALUE")
        if not is_text(value):
            raise BridgeError(f"--task-options {show(pair)}: is not UTF-8")
        options[key] = _value(value)
    return options


def _value(text: str) -> Any:
    from bridge.errors import BridgeError, show
    from bridge.files.strict_json import check_depth

    for read in (_by_toml, json.loads):
        try:
            value = read(text)
            check_depth(value)
        except ValueError:
            continue
        except RecursionError:
            raise BridgeError(
                f"--task-options {show(text)}: is nested too deeply; put it into a file"
            ) from None
        if _is_plain(value):
            return value
    return text


def _by_toml(text: str) -> Any:
    found = tomllib.loads(f"value = {text}")
    if len(found) > 1:  # a line break, and then keys
        raise ValueError
    return found["value"]


def _is_plain(value: Any) -> bool:
    """Whether it is what both TOML and JSON can say, or None."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, float):
        return isfinite(value)
    return value is None or isinstance(value, bool | int | str)
