"""Where prompts come from: arguments, a file, or standard input.

An argument is a prompt, and `-` is all of standard input as one prompt, as is a pipe where no
prompt is given. A file holds many: one a line, as text or as JSON, by the rule of
`bridge.files.jsonl`.
"""

import io
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from bridge.errors import BridgeError, show
from bridge.files.jsonl import Line, lines_of, read_lines
from bridge.files.opening import MAX_TEXT
from bridge.files.utf8 import is_text
from bridge.text.chat import are_messages

if TYPE_CHECKING:
    from bridge.text.tokenizer import Tokenizer

STDIN = Path("-")
NOTHING = "no prompt given; pass one as an argument, by --file, or through a pipe"


def read_prompts(arguments: list[str], file: Path | None) -> list[Any]:
    """Prompts as texts or lists of messages, in the order given: arguments, then the file's.

    Each line of `file` that is not blank is a prompt. It holds JSON objects with `prompt` or
    `messages` if it is named `.jsonl`, or if its first line is such an object or begins as one.
    Raises BridgeError where there is nothing to read, or what is there cannot be read.
    """
    if not arguments and file is None:
        if sys.stdin is None or sys.stdin.isatty():
            raise BridgeError(NOTHING)
        arguments = ["-"]
    if arguments.count("-") + (file == STDIN) > 1:
        raise BridgeError("standard input (-) can be read only once")
    prompts: list[Any] = []
    for argument in arguments:
        prompts.append(_read_all() if argument == "-" else argument)
        if not is_text(argument):
            raise BridgeError(f"prompt {len(prompts) - 1}: cannot be read (it is not UTF-8)")
    if file is not None:
        prompts += _lines(file)
    return prompts


def check_words(prompts: list[Any], tokenizer: "Tokenizer | None") -> None:
    """The bundled model knows a few words, and would answer any others with nonsense."""
    for prompt in prompts:
        words = prompt.split() if isinstance(prompt, str) else []
        strange = [word for word in words if tokenizer and not _known(tokenizer, word)]
        if strange or not words:
            what = show(strange[0]) if strange else "messages"
            raise BridgeError(
                f"the bundled model knows nothing of {what}: it solves puzzles such as "
                "'3 5 2 7 = 8 ?'; for other prompts name a checkpoint directory first"
            )


def check_system(system: str | None, chat: bool, raw: bool, checkpoint: Path) -> None:
    """Raises BridgeError for a system message that would not be read."""
    if system is not None and not chat:
        why = "--raw leaves it out" if raw else f"{checkpoint} has no chat template"
        raise BridgeError(f"--system is part of a chat, but {why}; put it into the prompt")


def _known(tokenizer: "Tokenizer", word: str) -> bool:
    return tokenizer.decode(tokenizer.encode(word)).strip() == word


def _lines(file: Path) -> list[Any]:
    if file == STDIN:
        lines = list(lines_of(_standard_input(), "standard input"))
    else:
        lines = list(read_lines(file))
    if not lines:
        raise BridgeError(f"{_name(file)}: holds no prompt")
    if file.suffix == ".jsonl" or _is_record(lines[0].text):
        return [_record(line) for line in lines]
    return [line.text for line in lines]


def _read_all() -> str:
    """Standard input as one prompt, without the line breaks at its end."""
    name = _name(STDIN)
    try:
        data = _standard_input().read(MAX_TEXT + 1)
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise BridgeError(f"{name}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise BridgeError(f"{name}: is not UTF-8 (at byte {error.start})") from None
    if len(data) > MAX_TEXT:
        raise BridgeError(f"{name}: is larger than {MAX_TEXT // 10**6} MB")
    if not text.strip():
        raise BridgeError(f"{name}: holds no prompt")
    return text.replace("\r\n", "\n").rstrip("\n")


def _standard_input() -> BinaryIO:
    """Its bytes; of what stands in for it, too."""
    if hasattr(sys.stdin, "buffer"):
        return sys.stdin.buffer
    return io.BytesIO(sys.stdin.read().encode("utf-8", "surrogatepass"))


def _name(file: Path) -> str:
    return "standard input" if file == STDIN else str(file)


def _is_record(line: str) -> bool:
    """Whether a line is a prompt in JSON: one that is damaged is, too, and not a text to feed."""
    if re.match(r'\s*\{\s*"(prompt|messages)"\s*:', line):
        return True
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and ("prompt" in value or "messages" in value)


def _record(line: Line) -> Any:
    record = line.to_object()
    if ("prompt" in record) == ("messages" in record):
        raise BridgeError(f"{line.where}: must have prompt or messages, one of the two")
    prompt = record["prompt"] if "prompt" in record else record["messages"]
    if not (isinstance(prompt, str) or are_messages(prompt)):
        raise BridgeError(f"{line.where}: prompt must be text, messages a list of role and content")
    return prompt
