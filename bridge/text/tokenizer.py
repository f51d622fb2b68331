"""A checkpoint's tokenizer: text to ids and back, through the `tokenizers` library.

Reads `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`. No code of a checkpoint
is run but its chat template, in the sandbox of `bridge.text.chat`.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from bridge.errors import BridgeError, one_line, show
from bridge.files.opening import exists, read_text
from bridge.files.strict_json import read_object
from bridge.text.chat import Message, render_chat
from bridge.text.continuation import Continuation
from bridge.text.streaming import Step, TextStream, is_failure, step_maker

MAX_TOKEN = 1000  # characters of a special token
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
        with _refusing("tokenizer.json: cannot read this text"):
            return self.fast.encode(text).ids

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to where the assistant speaks.

        Raises BridgeError where there is no chat template, or where it fails.
        """
        if self.chat_template is None:
            raise BridgeError("tokenizer_config.json: no chat_template; give a raw prompt")
        text = render_chat(self.chat_template, messages, self.special)
        with _refusing("tokenizer.json: cannot read what chat_template makes"):
            return self.fast.encode(text, add_special_tokens=False).ids

    def encode_after(self, prompt: Sequence[int], text: str, name: str) -> list[int]:
        """Ids of a text as a row would say it after the ids of a prompt, so that both decoded are
        the prompt and the text. Raises BridgeError, which calls it `name`, where none are."""
        with _refusing(f"{name}: tokenizer.json cannot read this text"):
            return self._continuation.encode(prompt, text, name)

    def lead(self, messages: Sequence[Message], text: str) -> str:
        """The white space that the chat template puts before an answer such as `text`, where a text
        cannot show it: a tokenizer that reads a space before every text leaves one out of what rows
        say. Empty where the template shows none, or not this text."""
        if not self._continuation.spaced or self.chat_template is None or not text[:1].strip():
            return ""
        turns = [*messages, {"role": "assistant", "content": text}]
        try:
            asked = render_chat(self.chat_template, messages, self.special)
            answered = render_chat(self.chat_template, turns, self.special)
        except BridgeError:
            return ""
        said = answered.removeprefix(asked) if answered.startswith(asked) else ""
        lead = said[: len(said) - len(said.lstrip())]
        return lead if said[len(lead) :].startswith(text.rstrip()) else ""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens: all that a streamer gives of them."""
        stream = self.streamer()
        with _refusing("tokenizer.json: cannot write these ids"):
            return "".join([*(stream.push(int(i)) for i in ids), stream.finish()])

    def streamer(self) -> TextStream:
        """Decodes one row token by token."""
        return TextStream(self._spell, self._new_steps())

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """The ids of the special tokens, which are never part of a text, by their names."""
        added = self.fast.get_added_tokens_decoder()
        return {token.content: i for i, token in added.items() if token.special}

    @cached_property
    def _continuation(self) -> Continuation:
        return Continuation(self.fast)

    @cached_property
    def _new_steps(self) -> Callable[[], list[Step]]:
        return step_maker(self.fast.decoder)

    def _spell(self, token: int) -> str | None:
        piece = self.fast.id_to_token(token)
        return None if piece in self.special_ids else piece


def read_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint directory; None where there is no `tokenizer.json`.

    Raises BridgeError for files that cannot be read.
    """
    path = directory / "tokenizer.json"
    if not exists(path):
        return None
    text = read_text(path)
    with _refusing(f"{path}: not a readable tokenizer"), _silent_panics():
        fast = FastTokenizer.from_str(text)
        # A prompt is neither cut nor filled up, whatever the tokenizer did when it was trained.
        fast.no_truncation()
        fast.no_padding()
        fast.decode(fast.encode("Bridge 1").ids)  # what it lacks may only show in use
    settings = _read_json(directory / "tokenizer_config.json")
    special = {}
    for name in SPECIAL_TOKENS:
        value = settings.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            if len(value) > MAX_TOKEN:
                where = directory / "tokenizer_config.json"
                raise BridgeError(f"{where}: {name} is longer than {MAX_TOKEN} characters")
            special[name] = value
    return Tokenizer(fast, special, _chat_template(directory, settings))


def read_eos_ids(directory: Path, vocab_size: int) -> tuple[int, ...]:
    """`eos_token_id` of `generation_config.json`, as a tuple; empty where there is none.

    It stands above that of `config.json`, as in transformers. Raises BridgeError for an id that the
    model cannot say: rows would never end there.
    """
    path = directory / "generation_config.json"
    value = _read_json(path).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for i in ids:
        if type(i) is not int or not 0 <= i < vocab_size:
            raise BridgeError(
                f"{path}: eos_token_id {show(i)} is not a token of the model's vocabulary "
                f"0..{vocab_size - 1}; correct it, or take it out"
            )
    return tuple(ids)


def _chat_template(directory: Path, settings: dict[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if exists(path):
        return read_text(path)
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[0].get("template") if named else None
    if template is not None and not isinstance(template, str):
        raise BridgeError(f"{directory / 'tokenizer_config.json'}: chat_template must be text")
    return template


def _read_json(path: Path) -> dict[str, Any]:
    return read_object(path) if exists(path) else {}


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Turn whatever the tokenizers library raises, a panic of its Rust code too, into one line."""
    try:
        yield
    except BridgeError:
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        raise BridgeError(f"{what} ({one_line(error)})") from None


@contextmanager
def _silent_panics() -> Iterator[None]:
    """Rust writes of a panic to stderr by itself, many lines; it is our one line that counts.

    What else is written meanwhile is passed on.
    """
    kept, caught = os.dup(2), os.memfd_create("stderr") if hasattr(os, "memfd_create") else None
    if caught is None:
        os.close(kept)
        yield
        return
    os.dup2(caught, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        said = os.pread(caught, os.fstat(caught).st_size, 0)
        os.close(caught)
        if said and b"panicked at" not in said:
            os.write(2, said)
