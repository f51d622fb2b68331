"""What users see when their input is at fault: one line that names file, field and mend.

What a message quotes is of others, and may be of any length: at most a line of each is shown, with
both of its ends, wherever the message was made.
"""

import re
from pathlib import Path
from typing import Any

LINE, MESSAGE = 200, 1000  # characters of what is quoted, and of a whole message
# What is quoted: without white space, such as a path; or between quotation marks as `repr` sets
# them, which an apostrophe within a word is not. Where one does not end, each of its marks
# is read on from to the end of the text, so that the text must be of bounded length.
_RUN = re.compile(rf"\S{{{LINE + 1},}}")
_QUOTED = re.compile(rf"(?<!\w)(['\"])(?:(?!\1)[^\\\n]|\\.){{{LINE},}}+\1(?!\w)")


class BridgeError(Exception):
    """A mistake in what was given to Bridge. The command line prints it and exits with code 2."""

    def __init__(self, message: object = "") -> None:
        super().__init__(shorten_message(str(message)))


def shorten(text: str, most: int = LINE) -> str:
    """At most so many characters of a text: its two ends, where there is more in between."""
    if len(text) <= most:
        return text
    tail = 2 * (most - 1) // 5
    return f"{text[: most - 1 - tail]}…{text[len(text) - tail :]}"


def shorten_message(text: str) -> str:
    """A message with at most a line of each thing that it quotes."""
    if len(text) > 5 * MESSAGE:
        text = shorten(_RUN.sub(lambda found: shorten(found[0]), text), 5 * MESSAGE)
    if len(text) > LINE:
        text = _QUOTED.sub(lambda found: shorten(found[0]), text)
        text = _RUN.sub(lambda found: shorten(found[0]), text)
    return shorten(text, MESSAGE)


def show(value: Any) -> str:
    """A value from a file as a message quotes it: on one line, and not longer than a line."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer that Python will not write out
        text = f"a {type(value).__name__} too long to show"
    return one_line(text)


def one_line(text: object) -> str:
    """Text of others in one printable line of bounded length: its two ends, if there is more."""
    line = " ".join(shorten(str(text), 5 * LINE).split())
    if not line.isprintable():
        line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
    return shorten(line)


def show_path(path: Path) -> str:
    """A path that may not be one, such as with a NUL in it."""
    text = str(path)
    return text if text.isprintable() else one_line(text)


def describe(error: BaseException) -> str:
    """An exception in one line; its own text may raise, too."""
    try:
        text = one_line(error)
    except BaseException:
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
