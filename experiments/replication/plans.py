"""What the experiment is: a plan for each task, changes to one, the arms, and the ablations.

A plan holds everything but the seed. Arms of a plan start from the same base and learn from the
same problems in the same order.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from base import Size


@dataclass(frozen=True)
class Plan:
    """What is run, for one task."""

    task: str  # as `find_task` knows it
    options: dict[str, Any]  # of the task, beside its seed
    demonstration: dict[str, Any]  # of what the base learns from
    new_tokens: int  # of a response, with its end
    size: Size = field(default_factory=Size)
    pretrain_steps: int = 2000
    pretrain_rows: int = 128
    heads: int = 2
    head_dim: int = 10
    warm_problems: int = 1024
    warm_samples: int = 8
    warm_epochs: int = 4
    warm_groups: int = 32
    warm_width: int = 4
    warm_lr: float = 2e-3
    warm_schedule: str = "constant"
    steps: int = 300
    problems: int = 32
    width: int = 8
    lr: float = 7e-5
    test_problems: int = 300
    test_widths: tuple[int, ...] = (1, 2, 4, 8, 16)


PLANS = {
    "search": Plan(
        task="bridge.tasks.search:operator_search",
        options={"modulus": 19},
        demonstration={"trials": 2},
        new_tokens=7 * 2 + 5,
    ),
    "guess": Plan(
        task="bridge.tasks.guess:guess_and_check",
        options={"guesses": 31, "tables": 32},
        demonstration={"trials": 4},
        new_tokens=3 * 4 + 3,
        pretrain_steps=1000,
        # Few responses are correct, and each says little of how others help: a hundred updates
        # teach the blocks next to nothing, several hundred do.
        warm_problems=2048,
        warm_samples=32,
        warm_epochs=6,
        warm_groups=16,
        warm_width=8,
        warm_lr=4e-3,
        warm_schedule="cosine",
        steps=200,
    ),
    "chain": Plan(
        task="bridge.tasks.chain:chain",
        options={"steps": 4, "modulus": 13},
        demonstration={"slip": 0.15},
        new_tokens=4 + 3,
        pretrain_steps=1500,
        steps=200,
    ),
}

# Operator search with one thing changed, to see how far what holds of it holds.
CHANGED = {
    "search-width-4": replace(PLANS["search"], width=4, problems=64),
    "search-trials-4": replace(PLANS["search"], demonstration={"trials": 4}, new_tokens=7 * 4 + 5),
    "search-modulus-31": replace(PLANS["search"], options={"modulus": 31}),
    "search-small": replace(PLANS["search"], size=Size(width=64, ffn=176, layers=2)),
    "search-large": replace(PLANS["search"], size=Size(width=128, ffn=352, layers=4)),
}


@dataclass(frozen=True)
class Arm:
    """What is added to the base, and how it is trained."""

    kind: str | None  # of the blocks; None: there are none
    warm_up: bool = True  # of the blocks alone, before all parameters learn
    half: bool = False  # every second layer has a block
    mixing: str | None = None  # what is changed in how rows read each other; see ablations.py


ARMS = {"bridge": Arm("attention"), "pmatch": Arm("mlp"), "rlvr": Arm(None)}
ABLATIONS = {
    "no-warmup": Arm("attention", warm_up=False),
    "self-excluded": Arm("attention", mixing="self-excluded"),
    "half-layers": Arm("attention", half=True),
    "cut-gradients": Arm("attention", mixing="cut-gradients"),
}
