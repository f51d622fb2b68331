r"""Where in a response its answer stands: five places, each with a rule, or the first there is.

    tag       inside the last `<answer>...</answer>`
    boxed     inside the last `\boxed{...}` whose braces balance
    hashes    after the last `####`, to the end of its line
    number    the last number: 1,200.50, -3, 1/2; a minus after a value is a difference
    text      the whole response, without white space around it
    auto      tag, else boxed, else hashes, else after the last "answer is" or "answer:" (of an
              equation its right side, and the first number in it, if there is one), else number

Works on texts alone, and says nothing about whether an answer is right. An answer is never empty.
"""

import re
from collections.abc import Callable

from bridge.errors import BridgeError
from bridge.vote import AROUND, HASHES, NUMBER, STATED, last_boxed

TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)


def read_answer(response: str, where: str) -> str | None:
    """The answer that stands there, as it is written; None where there is none."""
    found = PLACES[where](response)
    return (found.strip() or None) if found is not None else None


def check_place(where: object) -> str:
    """Raise BridgeError unless it is a place to read answers from."""
    if where not in PLACES:
        raise BridgeError(f"extract {where!r} is not known; use one of {', '.join(PLACES)}")
    return str(where)


def _tag(response: str) -> str | None:
    found = TAG.findall(response)
    return found[-1] if found else None


def _hashes(response: str) -> str | None:
    found = HASHES.findall(response)
    return found[-1] if found else None


def _number(response: str) -> str | None:
    found = NUMBER.findall(response)
    return found[-1] if found else None


def _auto(response: str) -> str | None:
    for place in (_tag, last_boxed, _hashes, _stated):
        if (found := place(response)) is not None:
            return found
    return _number(response)


def _stated(response: str) -> str | None:
    """As votes read it (`bridge.vote.extract_answer`), but in its own spelling."""
    if not (found := STATED.findall(response)):
        return None
    stated = found[-1].rpartition("=")[2].strip() or found[-1]
    number = NUMBER.search(stated)
    return number.group() if number else stated.strip(AROUND).rstrip(".,;:!").strip(AROUND)


PLACES: dict[str, Callable[[str], str | None]] = {
    "tag": _tag,
    "boxed": last_boxed,
    "hashes": _hashes,
    "number": _number,
    "text": lambda response: response,
    "auto": _auto,
}
# What a prompt says so that the answer stands there.
INSTRUCTIONS = {
    "tag": "Give the final answer between <answer> and </answer>.",
    "boxed": r"Put the final answer in \boxed{}.",
    "hashes": "End with #### and the final answer.",
    "number": "End with the final answer, a number.",
    "text": "Give the answer and nothing else.",
    "auto": "Give the final answer between <answer> and </answer>.",
}
