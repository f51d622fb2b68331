r"""Majority voting over the answers of a group: what each response concludes, and who wins.

Works on texts alone, and reads in a response what a task reads (`extract="auto"`). Answers are
compared as normalised text, and numbers as numbers: `1,200.0`, `\$1200.` and `1200 apples` agree,
and so do `1/2`, `\frac{1}{2}` and `0.5`. It reads answers and does not judge them: whether one is
right is a task's business.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from bridge.answers.choices import read_choice
from bridge.answers.numbers import agree, read_bare, read_quantity, write_number
from bridge.answers.places import find_answer, last_boxed
from bridge.answers.trimming import respell

__all__ = ["Vote", "extract_answer", "last_boxed", "majority", "normalise", "together"]

LONGEST = 1000  # characters of a number that is written out


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
    found = [extract_answer(text, whole) for text, whole in zip(texts, complete, strict=True)]
    answers = [answer for answer in together(found) if answer is not None]
    tallies = dict(Counter(answers).most_common())  # stable: first come first
    if not tallies:
        return Vote(None, 0, len(texts), {}, False)
    (answer, count), *others = tallies.items()
    return Vote(answer, count, len(texts), tallies, bool(others) and others[0][1] == count)


def extract_answer(text: str, complete: bool = True) -> str | None:
    r"""The final answer of a response, normalised; None where it has none.

    The first there is of these: the last `<answer>...</answer>`; the last `\boxed{...}` whose
    braces balance; what follows the last `####`, or "answer is" or "answer:" to the end of the
    sentence; and else the last number, if the response is `complete`, since one that was cut off
    had not concluded.
    """
    found = find_answer(text, complete)
    return None if found is None else normalise(found) or None


def normalise(answer: str) -> str:
    """Numbers in plain decimal form, or as fractions in lowest terms, without their units, and
    percentages with their sign; of a choice its letter; other answers in lower case, without
    outer punctuation."""
    if (choice := read_choice(answer)) is not None:
        return choice.lower()
    number = read_quantity(answer)
    if number is not None:
        text = write_number(100 * number.value) + "%" if number.percent else None
        text = text or write_number(number.value)
        if len(text) <= LONGEST:
            return text
    return respell(answer).lower()


def together(answers: Sequence[str | None]) -> list[str | None]:
    """Normalised answers of one group, percentages as the number that others give for them: 25%
    is 25 where a row says so, else 0.25 where one does, and else stays as it is."""
    given = {a: number for a in answers if a is not None and (number := read_bare(a)) is not None}

    def same(answer: str | None) -> str | None:
        number = given.get(answer) if answer is not None else None
        if number is None or not number.percent:
            return answer
        written = (write_number(100 * number.value), write_number(number.value))
        return next((w for w in written if w in given and agree(number, given[w])), answer)

    return [same(answer) for answer in answers]
