"""TOML files of settings, read and written; Python itself only reads them."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridge.errors import BridgeError, show
from bridge.files.opening import read_text
from bridge.files.strict_json import check_depth, why_not


def read_toml(path: Path) -> dict[str, Any]:
    """A file's keys and values. Raises BridgeError of one line for what is no TOML."""
    try:
        found = tomllib.loads(read_text(path, links=True).removeprefix("\ufeff"))
        check_depth(found)
        return found
    except FileNotFoundError:
        raise BridgeError(f"{path}: no such file") from None
    except RecursionError:
        raise BridgeError(f"{path}: is not TOML that we read: nested too deeply") from None
    except ValueError as error:  # which is what an integer of thousands of digits is, too
        raise BridgeError(f"{path}: is not TOML: {why_not(error)}") from None


def write_toml(values: Mapping[str, Any]) -> str:
    """TOML of plain values, lists, and tables within each other."""
    return "".join(f"{_key(key)} = {_value(value)}\n" for key, value in values.items())


def _key(key: str) -> str:
    plain = key.isascii() and key.replace("-", "").replace("_", "").isalnum()
    return key if plain else _text(key)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        inner = ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(item) for item in value)}]"
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    raise BridgeError(
        f"{show(value)} cannot be written as TOML; use texts, numbers, lists or tables"
    )


def _text(value: str) -> str:
    # JSON's escapes are TOML's too; beyond ASCII nothing needs one, but for DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
