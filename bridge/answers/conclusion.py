r"""What a response concludes, normalised: what votes count and tasks compare as text.

The answer is found, trimmed and written in one way. Numbers are written as numbers: `1,200.0`,
`\$1200.` and `1200 apples` are the same, and so are `1/2`, `\frac{1}{2}` and `0.5`.
"""

from bridge.answers.choices import read_choice
from bridge.answers.numbers import read_quantity, write_number
from bridge.answers.places import find_answer
from bridge.answers.trimming import respell

LONGEST = 1000  # characters of a number that is written out


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
