"""Rendering chat templates, in the process that `bridge.text.chat` bounds and ends.

Templates follow Hugging Face's conventions (trimmed blocks, loop controls, `raise_exception`,
`strftime_now`, `tojson` without HTML escapes), in Jinja's immutable sandbox. A request is a JSON
list: the processor's seconds, the template, the messages, the special tokens. The answer is `=`
and the text, or `!` and one line that says what is wrong. What takes too long is ended by the
kernel, and what takes too much memory ends itself; neither is answered.
"""

import errno
import json
import os
import signal
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bridge.errors import describe
from bridge.processes.child import Handler

MAX_TEXT = 10_000_000  # characters of a text
MAX_ADDED = 200_000  # characters that a template may add to four times what it is given
MAX_BITS = 4096  # of an integer


class _Generation(Extension):
    """`{% generation %}` marks what the assistant said, for training masks; the text stays."""

    tags = {"generation"}  # noqa: RUF012, Jinja's own form

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which refuses at once the arithmetic that could only run into a limit."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.filters["tojson"] = _tojson
        # Draws that no seed governs: what a model reads must be the same each time.
        del self.globals["lipsum"]
        del self.filters["random"]

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and (abs(left) > 1000 or abs(right) > 100):
            raise SecurityError("a power is too large")
        if operator == "*":
            for times, thing in ((left, right), (right, left)):
                if isinstance(thing, Sequence) and times * len(thing) > MAX_TEXT:
                    raise SecurityError("it repeats a string too often")
            numbers = [n for n in (left, right) if isinstance(n, int)]
            if len(numbers) == 2 and sum(n.bit_length() for n in numbers) > MAX_BITS:
                raise SecurityError("a number is too large")
        return super().call_binop(context, operator, left, right)


def render_with(_payload: bytes) -> Handler:
    """The handler that renders."""
    # Whoever started us may ignore or block the signal by which the kernel ends us.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    return _handle


def _handle(request: bytes) -> bytes:
    try:
        text = request.decode("utf-8", "surrogatepass")
        seconds, template, messages, tokens = json.loads(text)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        answer = _answer(template, messages, tokens, min(MAX_TEXT, MAX_ADDED + 4 * len(text)))
        signal.setitimer(signal.ITIMER_PROF, 0)
    except MemoryError:
        os._exit(errno.ENOMEM)
    return answer


def _answer(template: str, messages: list[Any], tokens: dict[str, str], longest: int) -> bytes:
    try:
        # Refuses half a surrogate pair, which no tokenizer takes.
        return b"=" + _render(template, messages, tokens, longest).encode("utf-8")
    except MemoryError:
        raise
    except TemplateError as error:
        reason = describe(error).removeprefix(f"{type(error).__name__}: ")
    except Exception as error:  # a template can cause any, Python's own SyntaxError too
        reason = describe(error)
    return b"!" + reason.encode("utf-8", "replace")


def _render(template: str, messages: list[Any], tokens: dict[str, str], longest: int) -> str:
    # What transformers gives a template.
    variables = {"messages": messages, "tools": None, "documents": None}
    pieces, length = [], 0
    for piece in _compiled(template).generate(
        {**tokens, **variables, "add_generation_prompt": True}
    ):
        length += len(piece)
        if length > longest:
            raise SecurityError("its text is too long")
        pieces.append(piece)
    return "".join(pieces)


@lru_cache(maxsize=4)
def _compiled(template: str) -> Template:
    """A template in an environment of its own: no template sees another."""
    return _Sandbox().from_string(template)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
