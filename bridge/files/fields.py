"""What a run wrote down, read back: a plain value held against the types of a class.

A class of fields (a dataclass, whose keys are all that there may be, or a TypedDict, which may have
more) says what each is; a number may have a range, as `Annotated[int, RANGE]`, and a text be one of
some, as `Annotated[str, ("one", "other")]`. Whatever does not fit, in whatever depth, is a
BridgeError of one line that names the field.
"""

import sys
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import (
    Annotated,
    Any,
    NotRequired,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from bridge.errors import BridgeError, show
from bridge.numbers.ranges import Range, whole

Result = TypeVar("Result")
COUNT = whole(0, 2**53)  # what counts something, and is exact everywhere
Count = Annotated[int, COUNT]
LARGEST = sys.float_info.max
Number = Annotated[float, Range(float, -LARGEST, LARGEST, "a number")]
NAMES = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}


def read_as(kind: type[Result], raw: Any, where: str = "") -> Result:
    """A value as a class of fields; `where` it stands, such as `rows[0]`.

    Raises BridgeError for a field that is missing, not known, or of another type or range.
    """
    if not isinstance(raw, Mapping):
        raise BridgeError(f"{where or 'it'} must be an object, not {show(raw)}")
    dot = f"{where}." if where else ""
    hints = get_type_hints(kind, include_extras=True)
    if is_typeddict(kind):
        required = {name for name in hints if get_origin(hints[name]) is not NotRequired}
    else:
        assert is_dataclass(kind)
        required = {
            f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING
        }
        if unknown := [name for name in raw if name not in hints]:
            raise BridgeError(f"{dot}{show(unknown[0]).strip(chr(39))} is not known")
    for name in hints:
        if name in required and name not in raw:
            raise BridgeError(f"{dot}{name} is missing")
    found = {name: value_as(hints[name], raw[name], dot + name) for name in hints if name in raw}
    return kind(**{**raw, **found})  # of a TypedDict what it may have beside them, too


def value_as(hint: Any, value: Any, name: str) -> Any:
    """A value as what `hint` says. Raises BridgeError, by the name, for any other."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is NotRequired:
        return value_as(inner[0], value, name)
    if origin is Annotated and isinstance(inner[1], Range):
        if type(value) not in (int, inner[0]):
            raise BridgeError(f"{name} must be {NAMES[inner[0]]}, not {show(value)}")
        return inner[1].take(name, value)
    if origin is Annotated:
        if type(value) is not str or value not in inner[1]:
            raise BridgeError(f"{name} must be one of {', '.join(inner[1])}, not {show(value)}")
        return value
    if origin in (Union, types.UnionType):  # a type, or None
        return None if value is None else value_as(inner[0], value, name)
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            raise BridgeError(f"{name} must be a list, not {show(value)}")
        return origin(value_as(inner[0], v, f"{name}[{i}]") for i, v in enumerate(value))
    if is_dataclass(hint) or is_typeddict(hint):
        return read_as(cast(type[Any], hint), value, name)
    if type(value) is not hint:
        raise BridgeError(f"{name} must be {NAMES[hint]}, not {show(value)}")
    return value
