"""What a run saves: its model, as anyone can load it, and the state that it goes on from.

Trained tensors come from the trainer's masters, rounded to the dtype in which the checkpoint that
the run started from stores them; all others are that checkpoint's own bytes. Directories are filled
here, and made and renamed by who calls. What is read back and is not as it was written, damaged or
mended by hand, is a BridgeError of one line that names file and field.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, TypedDict

import numpy as np

from bridge.checkpoints.forms import BLOCK, LORA, METADATA, Entry, arrange, plain_config
from bridge.checkpoints.reading import Checkpoint, host_hash
from bridge.checkpoints.safetensors_io import SafetensorsFile, write_safetensors
from bridge.checkpoints.shards import BLOCKS
from bridge.checkpoints.tensor_specs import TensorSpec
from bridge.checkpoints.writing import (
    SHARD_SIZE,
    copy_assets,
    write_base,
    write_entries,
    write_json,
    write_lora,
)
from bridge.config import ModelConfig
from bridge.contract import Trainer
from bridge.decoding.inputs import state_shapes
from bridge.errors import BridgeError
from bridge.files.fields import Count, Number, read_as
from bridge.files.opening import read_text
from bridge.files.strict_json import Unreadable, parse_object
from bridge.numbers.ranges import RANGES
from bridge.numbers.rounding import rounded

TRAINER = "trainer.safetensors"


class ModelWriter:
    """Writes the model of a trainer's state (clause 7.9), whole or as an adapter (clause 9.5)."""

    def __init__(self, source: Checkpoint, trained: list[str], adapter: bool) -> None:
        """`source`: what the run started from; `trained`: names of tensors.

        Raises BridgeError for an adapter with host tensors trained, and for a whole checkpoint of
        a quantised host.
        """
        host = [name for name in trained if BLOCK not in name and LORA not in name]
        if adapter and host:
            raise BridgeError(
                f"adapter: {host[0]} is trained too; an adapter holds blocks and low-rank updates "
                "alone"
            )
        if source.quantization and not adapter:
            raise BridgeError(
                f"{source.path}: is quantised, so train its blocks alone, with --adapter and "
                "--trainable bridge"
            )
        self.source, self.trained, self.adapter = source, trained, adapter
        specs = {n: s for n, s in source.specs.items() if BLOCK in n or LORA in n or not adapter}
        self.specs = {name: spec for name, spec in specs.items() if LORA not in name}
        self.updates = {name: spec for name, spec in specs.items() if LORA in name}
        base = source.base or source
        self.base = base.path
        self.digest = host_hash(base) if adapter else ""

    def write(self, directory: Path, state: Mapping[str, np.ndarray]) -> None:
        """Fill an empty directory. Raises BridgeError where the disk refuses."""
        write_json(directory / "config.json", plain_config(self.source.raw_config))
        if lora := self.source.config.lora:
            tensors = ((name, self._tensor(name, state)) for name in self.updates)
            write_lora(directory, lora, self.updates, tensors)
        if self.adapter:
            tensors = ((name, self._tensor(name, state)) for name in self.specs)
            if self.specs:  # a host may have updates alone
                write_safetensors(directory / BLOCKS, self.specs, tensors, METADATA["torch"])
            write_base(directory, self.base, self.digest)
            return

        def pieces(entry: Entry) -> Iterator[np.ndarray]:
            yield self._tensor(entry.names[0], state)

        entries = arrange("torch", self.specs, {})
        write_entries(directory, "torch", entries, pieces, SHARD_SIZE)
        copy_assets(self.source.assets, directory)

    def _tensor(self, name: str, state: Mapping[str, np.ndarray]) -> np.ndarray:
        master = state.get(f"master.{name}")
        if master is None:
            return self.source.tensors[name]
        return rounded(master, self.source.specs[name].dtype, name)


class StateReader(Mapping[str, np.ndarray]):
    """A trainer's state (clause 7.9) as it is now, by key. Each array is copied when it is asked
    for, so that no second state is in memory while one is written."""

    def __init__(self, trainer: Trainer, config: ModelConfig, trained: Sequence[str]) -> None:
        """`trained`: names of tensors."""
        self.trainer = trainer
        shapes = state_shapes(config, trained)
        smallest: dict[str, str] = {}  # key of each kind, whose arrays have all one dtype
        for key, shape in shapes.items():
            kind = key.partition(".")[0]
            if kind not in smallest or prod(shape) < prod(shapes[smallest[kind]]):
                smallest[kind] = key
        dtypes = {kind: trainer.array(key).dtype for kind, key in smallest.items()}
        self.specs = {k: TensorSpec(dtypes[k.partition(".")[0]], s) for k, s in shapes.items()}

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self.specs:
            raise KeyError(key)
        return self.trainer.array(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


def write_state(directory: Path, state: StateReader) -> None:
    """A trainer's state as safetensors, one array in memory at a time."""
    write_safetensors(directory / TRAINER, state.specs, iter(state.items()))


def read_state(directory: Path) -> dict[str, np.ndarray]:
    """What `write_state` wrote. Raises BridgeError for a file that is damaged."""
    file = SafetensorsFile(directory / TRAINER)
    return {name: file[name] for name in file}


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
