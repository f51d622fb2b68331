"""Majority voting over the answers of a group: what each response concludes, and who wins.

Answers are compared as normalised text, numbers as numbers: `1,200.0`, `$1200` and `1200` agree.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

NUMBER = re.compile(r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?")
STATED = re.compile(r"\banswer\s*(?:is|:|=)\s*([^\n]+)", re.IGNORECASE)
HASHES = re.compile(r"####\s*([^\n]+)")


@dataclass(frozen=True)
class Vote:
    """The outcome: `answer` has `count` of `total` votes; None where nobody answered."""

    answer: str | None
    count: int
    total: int  # responses, those without an answer included
    tallies: dict[str, int]  # most votes first
    tied: bool  # whether another answer has as many


def majority(texts: Sequence[str], complete: Sequence[bool] | None = None) -> Vote:
    """The answer that most responses give; of equally frequent ones, the first row's.

    `complete`: whether each response came to its end; None: all did.
    """
    complete = [True] * len(texts) if complete is None else complete
    found = (extract_answer(text, whole) for text, whole in zip(texts, complete, strict=True))
    answers = [answer for answer in found if answer is not None]
    tallies = dict(Counter(answers).most_common())  # stable: first come first
    if not tallies:
        return Vote(None, 0, len(texts), {}, False)
    (answer, count), *others = tallies.items()
    return Vote(answer, count, len(texts), tallies, bool(others) and others[0][1] == count)


def extract_answer(text: str, complete: bool = True) -> str | None:
    r"""The final answer of a response, normalised; None where it has none.

    In this order: the last `\boxed{...}`, what follows the last `####`, what follows the last
    "answer is" or "answer:", and else the last number, if the response is `complete`.
    """
    boxed = _last_boxed(text)
    if boxed is not None:
        return normalise(boxed) or None
    for pattern in (HASHES, STATED):
        if found := pattern.findall(text):
            number = NUMBER.search(found[-1])
            return normalise(number.group() if number else found[-1]) or None
    numbers = NUMBER.findall(text) if complete else []
    return normalise(numbers[-1]) if numbers else None


def normalise(answer: str) -> str:
    """Numbers in plain decimal form; other answers in lower case, without outer punctuation."""
    plain = answer.strip().strip("$*`'\" ").rstrip(".,;:!").strip("$*`'\" ")
    try:
        number = Decimal(plain.replace(",", "").replace("$", ""))
    except InvalidOperation:
        return " ".join(plain.lower().split())
    if not number.is_finite() or abs(number.adjusted()) > 100:
        return plain.lower()
    text = f"{number:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, inside = 0, start + len("\\boxed")
    for at in range(inside, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[inside + 1 : at]
    return None
