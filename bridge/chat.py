"""Chat templates: code from a checkpoint, so it runs in a sandbox that can neither escape nor hang.

Templates follow Hugging Face's conventions (trimmed blocks, loop controls, `raise_exception`,
`strftime_now`, `tojson` without HTML escapes). Over Jinja's immutable sandbox there are limits on
loop turns, on numbers, on what a single operation may make, on the length of the text, and on the
processor's time, of which a template that is meant well takes some thousandths of a second.
"""

import functools
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import Environment, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from bridge.errors import BridgeError
from bridge.reading import one_line

MAX_TURNS = 200_000
MAX_LENGTH = 10_000_000
MAX_SOURCE = 200_000  # characters of a template
MAX_ADDED = 200_000  # characters that a template may add to four times what it is given
MAX_BITS = 4096  # of an integer
MAX_SECONDS = 5.0  # of processor time
# Filters that may make more than they are given.
GROWING = ("batch", "center", "format", "indent", "join", "replace", "slice", "wordwrap")
# Filters whose work is more than their input's size, and that no chat template has a use for.
REMOVED = ("pprint", "random", "striptags", "sum", "urlize", "xmlattr")

Message = Mapping[str, str]


class _Generation(Extension):
    """`{% generation %}` marks what the assistant said, for training masks; the text stays."""

    tags = {"generation"}  # noqa: RUF012, Jinja's own form

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with a budget that every loop turn and macro call draws on."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
            finalize=_finalize,
        )
        self.turns = 0
        self.started = time.thread_time()
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.globals |= {"_turn": self._turn, "_concat": _concat, "_tick": self._tick}
        del self.globals["lipsum"]
        for name in REMOVED:
            del self.filters[name]
        self.filters["tojson"] = _tojson
        self.filters = {name: self._limited(f) for name, f in self.filters.items()}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        for loop in (*template.find_all(nodes.For), *template.find_all(nodes.Macro)):
            turn = nodes.Call(nodes.Name("_turn", "load"), [], [], None, None)
            loop.body.insert(0, nodes.Output([turn]))
        _Hooks(self).visit(template)
        template.set_environment(self)
        return template

    def _turn(self) -> str:
        self.turns += 1
        if self.turns > MAX_TURNS:
            raise SecurityError("it loops too long")
        return self._tick("")

    def _tick(self, value: Any) -> Any:
        """`value`, if there is time left. Whatever may take long passes here again and again."""
        if time.thread_time() - self.started > MAX_SECONDS:
            raise SecurityError("it takes too long")
        return value

    def _limited(self, function: Any) -> Any:
        """A filter whose input is checked, since filters do not pass through `call`."""

        @functools.wraps(function)  # keeps Jinja's mark for filters that want the environment
        def limited(*args: Any, **kwargs: Any) -> Any:
            self._tick(None)
            # What comes one by one is gathered first, or its size would not be known.
            args = tuple(_gather(a) if isinstance(a, Iterator) else a for a in args)
            given = [a for a in args if not isinstance(a, Environment | Context | EvalContext)]
            for value in (*given, *kwargs.values()):
                if _size(value) > MAX_LENGTH:
                    raise SecurityError("a list is too long")
            if function.__name__.removeprefix("do_") in GROWING:
                _check_growth(given[0] if given else "", given[1:], kwargs)
            return function(*args, **kwargs)

        return limited

    def getitem(self, obj: Any, argument: Any) -> Any:
        return self._tick(super().getitem(obj, argument))

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self._tick(None)
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):  # a method of a string
            args = tuple(_gather(a) if isinstance(a, Iterator) else a for a in args)
            _check_growth(owner, args, kwargs)
        return super().call(context, obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Any:
        owner = getattr(value, "__self__", None)
        if isinstance(owner, str):  # str.format, which Jinja runs without `call`
            _check_growth(owner, (), {})
        return super().wrap_str_format(value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self._tick(None)
        if operator == "*":
            for times, thing in ((left, right), (right, left)):
                if isinstance(thing, Sequence) and times * len(thing) > MAX_LENGTH:
                    raise SecurityError("it repeats a string too often")
            numbers = [n for n in (left, right) if isinstance(n, int)]
            if len(numbers) == 2 and sum(n.bit_length() for n in numbers) > MAX_BITS:
                raise SecurityError("a number is too large")
        elif operator == "+" and isinstance(left, Sequence):
            if len(left) + len(right) > MAX_LENGTH:
                raise SecurityError("its text is too long")
        elif operator == "**" and (abs(left) > 1000 or abs(right) > 100):
            raise SecurityError("a power is too large")
        elif operator == "%" and isinstance(left, str):
            _check_growth(left, (right,), {})
        return super().call_binop(context, operator, left, right)


class _Hooks(NodeTransformer):
    """Turns `a ~ b` into a call, so that its length is checked, and looks at the time after every
    comparison and test, which may read all of a long text."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Call(nodes.Name("_concat", "load"), node.nodes, [], None, None)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        return self._timed(node)

    def visit_Test(self, node: nodes.Test) -> nodes.Node:
        return self._timed(node)

    def _timed(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Call(nodes.Name("_tick", "load"), [node], [], None, None)


def render_chat(template: str, messages: Sequence[Message], tokens: Mapping[str, str]) -> str:
    """The text of a conversation up to where the assistant speaks.

    `tokens` are the special tokens that templates name (`bos_token`, `eos_token`, ...). Raises
    BridgeError, in one line, for whatever goes wrong in the template.
    """
    variables = {**tokens, "messages": list(messages), "add_generation_prompt": True, "tools": None}
    try:
        if len(template) > MAX_SOURCE:
            raise SecurityError(f"it is longer than {MAX_SOURCE} characters")
        pieces, length = [], 0
        longest = min(MAX_LENGTH, MAX_ADDED + 4 * (len(template) + _size(list(messages))))
        for piece in _Sandbox().from_string(template).generate(variables):
            length += len(piece)
            if length > longest:
                raise SecurityError("its text is too long")
            pieces.append(piece)
        text = "".join(pieces)
        text.encode("utf-8")  # refuses half a surrogate pair, which no tokenizer takes
        return text
    except TemplateError as error:
        reason = one_line(error) or type(error).__name__
    except Exception as error:  # a template can cause any, Python's own SyntaxError too
        reason = one_line(f"{type(error).__name__}: {error}")
    raise BridgeError(f"tokenizer_config.json: chat_template fails: {reason}; try a raw prompt")


def _concat(*parts: Any) -> str:
    if sum(map(_size, parts)) > MAX_LENGTH:
        raise SecurityError("its text is too long")
    return "".join(str(part) for part in parts)


def _finalize(value: Any) -> Any:
    """What an expression prints, once it is known to be short enough to write out."""
    if not isinstance(value, str) and _size(value) > MAX_LENGTH:
        raise SecurityError("its text is too long")
    return value


def _gather(items: Iterator[Any]) -> list[Any]:
    """The items of what can be read once, as far as they fit."""
    gathered, size = [], 0
    for item in items:
        size += _size(item)
        if size > MAX_LENGTH:
            raise SecurityError("a list would grow too long")
        gathered.append(item)
    return gathered


def _size(value: Any) -> int:
    """About how many characters a value takes when it is written out; counts no further than just
    above MAX_LENGTH, since lists may hold one another many times over."""
    size, left = 0, [value]
    while left and size <= MAX_LENGTH:
        item = left.pop()
        if isinstance(item, str | bytes):
            size += len(item)
        elif isinstance(item, Mapping):
            size += 8
            left += (*item.keys(), *item.values())
        elif isinstance(item, range):
            size += 8 * len(item)
        elif isinstance(item, list | tuple | set | frozenset):
            size += 8 + len(item)
            left += item
        else:
            size += 8
    return size


def _check_growth(text: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse an operation on a string that could make one far longer than its parts.

    No operation of Jinja or of Python's strings makes more than the product of the lengths of its
    operands, or the widths given as numbers or within a format.
    """
    growth = _size(text) + 1
    for value in (*args, *kwargs.values()):
        if isinstance(value, int):
            growth = max(growth, abs(value))
        elif value is not None:
            growth *= _size(value) + 1
    if isinstance(text, str) and re.search(r"[%{][^%}]*\d{4}", text):
        raise SecurityError("a format is too wide")
    if growth > 10 * MAX_LENGTH:
        raise SecurityError("a string would grow too long")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
    _check_growth("", [indent or 0], {})
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
