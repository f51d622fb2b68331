"""How the commands write numbers, and text that they did not write themselves.

Nothing that comes out of `harmless` can steer a terminal, and nothing out of `harmless_line` can be
mistaken for a second message. Neither shortens: what messages quote, `bridge.errors` has shortened.
"""

import json
import sys
import unicodedata
from typing import Any

# Control; format, such as what reverses the writing direction; line and paragraph separators; and
# lone surrogates, which cannot be written at all.
STEERING = ("Cc", "Cf", "Zl", "Zp", "Cs")
JOINERS = "\u200c\u200d"  # format characters that some scripts and emoji need


def harmless(text: str) -> str:
    """Text of a model or a file, with control characters made visible; newlines and tabs stay."""
    return "".join(c if c in "\n\t" or not _steers(c) else _visible(c) for c in text)


def harmless_line(text: str) -> str:
    """Harmless text without line breaks."""
    return " ".join(harmless(text).split())


def _steers(c: str) -> bool:
    return unicodedata.category(c) in STEERING and c not in JOINERS


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
    """One JSON value on stdout, and nothing else."""
    text = json.dumps(value, ensure_ascii=False, indent=2)
    # A path may hold bytes that are no text; JSON has an escape for them.
    sys.stdout.write(text.encode("utf-8", "backslashreplace").decode() + "\n")
