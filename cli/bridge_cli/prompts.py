"""Where prompts come from: arguments, a file, or standard input."""

import json
import sys
from pathlib import Path
from typing import Any

from bridge.errors import BridgeError

STDIN = Path("-")


def read_prompts(arguments: list[str], file: Path | None, lines: bool) -> list[Any]:
    """Prompts as texts or lists of messages, in the order given: arguments, then the file's.

    A file is one prompt; with `lines` each line that is not blank is one; a `.jsonl` file holds an
    object a line with `prompt` or `messages`. Without arguments and file, standard input is read.
    Raises BridgeError where there is nothing to read.
    """
    prompts: list[Any] = list(arguments)
    if file is None and not prompts:
        if sys.stdin is None or sys.stdin.isatty():
            raise BridgeError(
                "no prompt given; pass it as an argument, by --file, or through a pipe"
            )
        file = STDIN
    if file is not None:
        prompts += _read(file, lines)
    if not prompts:
        raise BridgeError(f"{'standard input' if file == STDIN else file}: holds no prompt")
    return prompts


def _read(file: Path, lines: bool) -> list[Any]:
    try:
        text = sys.stdin.read() if file == STDIN else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise BridgeError(f"{file}: cannot be read ({reason})") from None
    if file.suffix == ".jsonl":
        numbered = enumerate(text.splitlines(), 1)
        return [_record(file, number, line) for number, line in numbered if line.strip()]
    if lines:
        return [line for line in text.splitlines() if line.strip()]
    return [text.rstrip("\n")] if text.strip() else []


def _record(file: Path, number: int, line: str) -> Any:
    try:
        record = json.loads(line)
        prompt = record["prompt"] if "prompt" in record else record["messages"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BridgeError(
            f"{file}, line {number}: must be a JSON object with prompt or messages"
        ) from None
    messages = isinstance(prompt, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in prompt
    )
    if not (isinstance(prompt, str) or (messages and prompt)):
        raise BridgeError(
            f"{file}, line {number}: prompt must be text, messages a list of role and content"
        )
    return prompt
