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

MaxNewTokens = Annotated[
    int | None, typer.Option(help="Of each row; else 256, or what the context leaves.")
]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token.")]
TopK = Annotated[int | None, typer.Option(help="Keep the k likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(help="Keep the likeliest, up to this sum.")]
MinP = Annotated[float | None, typer.Option(help="Keep what has this fraction of the likeliest.")]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="A text that ends a row, or the name of a special token; repeat it."),
]
System = Annotated[str | None, typer.Option(help="The system message of the chat.")]
Raw = Annotated[
    bool, typer.Option("--raw", help="Feed prompts as they are, without a chat template.")
]
AnswerSeed = Annotated[int, typer.Option(help="The same seed gives the same answers.")]
Backend = Annotated[str | None, typer.Option(help="See bridge backends; else the best.")]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:0; else the best.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16, float64.")]
Base = Annotated[Path | None, typer.Option(help="The host of an adapter.")]


def read_task_options(pairs: Sequence[str]) -> dict[str, Any]:
    """The options of a task, each KEY=VALUE.

    A value that TOML or JSON reads as a finite number, a text in quotes, true, false, null, or a
    list or table of such is that; every other, such as a word, nan or a date, stands for itself as
    a text. Raises BridgeError for what is not KEY=VALUE.
    """
    from bridge.errors import BridgeError

    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise BridgeError(f"--task-options {pair!r}: write KEY=VALUE")
        options[key] = _value(value)
    return options


def _value(text: str) -> Any:
    for read in (_by_toml, json.loads):
        try:
            value = read(text)
        except (ValueError, RecursionError):
            continue
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
