"""What users pass as prompts, rows, widths and ids, made plain: texts, messages, ids and integers.

Arrays and tensors of any framework count as the lists and numbers that they hold. Texts and
messages become ids by a checkpoint's tokenizer. Whatever else is refused in one line.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from bridge.config import ModelConfig
from bridge.decoding.inputs import default_positions, outside
from bridge.errors import BridgeError, show
from bridge.numbers.ranges import take
from bridge.text.chat import Message
from bridge.text.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[Message]


def to_python(value: Any) -> Any:
    """An array or a tensor as (nested) lists, a number of NumPy's as Python's, others as they
    are."""
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, str) else value


def list_prompts(prompts: Any) -> list[Any]:
    """One prompt or several as a list of texts and lists, which may still be wrong. Raises
    BridgeError where there is none."""
    prompts = to_python(prompts)
    if isinstance(prompts, str):
        return [prompts]
    listed = [to_python(prompt) for prompt in _items(prompts, "prompts")]
    if not listed:
        raise BridgeError("no prompt given")
    single = isinstance(listed[0], int | float | Mapping)  # of ids, or of messages
    return [listed] if single else [_prompt(p, f"prompt {n}") for n, p in enumerate(listed)]


def list_widths(width: Any, prompts: int) -> list[int]:
    """The width of each prompt, from one number or one a prompt."""
    width = to_python(width)
    widths = [width] * prompts if not _many(width) else [to_python(w) for w in width]
    if len(widths) != prompts:
        raise BridgeError(f"{len(widths)} widths for {prompts} prompts")
    return [take("width", w) for w in widths]


def list_prompt_ids(prompt_ids: Any, prompts: int) -> list[int]:
    """The prompts' numbers in the sampling counter (clause 6.2); None: 0, 1, 2, ..."""
    if prompt_ids is None:
        return list(range(prompts))
    ids = [to_python(i) for i in _items(to_python(prompt_ids), "prompt_ids")]
    if len(ids) != prompts:
        raise BridgeError(f"{len(ids)} prompt_ids for {prompts} prompts")
    return [take("prompt_ids", number) for number in ids]


def read_prompt(
    prompt: Any, chat: bool, system: Any, name: str
) -> str | Int[np.ndarray, " P"] | list[Message]:
    """One prompt as it is fed: a text, ids, or messages, which a text becomes by `chat`, after
    `system` if given. Raises BridgeError, which calls it `name`, for one that is empty or none of
    these, and for a system message that would not be read."""
    if system is not None and not isinstance(system, str):
        raise BridgeError(f"system must be a text, not {show(system)}")
    prompt = _prompt(to_python(prompt), name)
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise BridgeError(f"{name} is empty")
    mend = "ask for chat, or put it into the prompt"
    if isinstance(prompt, str):
        if chat:
            before = [] if system is None else [{"role": "system", "content": system}]
            return [*before, {"role": "user", "content": prompt}]
        kind, fed = "a text that is fed as it is", prompt
    elif isinstance(prompt[0], Mapping):
        if not all(isinstance(message, Mapping) for message in prompt):
            raise BridgeError(f"{name} must hold messages alone, each with role and content")
        kind, mend, fed = "messages", "put a system message into the messages", prompt
    else:
        kind, fed = "ids", integers(prompt, name, 1)
    if system is not None:
        raise BridgeError(f"system goes with a text in a chat, but {name} is {kind}; {mend}")
    return fed


def encode_prompt(
    fed: str | Int[np.ndarray, " P"] | list[Message],
    tokenizer: Tokenizer | None,
    eos_ids: Sequence[int],
    vocab_size: int,
    name: str,
) -> tuple[str, list[int]]:
    """The text of a prompt that `read_prompt` gave, or of its last message, and its ids.

    Raises BridgeError, which calls it `name`, for a text without a tokenizer or whose answers would
    never end, and for ids outside the vocabulary.
    """
    if isinstance(fed, np.ndarray):
        check_range(fed, name, vocab_size)
        return "", fed.tolist()
    if tokenizer is None:
        raise BridgeError(
            f"{name} is text, but the checkpoint has no tokenizer.json; add it or give ids"
        )
    if not eos_ids:
        raise BridgeError(
            "tokenizer_config.json: no eos_token, and no eos_token_id in config.json; "
            "set one, or answers would never end"
        )
    if isinstance(fed, str):
        text, tokens = fed, tokenizer.encode(fed)
    else:
        text, tokens = str(fed[-1].get("content", "")), tokenizer.encode_chat(fed)
    if not tokens:
        raise BridgeError(f"{name} has no tokens")
    check_range(np.asarray(tokens), f"{name} (by tokenizer.json)", vocab_size)
    return text, tokens


def read_rows(
    config: ModelConfig, tokens: Any, groups: Any, active: Any, positions: Any
) -> tuple[
    Int[np.ndarray, "B S"], Int[np.ndarray, " B"], Bool[np.ndarray, "B S"], Int[np.ndarray, "B S"]
]:
    """Rows to be fed as they are, as arrays; where `active` and `positions` are None, what they
    stand for. Raises BridgeError, by the name, for whatever does not fit."""
    tokens = integers(tokens, "tokens", 2)
    B, S = tokens.shape
    check_range(tokens, "tokens", config.vocab_size)
    groups = integers(groups, "groups", 1)
    if len(groups) != B:
        raise BridgeError(f"groups must have one number a row: {B}, not {len(groups)}")
    try:
        active = np.ones((B, S), bool) if active is None else np.asarray(to_python(active))
    except ValueError:
        raise BridgeError(f"active must be bool [{B}, {S}], in a regular array") from None
    if active.dtype != bool or active.shape != (B, S):
        raise BridgeError(f"active must be bool [{B}, {S}], not {active.dtype} {active.shape}")
    if positions is None:
        positions = default_positions(active)
    positions = integers(positions, "positions", 2)
    if positions.shape != (B, S):
        raise BridgeError(f"positions must be [{B}, {S}], not {list(positions.shape)}")
    check_range(positions, "positions", config.max_position_embeddings)
    return tokens, groups, active, positions


def integers(value: Any, name: str, ndim: int) -> Int[np.ndarray, "..."]:
    """An int64 array with `ndim` axes. Raises BridgeError for other numbers, for one beyond int64,
    and where it is empty."""
    try:
        array = value if isinstance(value, np.ndarray) else np.asarray(to_python(value))
    except ValueError:
        raise BridgeError(f"{name} must be integers in a regular array") from None
    if array.dtype.kind in "ufO":  # which NumPy makes of integers beyond int64
        exact = np.asarray(to_python(value), object)  # not rounded
        large = [i for i in exact.flat if type(i) is int and not -(2**63) <= i < 2**63]
        if large:
            raise BridgeError(f"{name}: {show(large[0])} is beyond int64")
    if array.dtype.kind not in "iu" or array.ndim != ndim or 0 in array.shape:
        raise BridgeError(
            f"{name} must be integers with {ndim} axes, none empty; "
            f"not {array.dtype} {list(array.shape)}"
        )
    return array.astype(np.int64)


def check_range(array: Int[np.ndarray, "..."], name: str, end: int) -> None:
    """Refuse a number outside 0..end-1."""
    if (bad := outside(array, end)).size:
        raise BridgeError(f"{name}: {bad[0]} is outside 0..{end - 1}")


def _many(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)


def _items(value: Any, name: str) -> list[Any]:
    if not _many(value):
        raise BridgeError(
            f"{name} must be a list{' or a text' * (name == 'prompts')}, not {show(value)}"
        )
    return list(value)


def _prompt(value: Any, name: str) -> Any:
    if isinstance(value, str):
        return value
    if not _many(value):
        raise BridgeError(f"{name} must be a text, ids or messages, not {show(value)}")
    return [to_python(item) for item in value]
