"""What work needs of memory, and refusing in one line what no machine like this one can hold.

Sizes follow from the config alone, and leave out what a step computes in passing: what is refused
here would have failed, and later. Only the CPU's memory is known, so devices with their own are
asked for what the host keeps alone.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from bridge.config import ModelConfig
from bridge.errors import BridgeError

WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}  # bytes of an element
KEPT = 8  # bytes of a token that is kept in a list, at least
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def machine_memory() -> int:
    """Bytes that this process can ever have: the machine's, or what a container is given."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in LIMITS:
        try:
            said = Path(name).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            continue
        if said.isdecimal():  # `max` is none
            found.append(int(said))
    return min(found)


def token_bytes(config: ModelConfig, dtype: str) -> int:
    """Keys and values of a token over all layers (clause 4.2)."""
    heads = config.num_hidden_layers * config.num_key_value_heads
    return 2 * heads * config.head_dim * WIDTHS[dtype]


def kept_bytes(config: ModelConfig, cells: int, dtype: str) -> int:
    """What a forward pass keeps for the backward one at least: one vector a cell and layer."""
    return config.num_hidden_layers * cells * config.hidden_size * WIDTHS[dtype]


def decoding_bytes(
    config: ModelConfig, dtype: str, prompts: Sequence[int], widths: Sequence[int], new_tokens: int
) -> int:
    """Of a batch that is decoded at once: its prompts' caches and its rows', logits, and the scores
    of each two rows of a group (clause 3.4). `prompts`: tokens of each."""
    rows = sum(widths)
    caches = len(prompts) * max(prompts, default=0) + rows * (new_tokens - 1)
    logits = 4 * rows * config.vocab_size
    blocks = config.bridge
    attend = blocks is not None and blocks.kind == "attention" and blocks.layers
    scores = 4 * blocks.num_heads * max(widths, default=0) ** 2 if blocks and attend else 0
    return caches * token_bytes(config, dtype) + logits + scores


def check_decoding(
    config: ModelConfig,
    device: str,
    dtype: str,
    prompts: Sequence[int],
    widths: Sequence[int],
    new_tokens: int,
    max_rows: int,
) -> None:
    """Refuse rows that cannot be held: those decoded at once, and the tokens of all.

    `prompts`: tokens of each; `widths`: rows of each.
    """
    rows = sum(widths)
    check_memory(
        KEPT * rows * new_tokens,
        f"{rows} rows of up to {new_tokens} tokens",
        "lower width, max_new_tokens, or the number of prompts",
    )
    if not device.startswith("cpu"):
        return
    widest = max(widths, default=0)
    count = max(1, min(len(prompts), max_rows // max(widest, 1)))
    needed = decoding_bytes(
        config, dtype, [max(prompts, default=0)] * count, [widest] * count, new_tokens
    )
    check_memory(
        needed,
        f"{count * widest} rows of up to {new_tokens} tokens at once, of width {widest},",
        "lower width, max_new_tokens or max_rows",
    )


def check_training(config: ModelConfig, device: str, dtype: str, rows: int, length: int) -> None:
    """Refuse a micro-batch of rows of so many timesteps that cannot be held."""
    if device.startswith("cpu"):
        check_memory(
            kept_bytes(config, rows * length, dtype),
            f"{rows} rows of {length} tokens in a micro-batch",
            "lower width, max_new_tokens or micro_batch_tokens",
        )


def check_memory(needed: int, what: str, mend: str) -> None:
    """Refuse what needs more bytes than the machine has."""
    there = machine_memory()
    if needed > there:
        raise BridgeError(
            f"memory: {what} need {_size(needed)}, and this machine has {_size(there)}; {mend}"
        )


def check_disk(directory: Path, needed: int, what: str, mend: str) -> None:
    """Refuse to write more bytes into a directory than its disk has left."""
    there = shutil.disk_usage(directory).free
    if needed > there:
        raise BridgeError(
            f"{directory}: {what} need {_size(needed)}, and {_size(there)} are left there; {mend}"
        )


def _size(number: int) -> str:
    """Bytes, in decimal units."""
    for unit, size in (("PB", 10**15), ("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number} B"
