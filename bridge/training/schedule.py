"""The learning rate of each step: a linear warm-up, then constant, linear or cosine decay."""

import math

SCHEDULES = ("constant", "linear", "cosine")


def learning_rate(
    step: int, steps: int, peak: float, schedule: str, warmup: int = 0, end: float = 0.0
) -> float:
    """Of step 0, 1, ..., steps - 1.

    Warm-up step s has `peak (s + 1) / warmup`. After it, with p the fraction of what follows that
    is done before the step, `linear` has `peak (1 - (1 - end) p)` and `cosine`
    `peak (end + (1 - end) (1 + cos(pi p)) / 2)`: from `peak` towards `end peak`.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    p = (step - warmup) / max(steps - warmup, 1)
    if schedule == "linear":
        return peak * (1 - (1 - end) * p)
    if schedule == "cosine":
        return peak * (end + (1 - end) * (1 + math.cos(math.pi * p)) / 2)
    return peak
