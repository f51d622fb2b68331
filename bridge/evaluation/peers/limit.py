"""What a machine allows: how fast its memory is read, how fast it multiplies, and what follows.

A decoding step reads every weight once, however many rows there are, and multiplies each row by
each weight. It can take no less time than the memory needs for the first, or the arithmetic for the
second; caches and attention come on top. A model that fits a processor's cache may be faster.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from bridge.config import ModelConfig, tensor_shapes

ARRAY = 2**28  # bytes, more than any cache
SIDE = 2048  # of the square matrices
SECONDS = 0.5  # that each is repeated for


@dataclass(frozen=True)
class Limit:
    """Of a machine: bytes read a second, and float32 operations (a multiply-add is two)."""

    bandwidth: float
    rate: float

    def tokens_per_second(self, parameters: int, width: int, size: int = 4) -> float:
        """At most, for so many weights of `size` bytes in a step of `width` rows; arithmetic is in
        float32 whatever the size."""
        reading = size * parameters / self.bandwidth
        multiplying = 2 * parameters * width / self.rate
        return width / max(reading, multiplying)


def step_parameters(config: ModelConfig) -> int:
    """The weights that a decoding step multiplies by: all but an embedding that is not the head."""
    shapes = dict(tensor_shapes(config))
    if not config.tie_word_embeddings:
        del shapes["model.embed_tokens.weight"]
    return sum(map(prod, shapes.values()))


def measure(device: str) -> dict[str, float]:
    """Both rates of a device, the best of what was seen in half a second each, on a CPU with all
    threads of this process: by torch where it is there and has the device, else by NumPy."""
    try:
        read, multiply = _by_torch(device if device.startswith("cuda") else "cpu")
    except ImportError:
        read, multiply = _by_numpy()
    return {"bandwidth": ARRAY / _best(read), "rate": 2 * SIDE**3 / _best(multiply)}


def _by_torch(device: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    import torch

    array = torch.ones(ARRAY // 4, device=device)
    a, b = torch.ones(2, SIDE, SIDE, device=device)
    out = torch.empty_like(a)

    def multiply() -> None:
        torch.mm(a, b, out=out)
        out[0, 0].item()  # waits for the device

    return lambda: array.sum().item(), multiply


def _by_numpy() -> tuple[Callable[[], Any], Callable[[], Any]]:
    array = np.ones(ARRAY // 4, np.float32)
    a, b = np.ones((2, SIDE, SIDE), np.float32)
    return lambda: array @ array, lambda: a @ b


def _best(run: Callable[[], Any]) -> float:
    """The least seconds of a call, over some."""
    run()
    least, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        least = min(least, time.perf_counter() - start)
    return least
