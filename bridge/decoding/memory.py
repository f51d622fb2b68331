"""What work needs of memory, and refusing in one line what no machine like this one can hold.

Sizes follow from the config alone, and leave out what a step computes in passing: what is refused
here would have failed, and later. Only the CPU's memory is known, so devices with their own are
asked for what the host keeps alone.
"""

from collections.abc import Sequence

from bridge.config import ModelConfig
from bridge.config.sizes import decoding_bytes, kept_bytes
from bridge.numbers.machine import check_memory

KEPT = 8  # bytes of a token that is kept in a list, at least


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
