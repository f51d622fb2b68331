r"""Whether an answer is the right one: exactly, as a number, or as mathematics.

    exact     the same characters, runs of white space counting as one space
    numeric   the same number, compared as fractions: 1,200.0, \$1200 and 2400/2 agree, and so do 5%
              and 0.05; within `tolerance` times the right one, where that is above 0
    math      what the package math-verify holds for equal: 2\sqrt{2} and \sqrt{8}, {1, 2} and 2, 1.
              It reads words as products of letters, so that Paris equals sirap: for formulas only

Right answers are checked when they are read, given ones never raise. `math` may take long.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from bridge.errors import BridgeError
from bridge.vote import AROUND

MATCHES = ("exact", "numeric", "math")
# Longer ones would take their time, 1e999999999 above all.
NUMERIC = re.compile(r"[-+]?(\d{1,1000}(\.\d{0,1000})?|\.\d{1,1000})(e[-+]?\d{1,3}|/\d{1,1000})?")


def check_match(match: object, tolerance: object) -> Callable[[str, str], bool]:
    """The comparison `(right answer, given answer) -> bool` of that name.

    Raises BridgeError for an unknown name, for a tolerance that is none or has no use, and where
    math-verify is not installed.
    """
    if not isinstance(tolerance, int | float) or not 0 <= tolerance < 1:
        raise BridgeError(f"tolerance must be a number from 0 to below 1, not {tolerance!r}")
    if tolerance and match != "numeric":
        raise BridgeError(f"tolerance is for match=numeric, not for match={match}; leave it out")
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


def read_number(text: str) -> Fraction | None:
    """The number that a text is, exactly; None where it is none, or one of absurd length."""
    plain = text.replace("\\$", "").replace("\\%", "%").replace("{,}", "").replace("\u2212", "-")
    plain = plain.strip().strip(AROUND).rstrip(".").replace("$", "")
    if re.search(r"\d,\d", plain) and not re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?%?", plain):
        return None
    percent = plain.endswith("%")
    plain = plain.removesuffix("%").strip().replace(",", "").lower()
    if not plain.isascii() or not NUMERIC.fullmatch(plain):
        return None
    try:
        return Fraction(plain) / (100 if percent else 1)
    except (ValueError, ZeroDivisionError):
        return None


def _exact(right: str, given: str) -> bool:
    return right.split() == given.split()


class _Numeric:
    def __init__(self, tolerance: Fraction) -> None:
        self.tolerance = tolerance

    def __call__(self, right: str, given: str) -> bool:
        expected, found = read_number(right), read_number(given)
        if expected is None or found is None:
            return False
        return abs(found - expected) <= self.tolerance * abs(expected)


def _math(right: str, given: str) -> bool:
    from math_verify import verify

    expected = _formula(right)
    if not expected:
        raise ValueError(f"math-verify cannot read the right answer {right!r}")
    # A scorer keeps the time, also within C code, which math-verify's own alarm does not.
    return verify(expected, _formula(given), timeout_seconds=0)


@lru_cache(maxsize=256)
def _formula(text: str) -> list[Any]:
    import logging

    from math_verify import parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of having no time limit
    plain = text.strip().strip("$").strip()
    return parse(plain if "\\boxed" in plain else rf"\boxed{{{plain}}}", parsing_timeout=0)
