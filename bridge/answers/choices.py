"""The choice that an answer names by its letter, from A to J, with its text or a reason after it.

"(B) 12", "B) 12" and "A because B is wrong" name one; "(A) or (B)" and "(A) 3, (B) 4" do not.
"""

import re

from bridge.answers.trimming import trim

# A letter in brackets, with anything after it, or a bare one with a reason.
BECAUSE = r",?\s+(?:because|since|as)\b"
CHOICE = re.compile(rf"(?:\(?([A-J])\)(?=[\s,:.])|([A-J])(?={BECAUSE}))(.*)", re.DOTALL)
ANOTHER = re.compile(r"\b[A-J]\)|(?:\b(?:and|or|nor)\b|[,/&])\s*\(?[A-J]\b")


def read_choice(answer: str) -> str | None:
    """The letter of the one choice that an answer begins with; None where it is all there is."""
    found = CHOICE.fullmatch(trim(answer))
    if found is None:
        return None
    marked, bare, rest = found.groups()
    text = re.split(BECAUSE, rest, maxsplit=1)[0]  # a reason may speak of other choices
    return None if ANOTHER.search(text) else marked or bare
