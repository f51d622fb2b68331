r"""The number that an answer is: 1,200.5, -3, `\frac{1}{2}`, 3 1/2, 1.5e3, 25%, \$18, 12 apples.

Numbers are fractions, exactly. A bare one is a number and nothing else, as right answers are; a
quantity may have a unit, words around it and an equation before it, as answers in responses have.
Two numbers are none: tuples, dates, times, ranges and lists are not; nor is a bound, as in "at
least 5", a formula, as in 5x, and a number in words. Nothing here raises.
"""

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

from bridge.answers.trimming import CHANGES, EQUALS, right_side, trim, without_looks

LONGEST = 2000  # characters of what may be a number; longer ones would take their time
# Thousands are apart by commas or by spaces; 1,20 is no number, and 3,4 are two.
COUNT = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])|[0-9]{1,3}(?:[ ][0-9]{3})+(?![ ]?[0-9])|[0-9]+)"
DECIMAL = rf"(?:{COUNT}(?:\.[0-9]*)?|(?<!\.)\.[0-9]+)"
PART = r"(?:\{{\s*(?P<{0}>[^{{}}]*)\}}|(?P<{0}_digit>[0-9]))"
NUMERAL = re.compile(
    rf"""(?<![A-Za-z0-9_^\\])(?<![0-9]\.)(?P<sign>(?<![\w)\]}}%])[-+])?(?:
        (?P<whole>{COUNT})?\s*\\frac\s*{PART.format("top")}\s*{PART.format("bottom")}
      | (?:(?P<mantissa>{DECIMAL})\s*(?:\\times|\\cdot|[*x])\s*)?
        10\s*\^\s*(?:\{{\s*(?P<power>[-+]?[0-9]{{1,3}})\s*\}}|(?P<bare_power>[-+]?[0-9]{{1,3}}))
        (?![0-9])
      | (?:(?P<mixed>[0-9]+)[ ]+)?(?P<over>{DECIMAL})\s*/\s*(?P<under>{DECIMAL})
      | (?P<plain>{DECIMAL})(?:[eE](?P<exponent>[-+]?[0-9]{{1,3}})(?![0-9]))?
    )(?P<percent>\s*(?:%|per\ ?cent(?:age(?:\ points?)?)?\b|pct\b))?""",
    re.VERBOSE,
)
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
SCALE = re.compile(rf"\s*-?({'|'.join(SCALES)})s?\b", re.IGNORECASE)
# Words that make a number another one, or a bound: those before it, and those after it.
BEFORE = re.compile(
    rf"\b(?:{CHANGES}|third|quarter|dozen|root|power|plus|times|divided|over|than|different\s+from|"
    r"except|least|most|up|under|above|below|beyond|between|not|never|zero|one|two|three|four|five|"
    r"six|seven|eight|nine|ten)\b|\b(?:product|sum|difference|quotient)\s+of\s*$",
    re.IGNORECASE,
)
AFTER = re.compile(
    r"\b(?:half|halves|quarters?|dozens?|(?:third|fourth|fifth|sixth|eighth|tenth|hundredth|"
    r"thousandth)s?|bn|mn|mio|mrd|tn|pi|sqrt|root|squared|cubed|factorial|plus|minus|divided|"
    r"multiplied|doubled|tripled|halved|infinity|itself|below\s+(?:zero|freezing)|per\s?mille?|"
    r"basis\s+points?|(?:or|and)\s+(?:more|less|fewer|greater|above|below|higher|lower|up))\b",
    re.IGNORECASE,
)
# Words, also of units. A lone letter is a variable, unless it is a unit; so are two or three right
# after a number (5xy), unless they are.
UNITS = (
    "st|nd|rd|th|kg|mg|cm|mm|km|nm|ml|ft|in|yd|mi|lbs?|oz|hrs?|mins?|secs?|ms|yrs?|mph|kph|"
    "pts?|px|kb|mb|gb|tb|k?hz|kwh?|deg|usd|eur|gbp|am|pm"
)
ATTACHED = re.compile(rf"(?!(?:(?i:{UNITS})|[mgshlLV])(?![A-Za-z]))[A-Za-z]{{1,3}}(?![A-Za-z])")
WORDS = re.compile(
    r"(?:[\s,:;.'\u2019/-]|[^\W\d_\u0370-\u03ff\u2070-\u209f]{2,}+|[aAI]\b"
    r"|[^\W\d_A-Za-z\u0370-\u03ff\u2070-\u209f]"
    r"|(?<![A-Za-z])[mgshlLV](?![A-Za-z]))*+"
)
UNIT_POWER = re.compile(
    r"((?<![A-Za-z\\])(?:[A-Za-z]{2,}|[mgshlLV]))\s?\^\s?(?:[23]|-[12]|\{\s*(?:[23]|-[12])\s*\})"
)
# What explains an answer, or goes on after it.
CLAUSE = re.compile(
    r",?\s+(?:because|since|which|where|as|so|therefore|thus|hence|making|giving|meaning|given)\b"
    r"|,\s+(?:of|for|in|at|on|from|after|with|not|out|i\.?e\.?|the|that|who)\b",
    re.IGNORECASE,
)
REMARK = re.compile(
    r"\s\((?!\s*(?:or|and)\b)(?=[^()]*[A-Za-z]{2})[^()]*\)|\s*\\pmod\s*\{?\s*\w+\}?"
)
# Twelve (12): a number in words says the same.
IN_WORDS = re.compile(
    r"\b(?:(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|"
    r"six|seven|eigh|nine)teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty|hundred|thousand|million|"
    r"dozen|half|halves|thirds?|quarters?|and)\b[\s-]*)+\(([^()A-Za-z]*[0-9][^()A-Za-z]*)\)",
    re.IGNORECASE,
)
EQUAL = re.compile(r"\bis\s+equal\s+to\b|\bequals\b|(?<=\b[A-Za-z])\s+is\b(?:\s+equal\s+to\b)?")
OR = re.compile(r"\s*[,(]?\s*\bor\s+(?:about\s+)?")
RELATIONS = re.compile(r"[<>\u2260\u2264\u2265\u00b1]|!=|\\(?:neq?|leq?|geq?|lt|gt|pm|mp)(?![a-z])")
ABOUT = re.compile(r"\\approx|\\simeq|\\sim(?![a-z])|\u2248|~")

SIGNS = str.maketrans(
    {
        "\u2212": "-",
        "\u00d7": "*",
        "\u00b7": "*",
        "\u2044": "/",
        "\uff05": "%",
        **dict.fromkeys("\u00a0\u2009\u202f\t\n\r", " "),
    }
)
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
PIECES = [
    (re.compile(r",\s*\\!\s*"), ","),
    (re.compile(r"\\(?:left|right|displaystyle|textstyle)(?![a-z])|\\[!(\[\])]|\{\s*\}"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[,;: ]"), " "),
    (re.compile(r"\\[dtc]frac(?![a-z])"), r"\\frac"),
    (re.compile(r"(?:\^\s*\{?\s*\\circ\s*\}?|\\degree|\u00b0)\s*(?:[CF](?![A-Za-z]))?"), ""),
    (re.compile(r"\^\s*\{?\s*(st|nd|rd|th)\s*\}?(?![a-z])"), r"\1"),
    (re.compile(r"\\(?=[%$])"), ""),
    (re.compile(r"(?<![A-Za-z])[$\u00a3\u20ac\u00a5\u20b9]\s*"), ""),
]
LEADING_DASH = re.compile(r"^[\u2013-]\s*(?=[\d.\\])")
VULGAR = re.compile(r"[\u00bc-\u00be\u2150-\u215e]")
UPPER = re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")


@dataclass(frozen=True)
class Quantity:
    """A number; `percent`: it was written as one, and is a hundredth of what was written."""

    value: Fraction
    percent: bool = False


def read_number(text: str) -> Fraction | None:
    """The number that a text is, exactly; None where it is none, or has more beside it."""
    found = read_bare(text)
    return None if found is None else found.value


def read_bare(text: str) -> Quantity | None:
    """The number that a text is, with nothing beside it but its sign of percent or money."""
    clean = _clean(text)
    found = None if clean is None else NUMERAL.fullmatch(clean)
    return None if found is None else _value(found)


def read_quantity(text: str) -> Quantity | None:
    """The one number that an answer states, whatever its unit; None where it states none, or
    several, or a bound."""
    clean = _clean(text)
    if clean is None or RELATIONS.search(clean):
        return None
    clean = EQUAL.sub(" = ", IN_WORDS.sub(r"\1", REMARK.sub("", clean)))
    for part in ABOUT.split(clean):  # what is exact comes first: 1/3, about 0.33
        found = _stated(part)
        if found is not None:
            return found
    return None


def agree(right: Quantity, given: Quantity, tolerance: Fraction = Fraction(0)) -> bool:
    """Whether two numbers are the same, within `tolerance` times the right one.

    Where only one is a percentage, of 1 % or more, its sign may also have been left out: 25 %
    agrees with 0.25 and with 25, and 0.5 % with 0.005 alone.
    """

    def near(a: Fraction, b: Fraction) -> bool:
        return abs(b - a) <= tolerance * abs(a)

    if near(right.value, given.value):
        return True
    if right.percent == given.percent or abs(100 * (right if right.percent else given).value) < 1:
        return False
    if right.percent:
        return near(100 * right.value, given.value)
    return near(right.value, 100 * given.value)


def write_number(value: Fraction) -> str:
    """A number in plain decimal form; as a fraction in lowest terms where that has no end."""
    rest, twos, fives = value.denominator, 0, 0
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    if rest != 1:
        return str(value)
    places = max(twos, fives)
    digits = str(abs(value.numerator) * 10**places // value.denominator).zfill(places + 1)
    sign = "-" if value < 0 else ""
    return sign + (f"{digits[:-places]}.{digits[-places:]}" if places else digits)


def _clean(text: str) -> str | None:
    """A text with one spelling for what has several, and without signs of money; None: too long."""
    if len(text) > LONGEST:
        return None
    text = VULGAR.sub(lambda found: " " + unicodedata.normalize("NFKC", found.group()), text)
    text = UPPER.sub(lambda found: "^{" + found.group().translate(RAISED) + "}", text)
    text = without_looks(trim(text.translate(SIGNS)))
    for piece, instead in PIECES:
        text = piece.sub(instead, text)
    text = LEADING_DASH.sub("-", trim(text))
    for start, end in ("()", "{}"):
        inside = text[1:-1]
        if text.startswith(start) and text.endswith(end) and start not in inside:
            return inside.strip()
    return text


def _stated(text: str) -> Quantity | None:
    cut = CLAUSE.search(text)
    if cut and NUMERAL.search(text, 0, cut.start()):
        text = text[: cut.start()]
    side = right_side(text)
    if side is text and EQUALS.search(text):
        return None
    side = LEADING_DASH.sub("-", trim(UNIT_POWER.sub(r"\1", side)))
    numerals = list(NUMERAL.finditer(side))
    if len(numerals) == 2 and OR.fullmatch(side, numerals[0].end(), numerals[1].start()):
        one, other = map(_value, numerals)  # 1/2, or 0.5
        if one and other and one.value == other.value:
            side = side[: numerals[0].end()] + side[numerals.pop().end() :].lstrip(")")
    if len(numerals) != 1:
        return None
    [numeral] = numerals
    before, after = side[: numeral.start()], side[numeral.end() :]
    scale = SCALE.match(after)
    after = after[scale.end() :] if scale else after
    if before.rstrip().endswith(("-", "/")) or BEFORE.search(before) or not WORDS.fullmatch(before):
        return None
    if ATTACHED.match(after) or AFTER.search(after) or not WORDS.fullmatch(after):
        return None
    found = _value(numeral)
    if found is None or scale is None:
        return found
    if found.percent:
        return None
    return Quantity(found.value * 10 ** SCALES[scale.group(1).lower()])


def _value(found: re.Match[str]) -> Quantity | None:
    part = found.groupdict()
    try:
        if part["bottom"] is not None or part["bottom_digit"] is not None:
            top, bottom = (_number(part[p] or part[f"{p}_digit"]) for p in ("top", "bottom"))
            value = _mixed(part["whole"], top / bottom)
        elif power := part["power"] or part["bare_power"]:
            value = _number(part["mantissa"] or "1") * Fraction(10) ** int(power)
        elif part["over"] is not None:
            value = _mixed(part["mixed"], _number(part["over"]) / _number(part["under"]))
        else:
            value = _number(part["plain"]) * Fraction(10) ** int(part["exponent"] or 0)
    except (ValueError, ZeroDivisionError):
        return None
    value = -value if (part["sign"] or "").startswith("-") else value
    percent = part["percent"] is not None
    return Quantity(value / 100 if percent else value, percent)


def _mixed(whole: str | None, part: Fraction) -> Fraction:
    if whole is None:
        return part
    if not 0 < part < 1:
        raise ValueError("3 5/4 is no number")
    return _number(whole) + part


def _number(text: str) -> Fraction:
    if not re.fullmatch(rf"\s*[-+]?\s*{DECIMAL}\s*", text):
        raise ValueError("no number")
    return Fraction(re.sub(r"[\s,]", "", text))
