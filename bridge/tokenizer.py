"""A checkpoint's tokenizer: text to ids and back, through the `tokenizers` library.

Reads `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`. No code of a checkpoint
is run but its chat template, in the sandbox of `bridge.chat`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream

from bridge.chat import Message, render_chat
from bridge.errors import BridgeError

SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class Tokenizer:
    """Text in, ids out, and back, also token by token."""

    def __init__(
        self,
        fast: FastTokenizer,
        special: dict[str, str] | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.fast = fast
        self.special = special or {}
        self.chat_template = chat_template

    @property
    def eos_token_id(self) -> int | None:
        """The id of `eos_token`; None where the tokenizer names none."""
        token = self.special.get("eos_token")
        return None if token is None else self.fast.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Ids of a raw text, with the special tokens that the tokenizer itself adds."""
        return self.fast.encode(text).ids

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to where the assistant speaks.

        Raises BridgeError where there is no chat template, or where it fails.
        """
        if self.chat_template is None:
            raise BridgeError("tokenizer_config.json: no chat_template; give a raw prompt")
        text = render_chat(self.chat_template, messages, self.special)
        return self.fast.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens."""
        return self.fast.decode(list(ids), skip_special_tokens=True)

    def streamer(self) -> "TextStream":
        """Decodes one response token by token."""
        return TextStream(self.fast)


class TextStream:
    """Text of a growing response: gives what each token adds, once whole characters are there."""

    def __init__(self, fast: FastTokenizer) -> None:
        self._fast = fast
        self._stream = DecodeStream(skip_special_tokens=True)
        self.text = ""

    def push(self, token: int) -> str:
        """Text that `token` adds; empty within a character of several tokens."""
        added = self._stream.step(self._fast, token) or ""
        self.text += added
        return added


def read_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint directory; None where there is no `tokenizer.json`.

    Raises BridgeError for files that cannot be read.
    """
    path = directory / "tokenizer.json"
    if not path.exists():
        return None
    try:
        fast = FastTokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise BridgeError(f"{path}: not a readable tokenizer ({_one_line(error)})") from None
    settings = _read_json(directory / "tokenizer_config.json")
    special = {}
    for name in SPECIAL_TOKENS:
        value = settings.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            special[name] = value
    return Tokenizer(fast, special, _chat_template(directory, settings))


def read_eos_ids(directory: Path) -> tuple[int, ...]:
    """`eos_token_id` of `generation_config.json`, as a tuple; empty where there is none."""
    value = _read_json(directory / "generation_config.json").get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise BridgeError(f"{directory / 'generation_config.json'}: eos_token_id must hold ids")
    return tuple(ids)


def _chat_template(directory: Path, settings: dict[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BridgeError(f"{path}: cannot be read ({_one_line(error)})") from None
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise BridgeError(f"{directory / 'tokenizer_config.json'}: chat_template must be text")
    return template


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BridgeError(f"{path}: not readable as JSON ({_one_line(error)})") from None
    if not isinstance(value, dict):
        raise BridgeError(f"{path}: must hold a JSON object")
    return value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
