r"""Majority voting over the answers of a group: what each response concludes, and who wins.

Works on texts alone. Answers are compared as normalised text, and numbers as numbers: `1,200.0`,
`\$1200.` and `1200` agree. It reads answers and does not judge them: whether one is right is a
task's business.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"  # 1,200 is one number, 3,4 are two
# A minus sign between two values is a difference: 17-25 ends in 25.
NUMBER = re.compile(rf"(?:(?<![\w)\]}}])[-\u2212])?\\?\$?(?:{DIGITS}(?:\.\d+)?|\.\d+)(?:/\d+)?")
STATED = re.compile(r"\banswer\s*(?:is|:|=)[\s:*]*(?=([^\n]+))", re.IGNORECASE)
HASHES = re.compile(r"####\s*([^\n]+)")
AROUND = "$*`'\" "  # what formulas and Markdown put around an answer


@dataclass(frozen=True)
class Vote:
    """The outcome: `answer` has `count` of `total` votes; None where nobody answered."""

    answer: str | None
    count: int
    total: int  # responses, those without an answer included
    tallies: dict[str, int]  # most votes first, and of equal ones the earliest row's
    tied: bool  # whether another answer has as many


def majority(texts: Sequence[str], complete: Sequence[bool] | None = None) -> Vote:
    """The answer that most responses give; of equally frequent ones, the earliest row's.

    `texts`: the responses in row order. `complete`: whether each came to its end, one a text;
    None: all did. Raises ValueError where the two differ in length.
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

    In this order: the last `\boxed{...}` whose braces balance; what follows the last `####`; what
    follows the last "answer is" or "answer:", of an equation its right side; and else the last
    number, if the response is `complete`, since one that was cut off had not concluded.
    """
    boxed = last_boxed(text)
    if boxed is not None:
        return normalise(boxed) or None
    for pattern in (HASHES, STATED):
        if found := pattern.findall(text):
            stated = found[-1].rpartition("=")[2].strip() or found[-1]
            number = NUMBER.search(stated)
            return normalise(number.group() if number else stated) or None
    numbers = NUMBER.findall(text) if complete else []
    return normalise(numbers[-1]) if numbers else None


def normalise(answer: str) -> str:
    """Numbers in plain decimal form; other answers in lower case, without outer punctuation."""
    plain = answer.replace("\\$", "").replace("{,}", ",")  # LaTeX's dollars and thousands
    plain = plain.strip().strip(AROUND).rstrip(".,;:!").strip(AROUND)
    digits = plain.replace("\u2212", "-").replace("$", "")
    if NUMBER.fullmatch(digits):
        digits = digits.replace(",", "")
    try:
        number = Decimal(digits)
    except InvalidOperation:
        return " ".join(plain.lower().split())
    if not number.is_finite() or abs(number.adjusted()) > 100:
        return plain.lower()
    text = f"{number:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def last_boxed(text: str) -> str | None:
    """What is in the box that opens last, of those that close."""
    last: tuple[int, int] | None = None
    opened: list[int | None] = []  # where a box's inside starts; None for other braces
    for brace in re.finditer(r"(\\boxed)?\{|\}", text):
        if brace.group() != "}":
            opened.append(brace.end() if brace.group(1) else None)
        elif opened and (start := opened.pop()) is not None:
            last = max(last or (0, 0), (start, brace.start()))
    return None if last is None else text[slice(*last)]
