"""The part of a reasoning-gym task that imports it: datasets made, and questions drawn for splits.

Runs in the processes of `GymTask` and `Scorer`. A dataset of reasoning-gym is 64 draws from a seed;
the draws of two seeds that are near each other are mostly the same, so seeds come from a hash.
"""

import contextlib
import io
import pickle
import random
from collections.abc import Callable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from functools import lru_cache
from hashlib import sha256
from typing import Any

import numpy as np

from bridge.errors import BridgeError, describe, show
from bridge.tasks.gym import PREFIX, unknown_generator

DRAWS = 64  # of a dataset
ATTEMPTS = 200  # a split of a quarter is missed by as many in one of 10^25 problems
QUARTERS = ("train", "train", "validation", "test")


def generate_with(payload: bytes) -> Callable[[bytes], bytes]:
    """The handler that takes a split and a number, and gives an entry, or a text that says what is
    wrong."""
    name, config, seed = pickle.loads(payload)
    make(name, config, seed=0, size=1)
    dataset = lru_cache(maxsize=16)(lambda key: make(name, config, seed=key, size=DRAWS))

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


def make(name: str, config: Mapping[str, Any], *, seed: int, size: int) -> Any:
    """A dataset. Raises BridgeError for an unknown generator or option, or a value that it does
    not take."""
    import reasoning_gym
    from reasoning_gym.composite import DatasetSpec  # its import registers `composite`
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise unknown_generator(name, sorted(DATASETS))
    known = sorted(field.name for field in fields(DATASETS[name][1]))
    for option in config:
        if option not in known or option in ("seed", "size"):
            raise _unknown_option(name, option, [k for k in known if k not in ("seed", "size")])
    values = dict(config)
    try:
        if name == "composite":
            values["datasets"] = [DatasetSpec(**each) for each in values.get("datasets", [])]
        with contextlib.redirect_stdout(io.StringIO()):
            return reasoning_gym.create_dataset(name, seed=seed, size=size, **values)
    except Exception as error:
        given = ", ".join(f"{key}={show(value)}" for key, value in config.items())
        raise BridgeError(
            f"{PREFIX}{name} does not take this config ({given or 'none'}): {describe(error)}"
        ) from None


def _unknown_option(name: str, option: str, known: list[str]) -> BridgeError:
    near = get_close_matches(option, known, n=1)
    mend = f"did you mean {near[0]}?" if near else f"it has {', '.join(known) or 'none'}"
    return BridgeError(f"{PREFIX}{name} has no option {option}; {mend}")


def _hash(text: str) -> int:
    return int.from_bytes(sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")
