r"""What stands around an answer and is none of it: Markdown, `$`, `\text{}`, a full stop.

Texts in, texts out. What is left keeps its own spelling: `$\frac{1}{2}$.` is `\frac{1}{2}`, and
`$5` stays `$5`, since that dollar is money.
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


def trim(text: str) -> str:
    """A text without white space, Markdown, quotation marks, a formula's delimiters, a box and
    closing punctuation around it, nor a closing bracket that nothing in it opens."""
    while True:
        before, text = text, _trim_once(text)
        if text == before:
            return text


def plain(text: str) -> str:
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


def right_side(text: str) -> str:
    """Of an equation or a chain of them its last side; of several, and of other texts, all."""
    left, equals, right = EQUALS.sub("\0", text).rpartition("\0")
    several = SEVERAL.search(BRACKETS.sub("", left))
    return right.strip() if equals and not several and right.strip() else text


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
