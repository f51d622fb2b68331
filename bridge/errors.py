"""What users see when their input is at fault: one line that names file, field and mend.

What a message quotes is of others, and may be of any length: at most a line of each is shown, with
both of its ends, wherever the message was made.
"""

import re

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
