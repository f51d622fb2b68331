r"""Where in a response its answer stands, whole and in its own spelling; None where it does not.

An answer may be tagged, boxed, after `####`, or stated in a sentence ("The answer is x = 5."); the
number that a response ends with is its answer where nothing else is. A place without any text in it
is none. Nothing here compares: "12 apples" and 12 are two answers to it.
"""

import re
from collections.abc import Iterable

from bridge.answers.trimming import trim

TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
HASHES = re.compile(r"(?<!#)####(?!#)\s*([^\n]+)")
STATED = re.compile(
    r"\banswers?[*_`\"']*\s*(?:is|are|:|=)[\s:*`]*(?:(?<=\n)[-\u2022]\s+)?(?=\S)"
    r"|^[ \t]*[#*][#* \t]*(?:the[ \t]+)?(?:final[ \t]+)?answer[* \t]*\n\s*(?=\S)",
    re.IGNORECASE | re.MULTILINE,
)
# What is said of an answer that stands elsewhere.
REMARK = re.compile(
    r"(?:(?:not|now|also|indeed|given|shown|\w+ly)\s+)?"
    r"(?:right|correct|wrong|incorrect|clear|above|below|as\s+follows|see\s.*)",
    re.IGNORECASE,
)
# Braces that open and close, those of boxes apart; a box of a bare number needs none.
BRACES = re.compile(r"\\[{}]|(\\(?:boxed|fbox)\s*)?\{|\}|\\(?:boxed|fbox)\s*(-?[0-9][0-9.,/]*)")
BETWEEN_BOXES = re.compile(r"[ $]*(?:[,;]|(?:,\s*)?(?:\\text\{\s*)?\b(?:and|or)\b\s*\}?)[ $]*")

# What a sentence may end at; and what has stops of its own: formulas and abbreviations.
ENDS = re.compile(r"\\[^A-Za-z\n]|\$\$|\$|\n|[.!?\u3002](?=[\"'*_`)\]\u201d\u2019$}]*(?:\s|$))")
CLOSED_BY = {r"\(": r"\)", r"\[": r"\]", "$$": "$$"}
INLINE = re.compile(r"\$(?! )(?:\\.|[^\n$\\])+?(?<! )\$(?![0-9])")
SHORT = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Prof|Rs|No|vs|ca|approx|sq)|\b[A-Za-z]\.[A-Za-z])\.$")

COUNT = r"(?:[0-9]{1,3}(?:(?:,|\{,\}|,?\\[,!;]\s?|[\u00a0\u2009\u202f])[0-9]{3})+(?![0-9])|[0-9]+)"
VALUE = rf"(?:{COUNT}(?:\.[0-9]+)?|\.[0-9]+)"
SIGN = r"(?:(?<![\w)\]}])[-\u2212])?"  # between two values it is a difference: 17-25 ends in 25
FRACTION = r"\\[dtc]?frac\s*(?:\{[^{}]*\}|[0-9])\s*(?:\{[^{}]*\}|[0-9])"
RAISED = r"[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]+"
POWER = rf"(?:\^\s*(?:\{{[^{{}}]*\}}|[-\u2212]?[0-9]+)|{RAISED})"
TIMES_POWER = rf"(?:\s*(?:\\times|\\cdot|[\u00d7*x])\s*10)?{POWER}"
ROOT = r"\\(?:sqrt|pi)(?![A-Za-z])(?:\s*\{[^{}]*\})?"
BASE = r"(?:_(?:\{\w+\}|[0-9]+)|[\u2080-\u2089]+)"
TAIL = r"(?:\s?\\?%|\s+(?:percent|hundred|thousand|million|billion|trillion)\b)?"
NUMERAL = (
    rf"(?>{SIGN}(?:(?:\$?{COUNT}\s*)?(?:{FRACTION}|{ROOT})|[0-9]+[ ][0-9]+/[0-9]+(?![0-9/])"
    rf"|\\?[$\u00a3\u20ac]?{VALUE}(?:[eE][-+]?[0-9]+(?!\w)|/{VALUE}|{TIMES_POWER}|{BASE})?){TAIL})"
)
DATE = (
    r"(?:[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}|[0-9]{1,2}/[0-9]{1,2}/[0-9]{2,4}"
    r"|[0-9]{1,2}\.[0-9]{1,2}\.[0-9]{4})(?![\w])"
)
TIME = r"[0-9]{1,2}:[0-9]{2}(?::[0-9]{2})?(?!\w)"
# What has numbers in it is taken whole; names and powers with a digit in them are no numbers.
NUMBER = re.compile(
    rf"(?<![\\A-Za-z])[A-Za-z]+(?:_\{{?[0-9]+\}}?|{POWER}|[0-9]\w*)"
    rf"|(?P<number>(?<![\w.-])(?:{DATE}|{TIME})"
    rf"|[(\[]\s*{NUMERAL}(?:\s*,\s*{NUMERAL})++\s*[)\]]|{NUMERAL})"
)


def find_answer(response: str, complete: bool = True) -> str | None:
    """The answer of a response: tagged, else boxed, else after `####` or stated, whichever comes
    last, and else its last number.

    A response that is not `complete`, since it was cut off, had not come to its last number.
    "The answer is correct" and the like are remarks, and answers only where there is no other.
    """
    for place in (tagged, last_boxed, _said):
        if (found := place(response)) is not None:
            return found
    if (number := last_number(response)) is not None:
        return number if complete else None
    return _said(response, remarks=True)


def tagged(response: str) -> str | None:
    """What the last `<answer>...</answer>` holds."""
    return _last(reversed(TAG.findall(response)))


def last_boxed(response: str) -> str | None:
    r"""What the box holds that opens last, of those that close; boxes with no more than a comma or
    "and" between them are one answer, from the first `\boxed` on."""
    boxes: list[tuple[int, int, str]] = []  # where a box begins and ends, and what it holds
    opened: list[tuple[int, int] | None] = []  # where a box and its inside begin; None: no box's
    for brace in BRACES.finditer(response):
        if brace.group(2):
            boxes.append((*brace.span(), trim(brace.group(2))))
        elif brace.group().endswith("{") and not brace.group().startswith(r"\{"):
            opened.append((brace.start(), brace.end()) if brace.group(1) else None)
        elif brace.group() == "}" and opened and (start := opened.pop()) is not None:
            boxes.append((start[0], brace.end(), response[start[1] : brace.start()].strip()))
    boxes = sorted(box for box in boxes if box[2])
    if not boxes:
        return None
    first, end, inside = boxes.pop()
    alone = True
    while boxes and BETWEEN_BOXES.fullmatch(response, boxes[-1][1], first):
        alone = alone and boxes[-1][2] == inside
        first = boxes.pop()[0]
    return inside if alone else response[first:end]


def after_hashes(response: str) -> str | None:
    """What follows the last `####`, to the end of its line."""
    return _last(trim(found) for found in reversed(HASHES.findall(response)))


def last_number(response: str) -> str | None:
    """The last number, with its sign of percent or money; of a date, a time, a tuple and a power,
    all of it."""
    numbers = [found for found in NUMBER.finditer(response) if found.group("number")]
    if not numbers:
        return None
    number = numbers[-1].group("number")
    formula = number.startswith("$") and response.startswith("$", numbers[-1].end())
    return number[1:] if formula else number


def _said(response: str, remarks: bool = False) -> str | None:
    """What is stated, or follows `####` after it; what is a remark only where `remarks` count."""
    for stated in reversed(list(STATED.finditer(response))):
        answer = trim(_sentence(response, stated.end()))
        if answer and (remarks or not REMARK.fullmatch(answer)):
            hashes = after_hashes(response[stated.end() :])
            return answer if hashes is None else hashes
    return after_hashes(response)


def _sentence(text: str, start: int) -> str:
    """From there to the end of the sentence, or of the line."""
    position, unclosed = start, set[str]()
    while found := ENDS.search(text, position):
        token, position = found.group(), found.end()
        if token == "\n":
            return text[start : found.start()]
        if token in CLOSED_BY and token not in unclosed:
            end = text.find(CLOSED_BY[token], position)
            position = end + 2 if end >= 0 else position
            unclosed |= {token} if end < 0 else set()
        elif token == "$" and (formula := INLINE.match(text, found.start())):
            position = formula.end()
            if formula.group()[-2] in ".?" and text[position : position + 1].isspace():
                return text[start:position]
        elif token in ".!?\u3002" and not SHORT.search(text, start, position):
            return text[start : found.start()]  # without the mark: 5! would be 120
    return text[start:]


def _last(found: Iterable[str]) -> str | None:
    """The first that holds anything, of those that come last first."""
    return next((text.strip() for text in found if text.strip()), None)
