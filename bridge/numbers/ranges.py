"""Every number that a user may give, by name, and what it may be: one table for all entrances.

The command line, the settings of training and the functions of the package look here, so that a
number means and is refused the same everywhere, in one line and before anything is loaded. What is
not a number of the right kind, NaN and infinity are in no range. An upper end is where no use is
known, or where counters and arrays end; what fits the memory is another matter
(`bridge.decoding.memory`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from operator import index
from typing import Any, SupportsFloat, SupportsIndex

from bridge.errors import BridgeError, shorten, show

BILLION = 10**9
SIZE = 2**31 - 1  # as a config's sizes
LARGE, SMALL = 1e30, 1e-30  # of floats with no end of their own: they are numbers in float32 too


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; `says` is what a message calls them.

    Where `says` speaks of the lower end alone, the upper one is named once it is passed.
    """

    kind: type[int] | type[float]
    low: float
    high: float
    says: str
    ends: tuple[Callable[[Any], bool], ...] = ()  # what of the ends is left out

    def has(self, value: int | float) -> bool:
        """Whether a number is in it."""
        return self.low <= value <= self.high and all(end(value) for end in self.ends)

    def take(self, name: str, value: Any, said: str = "") -> Any:
        """The value as a Python number. Raises BridgeError, by the name, for any other; `said`:
        how it was given."""
        number = _integer(value) if self.kind is int else _float(value)
        if number is None or not self.has(number):
            raise BridgeError(f"{name} must be {self._wants(number)}, not {said or show(value)}")
        return number

    def read(self, name: str, text: Any) -> Any:
        """The same of a text, such as an option's; of a number too, such as its default."""
        if not isinstance(text, str):
            return self.take(name, text)
        try:
            number = self.kind(text)
        except ValueError:  # of an integer's digits too, where they are too many
            what = "an integer" if self.kind is int else "a number"
            raise BridgeError(f"{name} must be {what}, {self.says}; not {show(text)}") from None
        return self.take(name, number, shorten(" ".join(text.split())))

    def _wants(self, number: int | float | None) -> str:
        if number is None or not (self.says.endswith("above") or self.says.startswith("above")):
            return self.says
        if number > self.high:
            return f"at most {self.high:.12g}"
        small = self.kind is float and 0 < number < self.low
        return f"at least {self.low:g}" if small else self.says


def _integer(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        return None
    try:
        return index(value)
    except TypeError:  # an array of more than one number
        return None


def _float(value: Any) -> float | None:
    if isinstance(value, bool | str | bytes) or not isinstance(value, SupportsFloat):
        return None
    if getattr(value, "ndim", 0):  # an array, which some take for its only number
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if isfinite(number) else None


def whole(low: int, high: int) -> Range:
    """Integers from `low` on; that they end is said to those who pass the end."""
    return Range(int, low, high, f"{low} or above")


def within(low: int, high: int, says: str = "") -> Range:
    """Integers from `low` to `high`, which belong to what is counted."""
    return Range(int, low, high, says or f"in {low}..{high}")


def _above(low: float, high: float) -> Range:
    return Range(float, low, high, "above 0")


def _up_to(high: float) -> Range:
    return Range(float, 0.0, high, "0 or above")


SHARE = Range(float, 0.0, 1.0, "in [0, 1]")
BELOW_ONE = Range(float, 0.0, 1.0, "in [0, 1)", (lambda x: x < 1,))
ROWS = whole(1, 2**16)  # of a group: a timestep compares each two of them
PROBLEMS = whole(1, 2**20)  # as many as an evaluation's counter tells apart
STEPS = whole(1, BILLION)
EVERY = whole(0, BILLION)

RANGES = {
    # Rows, prompts and their lengths
    "width": ROWS,
    "rows": ROWS,
    "samples": whole(2, 2**16),
    "max_rows": whole(1, 2**20),
    "cache_bytes": whole(1, 2**60),
    "ahead": whole(1, 4096),
    "max_new_tokens": whole(1, SIZE),
    "prompt_tokens": whole(1, SIZE),
    "timesteps": whole(1, SIZE),
    "prompt": whole(1, SIZE),
    "length": whole(1, SIZE),
    # Sampling (chapter 6)
    "temperature": _up_to(1e6),
    "top_k": whole(1, SIZE),
    "top_p": Range(float, 0.0, 1.0, "in (0, 1]", (lambda x: x > 0,)),
    "min_p": SHARE,
    "seed": within(0, 2**64 - 1, "in 0..2^64-1"),
    "prompt_ids": within(0, 2**32 - 1, "in 0..2^32-1, the counter's range (clause 6.2)"),
    # Problems and rewards
    "problems": PROBLEMS,
    "eval_problems": PROBLEMS,
    "eval.groups": within(1, 4096),
    "reward_seconds": _above(SMALL, 1e6),
    "tolerance": Range(float, 0.0, 1.0, "a number from 0 to below 1", (lambda x: x < 1,)),
    "threshold": Range(float, -LARGE, LARGE, f"a number in {-LARGE:g}..{LARGE:g}"),
    # Training
    "steps": STEPS,
    "epochs": whole(1, 10**6),
    "groups": PROBLEMS,
    "minibatches": PROBLEMS,
    "micro_batch_tokens": whole(1, SIZE),
    "loss_chunk": whole(1, SIZE),
    "train.width": whole(2, 2**16),
    "train.temperature": _above(1e-6, 1e6),
    "lr": _above(SMALL, LARGE),
    "lr_end": SHARE,
    "warmup": EVERY,
    "betas": BELOW_ONE,
    "adam_eps": _above(SMALL, 1e3),
    "weight_decay": _up_to(1e3),
    "max_grad_norm": _above(SMALL, LARGE),
    "stop_grad_norm": _above(SMALL, LARGE),
    "stop_loss": _above(SMALL, LARGE),
    "stop_entropy": _above(SMALL, LARGE),
    "eps_low": BELOW_ONE,
    "eps_high": _up_to(1e6),
    "beta": _up_to(1e6),
    "save_every": STEPS,
    "keep": STEPS,
    "eval_every": EVERY,
    "norms_every": EVERY,
    "gap_every": EVERY,
    # Blocks and forms
    "heads": whole(1, 2**16),
    "head_dim": whole(1, 2**16),
    "norm_eps": _above(SMALL, 1e3),
    "layer": within(0, 4095),
    "quantize": whole(1, 64),
    "group_size": whole(1, 2**16),
    "shard_size": whole(1, 2**60),
    "fill_blocks": _up_to(1e6),
    "lora_rank": whole(1, 2**16),
    "lora_alpha": _above(SMALL, LARGE),
    # Work
    "rounds": whole(1, 10**6),
    "bench.new": whole(2, SIZE),  # the first token is the prompt's
    "bench.seconds": _above(SMALL, 1e6),
    "threads": whole(1, 1024),
    "workers": whole(1, 1024),
    "processes": whole(1, 1024),
    "memory": whole(1, 2**60),
    "demo.problems": whole(2, 10**5),
    "demo.show": within(0, 10**5 - 1),
}


def take(name: str, value: Any) -> Any:
    """The value of an option as a Python number. Raises BridgeError for one that is not in the
    range of that name; messages leave out what stands before a dot."""
    return RANGES[name].take(name.rpartition(".")[2], value)
