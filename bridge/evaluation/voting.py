r"""Majority voting over the answers of a group: what each response concludes, and who wins.

Works on texts alone, and reads in a response what a task reads (`extract="auto"`). Answers are
compared as normalised text, and numbers as numbers: `1,200.0`, `\$1200.` and `1200 apples` agree,
and so do `1/2`, `\frac{1}{2}` and `0.5`. It reads answers and does not judge them: whether one is
right is a task's business.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from bridge.answers.conclusion import extract_answer
from bridge.answers.numbers import agree, read_bare, write_number


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
