"""JSON read strictly: one object that says each key once, not too deep, and whose text is text.

A text goes in, or the file that holds it; a plain dict comes out, or what is wrong, in words that
follow the name of the place. What readers of JSON differ in is refused, never guessed.
"""

import json
from math import isfinite
from pathlib import Path
from typing import Any

from bridge.errors import BridgeError, one_line, show
from bridge.files.opening import read_text

MAX_DEPTH = 100  # of lists and objects within each other


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object, as `parse_object` takes it. Raises FileNotFoundError where there is no file.

    NaN and infinity are left to who knows the key: some write them into a config.
    """
    try:
        return parse_object(read_text(path), finite=False)
    except Unreadable as error:
        raise BridgeError(f"{path}: {error}") from None


class Unreadable(Exception):
    """What is wrong with a text, as a message says it after the name of the place."""


def parse_object(text: str, *, finite: bool = True) -> dict[str, Any]:
    """The JSON object that a text is. Raises Unreadable for anything else.

    Refuses a key that comes twice, since readers differ in which of the two they take; text with
    half a surrogate pair, which cannot be written; NaN, infinity and numbers beyond a float, which
    are no JSON, unless `finite` is off; and what is nested more than 100 deep.
    """
    endless: list[str] = []

    def number(said: str) -> float:
        value = float(said)
        if not isfinite(value):
            endless.append(said)
        return value

    try:
        value = json.loads(
            text, object_pairs_hook=_unique_keys, parse_float=number, parse_constant=number
        )
        check_depth(value)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise Unreadable("is not readable as JSON (nested too deeply)") from None
    except UnicodeEncodeError:
        raise Unreadable("holds half a surrogate pair, which is no text") from None
    except ValueError as error:
        raise Unreadable(f"is not readable as JSON ({why_not(error)})") from None
    if not isinstance(value, dict):
        raise Unreadable("must be a JSON object")
    if endless and finite:
        field = one_line(_not_finite(value, ""))
        raise Unreadable(f"{field} is {show(endless[0]).strip(chr(39))}, no number of JSON")
    return value


def check_depth(value: Any) -> None:
    """Raise RecursionError for lists and objects that are more than 100 deep in each other."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [item for held in level for item in _items(held) if type(item) in (list, dict)]
        if not level:
            return
    raise RecursionError


def why_not(error: ValueError) -> str:
    """Why a text is no JSON, or no TOML, without Python's advice to those who wrote the reader."""
    if "integer string conversion" in str(error):
        return "an integer of thousands of digits"
    return one_line(error)


def _items(held: Any) -> Any:
    return held.values() if isinstance(held, dict) else held if isinstance(held, list) else ()


def _not_finite(value: Any, name: str) -> str:
    """Where in a value the first number that is not finite stands, such as rows[0].score."""
    if isinstance(value, float):
        return "" if isfinite(value) else name or "the value"
    if isinstance(value, dict):
        inner = ((f"{name}.{key}" if name else str(key), item) for key, item in value.items())
    elif isinstance(value, list):
        inner = ((f"{name}[{i}]", item) for i, item in enumerate(value))
    else:
        return ""
    return next(filter(None, (_not_finite(item, where) for where, item in inner)), "")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`: an object. Raises ValueError for a key that comes twice."""
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"the key {show(key)} comes twice")
        seen[key] = value
    return seen


def among(value: Any, values: tuple[Any, ...]) -> bool:
    """Whether JSON's `value` is among `values`; to Python, unlike JSON, true is 1."""
    return any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in values)
