"""The handler that draws problems, in the process of a `GymTask`: reasoning-gym's entries by split.

A dataset is 64 draws from a seed; the draws of two seeds that are near each other are mostly the
same, so seeds come from a hash.
"""

import pickle
import random
from collections.abc import Callable
from functools import lru_cache
from hashlib import sha256
from typing import Any

import numpy as np

from bridge.errors import describe
from bridge.processes.child import Handler
from bridge.tasks.gym_datasets import make_dataset

DRAWS = 64  # of a dataset
ATTEMPTS = 200  # a split of a quarter is missed by as many in one of 10^25 problems
QUARTERS = ("train", "train", "validation", "test")


def draw_with(payload: bytes) -> Handler:
    """The handler of a `GymTask`: takes a split and a number, and gives an entry, or a text that
    says what is wrong."""
    name, config, seed = pickle.loads(payload)
    make_dataset(name, config, seed=0, size=1)  # says what is wrong with them
    dataset = lru_cache(maxsize=16)(lambda key: make_dataset(name, config, seed=key, size=DRAWS))

    def handle(request: bytes) -> bytes:
        split, number = pickle.loads(request)
        try:
            return pickle.dumps(draw(dataset, f"{seed}/{split}", split, number))
        except Exception as error:
            return pickle.dumps(describe(error))

    return handle


def draw(dataset: Callable[[int], Any], stream: str, split: str, number: int) -> Any:
    """The first entry of the split in a stream of seeds; a text where none comes up."""
    seen = set()
    for attempt in range(ATTEMPTS):
        # Drawing once more is another dataset, so that most are used for many numbers.
        seed = _hash(f"{stream}/{number // DRAWS}/{attempt}") % 2**31
        entries = dataset(seed)
        random.seed(seed + number)
        np.random.seed((seed + number) % 2**32)
        entry = entries[number % DRAWS]
        question = entry["question"]
        if split_of(question) == split:
            return {key: entry.get(key) for key in ("question", "answer", "metadata")}
        seen.add(question)
    return (
        f"none of {ATTEMPTS} draws, {len(seen)} of them distinct, is of this split: its config "
        "allows too few questions"
    )


def split_of(question: str) -> str:
    """The split that a question belongs to, white space aside."""
    return QUARTERS[_hash(" ".join(question.split())) % 4]


def _hash(text: str) -> int:
    return int.from_bytes(sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")
