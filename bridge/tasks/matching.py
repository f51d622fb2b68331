r"""The option `match`: whether an answer is the right one, exactly, as a number or as mathematics.

    exact     the same characters, also in case, apart from Markdown, `$`, `\text{}` and a full
              stop around them, and from looks: (3,4) is (3, 4), \dfrac is \frac; x = 5 is also 5,
              (B) is B, and "(B) 12" and "B because ..." are B where the right answer is a letter
    numeric   the same number, compared as fractions (`bridge.answers.numbers`): 1,200.0, \$1200,
              2400/2 and 1200 apples agree, and so do \frac{1}{2} and 0.5. 5% agrees with 0.05 and,
              as percentages of 1 and more do, with 5; within `tolerance` times the right one,
              where that is above 0
    math      the same number, or what the package math-verify holds for equal: 2\sqrt{2} and
              \sqrt{8}, {1, 2} and 2, 1. It reads words as products of letters, so that Paris
              equals sirap: for formulas only

What is given is the whole answer; none of these looks for it within a response. Right answers are
checked when they are read, given ones never raise. `math` may take long.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from bridge.answers.choices import read_choice
from bridge.answers.numbers import agree, read_bare, read_number, read_quantity
from bridge.answers.places import DATE, INLINE
from bridge.answers.trimming import (
    has_variable,
    is_unsolved,
    respell,
    right_side,
    trim,
    unwrap,
)
from bridge.errors import BridgeError
from bridge.numbers.ranges import take

__all__ = ["MATCHES", "check_match", "read_number"]

MATCHES = ("exact", "numeric", "math")
IS_DATE = re.compile(DATE)
ROOT = re.compile(r"\u221a\s*(?:\{([^{}]*)\}|\(([^()]*)\)|([0-9]+|[A-Za-z]))")
MARKS = str.maketrans({"\u2212": "-", "\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u00b0": ""})


def check_match(match: object, tolerance: object) -> Callable[[str, str], bool]:
    """The comparison `(right answer, given answer) -> bool` of that name; None: numeric where the
    right answer is a number, and exact where it is none.

    Raises BridgeError for an unknown name, for a tolerance that is none or has no use, and where
    math-verify is not installed.
    """
    tolerance = take("tolerance", tolerance)
    if tolerance and match not in (None, "numeric"):
        raise BridgeError(f"tolerance is for match=numeric, not for match={match}; leave it out")
    if match is None:
        return _Either(Fraction(str(tolerance)))
    if match == "exact":
        return _exact
    if match == "numeric":
        return _Numeric(Fraction(str(tolerance)))
    if match == "math":
        if find_spec("math_verify") is None:
            raise BridgeError(
                "match=math: math-verify is not installed; try: pip install 'bridge-llm[tasks]'"
            )
        return _math
    raise BridgeError(f"match {match!r} is not known; use one of {', '.join(MATCHES)}")


def _exact(right: str, given: str) -> bool:
    expected, given = respell(right), unwrap(given)
    if expected in (respell(given), respell(right_side(given))):
        return True
    return expected == read_choice(given)


class _Numeric:
    def __init__(self, tolerance: Fraction) -> None:
        self.tolerance = tolerance

    def __call__(self, right: str, given: str) -> bool:
        expected, found = read_bare(right), read_quantity(given)
        if expected is None or found is None:
            return False
        return agree(expected, found, self.tolerance)


class _Either(_Numeric):
    """By what the right answer is, whatever those of other problems are."""

    def __call__(self, right: str, given: str) -> bool:
        return _exact(right, given) if read_bare(right) is None else super().__call__(right, given)


def _math(right: str, given: str) -> bool:
    from math_verify import verify

    expected = _formula(right)
    if not expected:
        raise ValueError(f"math-verify cannot read the right answer {right!r}")
    if _exact(right, given) or _same(right, given):
        return True
    if IS_DATE.fullmatch(unwrap(right)) or IS_DATE.fullmatch(unwrap(given)):
        return False  # no difference of numbers
    if is_unsolved(given) and not has_variable(right):
        return False  # math-verify would take the right side of 2x = 5
    # A scorer keeps the time, also within C code, which math-verify's own alarm does not.
    return verify(expected, _formula(given), timeout_seconds=0)


_same = _Numeric(Fraction(0))


@lru_cache(maxsize=256)
def _formula(text: str) -> list[Any]:
    import logging

    from math_verify import LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of having no time limit
    formula = ROOT.sub(r"\\sqrt{\1\2\3}", trim(text).translate(MARKS))
    within = INLINE.findall(formula)
    if len(within) == 1:  # with words around it
        formula = trim(within[0])
    if len(within) < 2 and "\\boxed" not in formula:
        formula = rf"\boxed{{{formula}}}"
    # A formula that it cannot read is not the number that it might find in it.
    return parse(formula, [LatexExtractionConfig()], parsing_timeout=0)
