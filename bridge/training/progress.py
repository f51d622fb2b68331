"""How far a run is, as its checkpoints keep it, and what is read back of it.

Files of a run may have been damaged, or mended by hand: whatever is not as it was written is a
BridgeError of one line that names file and field.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypedDict

from bridge.errors import BridgeError
from bridge.files.fields import Count, Number, read_as
from bridge.files.opening import read_text
from bridge.files.strict_json import Unreadable, parse_object
from bridge.numbers.ranges import RANGES


class Best(TypedDict):
    """What is read of the evaluation of `best/`; it has more figures."""

    step: Count
    accuracy: Number
    reward_mean: Number
    problems: Count


@dataclass(frozen=True)
class Progress:
    """How far a run is: all that resuming needs beside the trainer's state."""

    step: Count = 0  # steps done
    problems: Count = 0  # of the data, so many were used
    best: Best | None = None
    source: str = ""  # the content hash of the checkpoint that the run started from
    seed: Annotated[int, RANGES["seed"]] = 0


class Evaluated(TypedDict):
    """What is read of the evaluation in what is said of `best/`."""

    step: Count


class Said(TypedDict):
    """What is read of what is said of `best/`."""

    evaluation: Evaluated


def read_progress(path: Path, step: int) -> Progress:
    """The progress of the checkpoint of a step."""
    try:
        found = read_as(Progress, parse_object(read_text(path)))
        if found.step != step:
            raise Unreadable(f"step must be {step}, not {found.step}")
    except FileNotFoundError:
        raise _damaged(path, "there is no such file", "to resume from before") from None
    except (BridgeError, Unreadable) as error:
        raise _damaged(path, error, "to resume from before") from None
    return found


def read_best_step(path: Path) -> int | None:
    """The step of the evaluation that a file of `best/` speaks of; None where there is no file."""
    try:
        return read_as(Said, parse_object(read_text(path)))["evaluation"]["step"]
    except FileNotFoundError:
        return None
    except (BridgeError, Unreadable) as error:
        raise _damaged(path, error, "to begin again") from None


def _damaged(path: Path, what: object, mend: str) -> BridgeError:
    said = str(what).removeprefix(f"{path}: ")
    return BridgeError(f"{path}: is missing or damaged ({said}); remove {path.parent} {mend}")
