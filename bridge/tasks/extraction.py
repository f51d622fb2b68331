r"""The option `extract`: where in a response its answer stands, and what a prompt says of that.

    tag       inside the last `<answer>...</answer>`
    boxed     inside the last `\boxed{...}` whose braces balance
    hashes    after the last `####`, to the end of its line
    number    the last number: 1,200.50, -3, 1/2, 25%; a minus after a value is a difference
    text      the whole response, without white space around it
    auto      tag, else boxed, else hashes or what follows "answer is" or "answer:" to the end of
              the sentence, whichever comes last, else number; what only says that "the answer is
              correct", or "below", is passed over

How each is found is in `bridge.answers.places`. An answer is the whole expression in its own
spelling, never empty, and says nothing about whether it is right. Votes
(`bridge.evaluation.voting`) read as `auto` does.
"""

from collections.abc import Callable

from bridge.answers.places import after_hashes, find_answer, last_boxed, last_number, tagged
from bridge.errors import BridgeError


def read_answer(response: str, where: str) -> str | None:
    """The answer that stands there, as it is written; None where there is none."""
    found = PLACES[where](response)
    return (found.strip() or None) if found is not None else None


def check_place(where: object) -> str:
    """Raise BridgeError unless it is a place to read answers from."""
    if not isinstance(where, str) or where not in PLACES:
        raise BridgeError(f"extract {where!r} is not known; use one of {', '.join(PLACES)}")
    return where


PLACES: dict[str, Callable[[str], str | None]] = {
    "tag": tagged,
    "boxed": last_boxed,
    "hashes": after_hashes,
    "number": last_number,
    "text": lambda response: response,
    "auto": find_answer,
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
