"""Text that UTF-8 can hold; it cannot where there are halves of surrogate pairs in it.

Such come of a command line or a path whose bytes are no text, and of JSON and tokenizers that cut a
pair in two. No tokenizer takes them, and no file of ours has them.
"""


def is_text(text: str) -> bool:
    """Whether it can be written as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def whole_text(text: str) -> str:
    """A text in which halves of surrogate pairs are replacement characters."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
