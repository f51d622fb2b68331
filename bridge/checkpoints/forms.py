"""The three forms of a checkpoint on disk, and the one logical view of all of them (chapter 9).

A logical tensor has a Hugging Face name. Where its numbers lie depends on the form:

    torch   model.layers.3.self_attn.q_proj.weight, under its own name
    jax     model.layers.*.self_attn.q_proj.weight, all layers stacked along a new first axis
    mlx     under its own name, or packed as .weight (uint32), .scales and .biases; blocks in a file
            of their own

`locate` reads all three, mixed too; `arrange` says what a writer stores. Neither reads a number.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from bridge import remote_code
from bridge.checkpoints.older_rope import without_older_rope
from bridge.checkpoints.packing import packing, side_names
from bridge.checkpoints.safetensors_io import SafetensorsFile
from bridge.checkpoints.tensor_specs import TensorSpec
from bridge.config import ModelConfig
from bridge.config.quantization import Quantization
from bridge.errors import BridgeError, show

FORMS = ("torch", "jax", "mlx")
METADATA = {"torch": {"format": "pt"}, "jax": {"format": "jax"}, "mlx": {"format": "mlx"}}
LAYER = re.compile(r"model\.layers\.(0|[1-9]\d*)\.(.+)")
STACK = "model.layers.*."
BLOCK = ".bridge."  # in the name of every tensor of a block, and of no other
LORA = ".lora_"  # and of every tensor of a low-rank update


class Place(NamedTuple):
    """Where an array lies: a tensor of a file, or one layer of a stacked one."""

    file: SafetensorsFile
    stored: str
    row: int | None = None  # along the first axis of a stack

    @property
    def spec(self) -> TensorSpec:
        """Dtype and shape, of the one layer in a stack."""
        dtype, shape = self.file.specs[self.stored]
        return TensorSpec(dtype, shape if self.row is None else shape[1:])

    def view(self) -> np.ndarray:
        """A read-only view of the mapped file."""
        array = self.file[self.stored]
        return array if self.row is None else array[self.row]

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `start` of the array on, without mapping the file."""
        self.file.read_into(self.stored, start + (self.row or 0) * self.spec.nbytes, buffer)


class PackedPlace(NamedTuple):
    """Where a quantised matrix lies (clause 9.11)."""

    weight: Place
    scales: Place
    biases: Place
    how: Quantization


Source = Place | PackedPlace


def parts_of(source: Source) -> tuple[Place, ...]:
    """The arrays that make a tensor: one, or the three of a packed one."""
    return (source,) if isinstance(source, Place) else source[:3]


def stack_of(name: str) -> str | None:
    """The name of the stack that a layer's tensor is of; None for what is in no layer."""
    found = LAYER.fullmatch(name)
    return STACK + found[2] if found else None


def layers_of(config: ModelConfig, stack: str) -> Sequence[int]:
    """The layers along a stack's first axis: those with a block for a block's, else all."""
    if BLOCK not in stack:
        return range(config.num_hidden_layers)
    return config.bridge.layers if config.bridge else ()


def locate(found: Mapping[str, SafetensorsFile], config: ModelConfig) -> dict[str, Place]:
    """The place of every array by its name outside of a stack, whatever form it is in (clause 9.9).

    Raises BridgeError for a stack whose first axis is not its layers, and a layer given twice.
    """
    places: dict[str, Place] = {}
    for stored, file in found.items():
        layers = layers_of(config, stored) if stored.startswith(STACK) else ()
        if not layers:
            given = {stored: Place(file, stored)}
        else:
            shape = file.specs[stored].shape
            if shape[:1] != (len(layers),):
                raise BridgeError(
                    f"{file.path}: tensor {show(stored)} is {show(list(shape))}, but config.json "
                    f"calls for {len(layers)} layers along its first axis"
                )
            prefix, rest = STACK[:-2], stored.removeprefix(STACK)
            given = {f"{prefix}{n}.{rest}": Place(file, stored, i) for i, n in enumerate(layers)}
        if twice := sorted(given.keys() & places.keys()):
            other = places[twice[0]]
            raise BridgeError(
                f"{file.path}: {show(stored)} and {show(other.stored)} (in {other.file.path.name}) "
                f"both give {twice[0]!r}; remove one of the two"
            )
        places |= given
    return places


def find_packed(
    name: str, shape: tuple[int, ...], places: Mapping[str, Place]
) -> PackedPlace | None:
    """Where the matrix `name` of logical `shape` lies packed; None where no `.scales` are stored.

    Raises BridgeError where its parts are missing or do not fit each other.
    """
    names = (name, *side_names(name))
    if not name.endswith(".weight") or names[1] not in places or name not in places:
        return None
    specs = {part: places[part].spec for part in names if part in places}
    how = packing(name, shape, specs, str(places[name].file.path))
    weight, scales, biases = (places[part] for part in names)
    return PackedPlace(weight, scales, biases, how)


def form_of(sources: Iterable[Source]) -> str:
    """The form of what was read: how it lies decides, and then what the metadata says."""
    said = "torch"
    for source in sources:
        if isinstance(source, PackedPlace):
            return "mlx"
        if source.row is not None:
            return "jax"
        for form in ("jax", "mlx"):
            if source.file.metadata.get("format") == METADATA[form]["format"]:
                said = form
    return said


def plain_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A raw config without what a conversion adds: how weights are quantised, rope settings spelled
    twice, and the code that it put beside them (clause 9.12). Code of others stays."""
    kept = without_older_rope(raw)
    kept = {k: v for k, v in kept.items() if k not in ("quantization", "quantization_config")}
    return remote_code.without(kept)


@dataclass(frozen=True)
class Entry:
    """What a writer stores of one tensor, or of the layers that it stacks."""

    names: tuple[str, ...]  # logical, in the order of their bytes
    stored: dict[str, TensorSpec]  # one tensor, or the three of a packed one

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(spec.nbytes for spec in self.stored.values())


def arrange(
    form: str, specs: Mapping[str, TensorSpec], packed: Mapping[str, Quantization]
) -> list[Entry]:
    """What a form stores of logical tensors, given in canonical order (clauses 9.8 to 9.11).

    `packed`: how to pack each of the matrices that are to be packed. A stack comes where its first
    layer would, and layers of several dtypes are not stacked.
    """
    stacks: dict[str, list[str]] = {}
    for name in specs if form == "jax" else ():
        if (stack := stack_of(name)) is not None:
            stacks.setdefault(stack, []).append(name)
    stacks = {s: names for s, names in stacks.items() if len({specs[n].dtype for n in names}) == 1}
    entries = []
    for name, spec in specs.items():
        members = stacks.get(stack := stack_of(name) or "")
        if name in packed:
            entries.append(Entry((name,), packed_specs(name, spec, packed[name])))
        elif members is None:
            entries.append(Entry((name,), {name: spec}))
        elif members[0] == name:
            shape = (len(members), *spec.shape)
            entries.append(Entry(tuple(members), {stack: TensorSpec(spec.dtype, shape)}))
    return entries


def packed_specs(name: str, spec: TensorSpec, how: Quantization) -> dict[str, TensorSpec]:
    """The three stored tensors of a packed matrix whose logical dtype and shape are `spec`."""
    outputs, inputs = spec.shape
    words = TensorSpec(np.dtype("<u4"), (outputs, inputs * how.bits // 32))
    sides = TensorSpec(spec.dtype, (outputs, inputs // how.group_size))
    return {name: words, **dict.fromkeys(side_names(name), sides)}
