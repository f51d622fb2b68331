"""What may be decoded at once: so many rows, and groups whose worst case fits in memory.

The worst case is that every row says all that it may. What there is of memory is measured, on the
device or else of the machine; what is taken follows from the config alone, and is what any backend
may take: each prompt and each row with the room of the longest, and that twice, since as groups
come and go a decoder may hold the old caches and the new at once, or leave room between rows.
"""

from dataclasses import dataclass

from bridge.config.sizes import cache_bytes, prefill_bytes, step_bytes
from bridge.contract import BackendModel
from bridge.errors import BridgeError
from bridge.numbers.machine import available_memory, size

MARGIN = 0.1  # of what is free, left to all that is not counted
READ = 8192  # tokens of prompts that are read together, padding too; one prompt may have more
MAX_ROWS = 256


@dataclass(frozen=True)
class Load:
    """Groups that are decoded at once, one or more."""

    prompts: tuple[int, ...]  # tokens of each
    widths: tuple[int, ...]  # rows of each
    new_tokens: int  # of each row, at most

    def __str__(self) -> str:
        rows, widest = sum(self.widths), max(self.widths)
        return f"{rows} rows of up to {self.new_tokens} tokens at once, of width {widest},"


class Budget:
    """Of one model."""

    def __init__(
        self, model: BackendModel, rows: int = MAX_ROWS, cache_bytes: int | None = None
    ) -> None:
        """`rows`: a wider group is decoded alone. `cache_bytes`: what keys and values may take;
        None: as much as fits in what is free, measured now."""
        self.model, self.rows, self.cache_bytes = model, rows, cache_bytes
        self.free = 0
        self.measure()

    def measure(self) -> None:
        """What is free, to be asked while nothing is decoded."""
        found = self.model.free_bytes()
        self.free = available_memory() if found is None else found

    def fits(self, load: Load, read: int) -> bool:
        """Whether memory holds groups to their last token, where the prompts of the `read` last of
        them are read together."""
        if read > 1 and read * max(load.prompts[-read:]) > READ:
            return False
        return self._needed(load, read) <= self._there()

    def check(self, load: Load, mend: str) -> None:
        """Refuse, in one line, groups that memory does not hold, were they read one by one."""
        needed, there = self._needed(load, 1), self._there()
        if needed <= there:
            return
        where = f"{size(there)} are free for them on {self.model.device}"
        if self.cache_bytes is not None:
            where, mend = f"cache_bytes is {size(there)}", f"raise it, or {mend}"
        raise BridgeError(f"memory: {load} need {size(needed)}, and {where}; {mend}")

    def _there(self) -> int:
        return int((1 - MARGIN) * self.free) if self.cache_bytes is None else self.cache_bytes

    def _needed(self, load: Load, read: int) -> int:
        """Bytes; of keys and values alone, once, where it is them that are limited."""
        config, dtype = self.model.config, self.model.dtype
        caches = cache_bytes(config, dtype, load.prompts, load.widths, load.new_tokens)
        if self.cache_bytes is not None:
            return caches
        rows, longest = sum(load.widths), max(load.prompts) + load.new_tokens
        step = step_bytes(config, dtype, rows, max(load.widths), longest)
        reading = prefill_bytes(config, dtype, read, max(load.prompts[-read:]))
        return 2 * caches + max(step, reading)
