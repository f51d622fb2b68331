"""Where prompts come from: arguments, a file, or standard input.

An argument is a prompt, and `-` is all of standard input as one prompt, as is a pipe where no
prompt is given. A file holds many: one a line, as text or as JSON.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.errors import BridgeError

if TYPE_CHECKING:
    from bridge.tokenizer import Tokenizer

STDIN = Path("-")
NOTHING = "no prompt given; pass one as an argument, by --file, or through a pipe"


def read_prompts(arguments: list[str], file: Path | None) -> list[Any]:
    """Prompts as texts or lists of messages, in the order given: arguments, then the file's.

    Each line of `file` that is not blank is a prompt. It holds JSON objects with `prompt` or
    `messages` if it is named `.jsonl`, or if its first line is such an object. Raises BridgeError
    where there is nothing to read, or what is there cannot be read.
    """
    if not arguments and file is None:
        if sys.stdin is None or sys.stdin.isatty():
            raise BridgeError(NOTHING)
        arguments = ["-"]
    if arguments.count("-") + (file == STDIN) > 1:
        raise BridgeError("standard input (-) can be read only once")
    prompts: list[Any] = []
    for argument in arguments:
        prompts.append(_read(STDIN).rstrip("\n") if argument == "-" else argument)
        _check_text(argument, f"prompt {len(prompts) - 1}")
    if file is not None:
        prompts += _lines(file)
    return prompts


def check_words(prompts: list[Any], tokenizer: "Tokenizer | None") -> None:
    """The bundled model knows a few words, and would answer any others with nonsense."""
    for prompt in prompts:
        words = prompt.split() if isinstance(prompt, str) else []
        strange = [word for word in words if tokenizer and not _known(tokenizer, word)]
        if strange or not words:
            what = repr(strange[0]) if strange else "messages"
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
    lines = _read(file).split("\n")
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if file.suffix == ".jsonl" or _is_record(numbered[0][1]):
        return [_record(file, number, line) for number, line in numbered]
    return [line.rstrip("\r") for _, line in numbered]


def _read(file: Path) -> str:
    name = "standard input" if file == STDIN else str(file)
    try:
        text = sys.stdin.read() if file == STDIN else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise BridgeError(f"{name}: cannot be read ({reason})") from None
    _check_text(text, name)
    if not text.strip():
        raise BridgeError(f"{name}: holds no prompt")
    return text


def _check_text(text: str, name: str) -> None:
    """Bytes that are no text reach us as lone surrogates, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BridgeError(f"{name}: cannot be read (it is not UTF-8)") from None


def _is_record(line: str) -> bool:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and ("prompt" in value or "messages" in value)


def _record(file: Path, number: int, line: str) -> Any:
    where = f"{file}, line {number}"
    try:
        record = json.loads(line)
        prompt = record["prompt"] if "prompt" in record else record["messages"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BridgeError(f"{where}: must be a JSON object with prompt or messages") from None
    messages = isinstance(prompt, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in prompt
    )
    if not (isinstance(prompt, str) or (messages and prompt)):
        raise BridgeError(f"{where}: prompt must be text, messages a list of role and content")
    for text in [prompt] if isinstance(prompt, str) else [t for m in prompt for t in m.values()]:
        if isinstance(text, str):
            _check_text(text, where)
    return prompt
