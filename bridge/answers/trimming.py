r"""What stands around an answer and is none of it: Markdown, `$`, `\text{}`, a full stop.

Texts in, texts out. What is left keeps its own spelling: `$\frac{1}{2}$.` is `\frac{1}{2}`, and
`$5` stays `$5`, since that dollar is money. Only `respell` gives what has several spellings one.
"""

import re

FORMULAS = (("$$", "$$"), (r"\[", r"\]"), (r"\(", r"\)"), ("$", "$"))
DOLLAR = re.compile(r"(?<!\\)\$")
ELEMENT = re.compile(r"^<[A-Za-z]+>|</[A-Za-z]+>$")  # of HTML
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{(.{0,2000})\}", re.DOTALL)
BRACE = re.compile(r"\\.|([{}])", re.DOTALL)
# Commands that say how a text looks.
LOOKS = r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|bb)|mbox|boldsymbol)\s*"
WHOLE_LOOK = re.compile(rf"{LOOKS}\{{([^{{}}]*)\}}")
LETTER = re.compile(r"\(([A-Za-z])\)")
BRACKETS = re.compile(r"\([^()]*\)|\[[^][]*\]")
EQUALS = re.compile(r"(?<![<>!=])=(?!=)")
SEVERAL = re.compile(r"[,;]|\b(?:and|or)\b")
# What LaTeX says about looks, and spaces that say nothing.
SPELLINGS = [
    (re.compile(r"\\[dtc]frac(?![a-z])"), r"\\frac"),
    (re.compile(r"\\(?:left|right|displaystyle)(?![a-z])|\\[!,;: ]|\\(?=[%$])|(?<!\\)\$"), ""),
    (re.compile(r"\\boxed\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"(?<=[([{])\s+|\s+(?=[)\]}])"), ""),
    (re.compile(r"\s*,\s*"), ", "),
    (re.compile(r"\s*([+=])\s*"), r" \1 "),
]
# A name, maybe with words before it: x, x_1, f(2), that x, y-intercept, total cost. So is xy.
ALPHA = r"[^\W\d_\u00b2\u00b3\u00b9\u2070-\u209f]"
NAME = re.compile(
    rf"(?:(?:\\?{ALPHA}{{2,}}|[aAI]|{ALPHA}-{ALPHA}{{2,}})[\s:]+)*"
    rf"\\?{ALPHA}+(?:['\u2019-]{ALPHA}{{2,}})*"
    r"(?:_\{[^{}]*\}|_\w|[\u2080-\u2089'])*(?:\(\s*-?[^-+*/^()]*\))?"
)
# What makes of a number, or of what a name stands for, another one.
CHANGES = (
    r"twice|thrice|double|triple|half|minus|negative|sqrt|square\s+root|log|ln|lg|exp|sin|cos|tan|"
    r"(?:square|cube|reciprocal|inverse|opposite)\s+of"
)
CHANGED = re.compile(rf"\b(?:{CHANGES}|squared|cubed|doubled|tripled|halved)\b", re.IGNORECASE)
# Letters in arithmetic: functions, an x that is a sign between numbers, units in a sum.
ARITHMETIC = re.compile(
    r"\\?\b(?:frac|sqrt|binom|gcd|lcm|log|ln|sin|cos|tan)(?![A-Za-z])"
    r"|\\(?:times|cdot|div|pi|circ|[lr]floor|[lr]ceil)(?![A-Za-z])"
    r"|(?<=[0-9)%])\s*(?:x|of)\s*(?=[0-9(])"
)
VARIABLE = re.compile(rf"(?<![\\\w]){ALPHA}(?!{ALPHA})")  # of one letter
QUANTITY = re.compile(r"\\(?:sum|prod|int|lim)(?![a-z])|\|")
SUM = re.compile(r"\S\s*[-+*/\u00d7\u00f7]\s*\(*[0-9]")
UNIT = re.compile(rf"(?<=[0-9])\s+{ALPHA}{{2,}}")


def trim(text: str) -> str:
    """A text without white space, Markdown, quotation marks, a formula's delimiters, a box and
    closing punctuation around it, nor a closing bracket that nothing in it opens."""
    while True:
        before, text = text, _trim_once(text)
        if text == before:
            return text


def unwrap(text: str) -> str:
    r"""A trimmed text without a `\text{}` around all of it; of a lone letter in brackets, as in
    (B), the letter."""
    text = trim(text)
    while whole := WHOLE_LOOK.fullmatch(text):
        text = trim(whole.group(1))
    letter = LETTER.fullmatch(text)
    return letter.group(1) if letter else text


def without_looks(text: str) -> str:
    r"""A text with what is in its `\text{}`, `\mathrm{}` and the like, instead of them."""
    while text != (text := WHOLE_LOOK.sub(r"\1", text)):
        pass
    return text


def respell(text: str) -> str:
    r"""An unwrapped text with one spelling for looks and spaces: `(3,4)` as `(3, 4)`."""
    text = without_looks(unwrap(text))
    for spelling, instead in SPELLINGS:
        text = spelling.sub(instead, text)
    return " ".join(unwrap(text).split())


def right_side(text: str) -> str:
    """Of an equation or a chain of them that says what a name or a sum is, its last side; of
    several, of others, as 2x = 5 is, and of other texts, all."""
    left, right = _sides(text)
    return right if right and _is_value(left) else text


def is_unsolved(text: str) -> bool:
    """Whether a text is one equation that does not say what a name or a sum is: 2x = 5."""
    left, right = _sides(text)
    return bool(right) and not _is_value(left)


def has_variable(text: str) -> bool:
    """Whether anything but numbers and what is done with them is in it."""
    text = ARITHMETIC.sub(" ", respell(text))
    return bool(re.search(ALPHA, UNIT.sub("", text) if SUM.search(text) else text))


def _sides(text: str) -> tuple[str, str]:
    """The first and the last side of an equation; nothing where there is none, or several."""
    left, _, right = EQUALS.sub("\0", text).rpartition("\0")
    if not left or SEVERAL.search(BRACKETS.sub("", left)):
        return "", ""
    return left.split("\0")[0], right.strip()


def _is_value(left: str) -> bool:
    """Whether what equals it is its value: it has no variable or several, as m + n, is a lone name,
    or is what is asked for and never solved, as a sum is. Of one unknown, as in 2x, it is not."""
    if not has_variable(left) or QUANTITY.search(left):
        return True
    if len(set(VARIABLE.findall(respell(left)))) > 1 and not CHANGED.search(left):
        return True
    return bool(NAME.fullmatch(respell(left))) and not CHANGED.search(left)


def _trim_once(text: str) -> str:
    text = text.strip().strip("*`'\"\u2018\u2019\u201c\u201d ").rstrip(".,;:\u3002 ")
    text = ELEMENT.sub("", text)
    if (box := BOX.fullmatch(text)) and _one(box.group(1)):
        return box.group(1)
    for start, end in FORMULAS:
        inside = text[len(start) : len(text) - len(end)]
        whole = len(text) > len(start + end) and text.startswith(start) and text.endswith(end)
        # Two formulas with a word between them are not one.
        if whole and not (DOLLAR.search(inside) if start == "$" else end in inside):
            return inside
    if text.endswith("$") and len(DOLLAR.findall(text)) % 2:
        return text[:-1]
    if text.endswith((r"\)", r"\]")):
        return text if r"\(" in text or r"\[" in text else text[:-2]
    # Opened or not, [2, 5) is an interval.
    return _closed(_closed(text, "([", ")]"), "{", "}")


def _one(inside: str) -> bool:
    """Whether no brace in there closes what was opened before it."""
    depth = 0
    for brace in BRACE.findall(inside):
        depth += (brace == "{") - (brace == "}")
        if depth < 0:
            return False
    return True


def _closed(text: str, opening: str, closing: str) -> str:
    """A text without the brackets at its end that nothing opens."""
    excess = sum(map(text.count, closing)) - sum(map(text.count, opening))
    closed = len(text) - len(text.rstrip(closing))
    return text[: len(text) - min(excess, closed)] if excess > 0 else text
