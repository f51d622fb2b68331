"""Datasets of reasoning-gym: of a generator by its name, and its config; or one line of refusal.

reasoning-gym, whose import takes its time, is imported when a dataset is made: in the process that
draws problems, and in those that score.
"""

import contextlib
import io
from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from bridge.errors import BridgeError, describe, show

PREFIX = "reasoning-gym:"


def make_dataset(name: str, config: Mapping[str, Any], *, seed: int, size: int) -> Any:
    """A dataset. Raises BridgeError for an unknown generator or option, or a value that it does
    not take."""
    import reasoning_gym
    from reasoning_gym.composite import DatasetSpec  # its import registers `composite`
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise _unknown_generator(name, sorted(DATASETS))
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


def _unknown_generator(name: str, known: list[str]) -> BridgeError:
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    near += [k for k in known if name and name in k and k not in near][:3]
    if near:
        return BridgeError(f"{PREFIX}{name} is not there; did you mean {' or '.join(near)}?")
    return BridgeError(f"{PREFIX}{name} is not there; there are {', '.join(known)}")


def _unknown_option(name: str, option: str, known: list[str]) -> BridgeError:
    near = get_close_matches(option, known, n=1)
    mend = f"did you mean {near[0]}?" if near else f"it has {', '.join(known) or 'none'}"
    return BridgeError(f"{PREFIX}{name} has no option {option}; {mend}")
