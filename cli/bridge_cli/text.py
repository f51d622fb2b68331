"""How the commands write numbers, and text that they did not write themselves."""

import json
import sys
import unicodedata
from typing import Any


def harmless(text: str) -> str:
    """Text of a model or a file, with control characters made visible: nothing in it can steer the
    terminal."""
    return "".join(c if c in "\n\t" or not _steers(c) else _visible(c) for c in text)


def _steers(c: str) -> bool:
    # Cc: control; Cf: format, among them those that reverse the writing direction.
    return unicodedata.category(c) in ("Cc", "Cf") and c not in "\u200c\u200d"  # joiners of scripts


def _visible(c: str) -> str:
    # Unicode has pictures of the ASCII controls, in their order.
    return chr(0x2400 + ord(c)) if ord(c) < 0x20 else "\N{REPLACEMENT CHARACTER}"


def count(number: int) -> str:
    """134515008 as 134.5 M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def size(number: int) -> str:
    """Bytes, in decimal units."""
    for unit, bytes_ in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= bytes_:
            return f"{number / bytes_:.1f} {unit}"
    return f"{number} B"


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    json.dump(value, sys.stdout, ensure_ascii=False, indent=2)
    print()
