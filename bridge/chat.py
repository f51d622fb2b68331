"""Chat templates: code from a checkpoint, so it runs in a sandbox that can neither escape nor hang.

Templates follow Hugging Face's conventions (trimmed blocks, loop controls, `raise_exception`,
`strftime_now`, `tojson` without HTML escapes). Over Jinja's immutable sandbox there are limits on
loop turns, on numbers that size a string, and on the length of the text.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence, Sized
from datetime import datetime
from typing import Any

from jinja2 import Environment, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from bridge.errors import BridgeError

MAX_TURNS = 200_000
MAX_LENGTH = 10_000_000

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
        )
        self.turns = 0
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.globals |= {"_turn": self._turn, "_concat": _concat}
        del self.globals["lipsum"]
        self.filters["tojson"] = _tojson
        for name in ("batch", "center", "format", "indent", "join", "replace", "slice", "wordwrap"):
            self.filters[name] = _limited(self.filters[name])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        for loop in (*template.find_all(nodes.For), *template.find_all(nodes.Macro)):
            turn = nodes.Call(nodes.Name("_turn", "load"), [], [], None, None)
            loop.body.insert(0, nodes.Output([turn]))
        _Concats(self).visit(template)
        template.set_environment(self)
        return template

    def _turn(self) -> str:
        self.turns += 1
        if self.turns > MAX_TURNS:
            raise SecurityError("it loops too long")
        return ""

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):  # a method of a string
            _check_growth(owner, args, kwargs)
        return super().call(context, obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Any:
        owner = getattr(value, "__self__", None)
        if isinstance(owner, str):  # str.format, which Jinja runs without `call`
            _check_growth(owner, (), {})
        return super().wrap_str_format(value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for times, thing in ((left, right), (right, left)):
                if isinstance(thing, Sequence) and times * len(thing) > MAX_LENGTH:
                    raise SecurityError("it repeats a string too often")
        elif operator == "+" and isinstance(left, Sequence):
            if len(left) + len(right) > MAX_LENGTH:
                raise SecurityError("its text is too long")
        elif operator == "**" and (abs(left) > 1000 or abs(right) > 100):
            raise SecurityError("a power is too large")
        elif operator == "%" and isinstance(left, str):
            _check_growth(left, (), {})
        return super().call_binop(context, operator, left, right)


class _Concats(NodeTransformer):
    """Turns `a ~ b` into a call, so that its length is checked."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Call(nodes.Name("_concat", "load"), node.nodes, [], None, None)


def render_chat(template: str, messages: Sequence[Message], tokens: Mapping[str, str]) -> str:
    """The text of a conversation up to where the assistant speaks.

    `tokens` are the special tokens that templates name (`bos_token`, `eos_token`, ...). Raises
    BridgeError, in one line, for whatever goes wrong in the template.
    """
    variables = {**tokens, "messages": list(messages), "add_generation_prompt": True, "tools": None}
    try:
        pieces, length = [], 0
        for piece in _Sandbox().from_string(template).generate(variables):
            length += len(piece)
            if length > MAX_LENGTH:
                raise SecurityError("its text is too long")
            pieces.append(piece)
        return "".join(pieces)
    except TemplateError as error:
        reason = str(error) or type(error).__name__
    except (ArithmeticError, RecursionError, MemoryError) as error:
        reason = f"{type(error).__name__} {error}"
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
    reason = " ".join(reason.split())
    raise BridgeError(f"tokenizer_config.json: chat_template fails: {reason}; try a raw prompt")


def _concat(*parts: Any) -> str:
    texts = [str(part) for part in parts]
    if sum(map(len, texts)) > MAX_LENGTH:
        raise SecurityError("its text is too long")
    return "".join(texts)


def _check_growth(text: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse an operation on a string that could make one far longer than its parts.

    No operation of Jinja or of Python's strings makes more than the product of the lengths of its
    operands, or the widths given as numbers or within a format.
    """
    growth = len(text) + 1 if isinstance(text, Sized) else 1
    for value in (*args, *kwargs.values()):
        if isinstance(value, Sized):
            growth *= len(value) + 1
        elif isinstance(value, int):
            growth = max(growth, abs(value))
    if isinstance(text, str) and re.search(r"[%{][^%}]*\d{4}", text):
        raise SecurityError("a format is too wide")
    if growth > 10 * MAX_LENGTH:
        raise SecurityError("a string would grow too long")


def _limited(function: Any) -> Any:
    """A filter whose growth is checked, since filters do not pass through `call`."""

    @functools.wraps(function)  # keeps Jinja's mark for filters that want the environment
    def limited(*args: Any, **kwargs: Any) -> Any:
        sized = [a for a in args if isinstance(a, Sized | int)]
        _check_growth(sized[0] if sized else "", sized[1:], kwargs)
        return function(*args, **kwargs)

    return limited


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
    _check_growth("", [indent or 0], {})
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
