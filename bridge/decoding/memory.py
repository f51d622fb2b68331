"""What work needs of memory, and refusing in one line what does not fit, before any work is done.

Rows that are decoded are held to the budget that an engine keeps to. What training keeps follows
from the config alone, and leaves out what it computes in passing: only the CPU's memory is known
for it.
"""

from bridge.config import ModelConfig
from bridge.config.sizes import cache_bytes, kept_bytes
from bridge.contract import BackendModel
from bridge.decoding.budget import Budget, Load
from bridge.numbers.machine import check_memory

KEPT = 8  # bytes of a token that is kept in a list, at least


def check_kept(rows: int, new_tokens: int) -> None:
    """Refuse more tokens than can be kept, of all rows to the end."""
    check_memory(
        KEPT * rows * new_tokens,
        f"{rows} rows of up to {new_tokens} tokens",
        "lower width, max_new_tokens, or the number of prompts",
    )


def check_decoding(
    model: BackendModel, prompt: int, width: int, new_tokens: int, groups: int = 1
) -> None:
    """Refuse so many groups at once, each of `width` rows after `prompt` tokens, that do not
    fit."""
    load = Load((prompt,) * groups, (width,) * groups, new_tokens)
    mend = "lower width or max_new_tokens" if groups == 1 else "lower max_rows or max_new_tokens"
    Budget(model).check(load, mend)


def room_for(model: BackendModel, prompt: int, width: int, new_tokens: int, groups: int) -> int:
    """The `cache_bytes` of so many such groups, which an engine may be given in place of what is
    free: then what else the machine does cannot change which rows are computed together, and so not
    how they are rounded."""
    return cache_bytes(model.config, model.dtype, [prompt] * groups, [width] * groups, new_tokens)


def check_training(
    config: ModelConfig, device: str, dtype: str, rows: int, length: int, shared: int = 0
) -> None:
    """Refuse a micro-batch of rows of so many timesteps that cannot be held; the first `shared` of
    them are computed once for all (clause 7.14)."""
    if device.startswith("cpu"):
        cells = shared + rows * (length - shared)
        check_memory(
            kept_bytes(config, cells, dtype),
            f"{rows} rows of {length} tokens in a micro-batch",
            "lower width, max_new_tokens or micro_batch_tokens",
        )
