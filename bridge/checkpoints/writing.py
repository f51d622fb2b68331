"""Writing checkpoints (chapter 9): whole or not at all, and the same bytes for the same tensors.

Tensors come in canonical order and are written as they come: whole arrays, one in memory at a time,
in the torch form; or the bytes of any form in pieces.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from bridge.checkpoints.forms import BLOCK, METADATA, Entry, arrange
from bridge.checkpoints.lora import DIRECTORY, PREFIX, SETTINGS, TENSORS, peft_config
from bridge.checkpoints.reading import Checkpoint, host_hash
from bridge.checkpoints.safetensors_io import write_pieces, write_safetensors
from bridge.checkpoints.shards import ADAPTER, BLOCKS, INDEX, SINGLE
from bridge.checkpoints.tensor_specs import TensorSpec
from bridge.config import SPEC_VERSION, LoraConfig
from bridge.errors import BridgeError
from bridge.files.atomic import new_directory, new_file
from bridge.files.opening import exists, open_file

SHARD_SIZE = 5_000_000_000  # bytes, Hugging Face's default
# Files of a tokenizer, and of generation, that go along with the weights.
ASSETS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


def write_checkpoint(
    path: Path,
    raw_config: Mapping[str, Any],
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    assets: Path | None = None,
    shard_size: int = SHARD_SIZE,
    overwrite: bool = False,
    also: Callable[[Path], None] | None = None,
) -> None:
    """Write a checkpoint directory; `tensors` come in the order of `specs`, the canonical one.

    `assets`: a directory whose tokenizer files are copied. `also`: fills in what else belongs into
    the directory, such as its updates (`write_lora`). `shard_size`: at most so many bytes of
    tensors a file, where more than one fits. Refuses a target that exists, before any work;
    `overwrite` allows for a checkpoint in its place, which is exchanged in one step.
    """
    with new_directory(path, overwrite) as directory:
        write_json(directory / "config.json", raw_config)
        stream = iter(tensors)
        files = _plan("torch", arrange("torch", specs, {}), shard_size)
        for name, entries in files.items():
            part = _stored(entries)
            chosen = islice(stream, len(part))
            write_safetensors(directory / name, part, chosen, METADATA["torch"])
        if (left_over := next(stream, None)) is not None:
            raise BridgeError(
                f"{path}: tensor {left_over[0]!r} came, but config.json has none such"
            )
        _write_index(directory, files)
        if assets is not None:
            copy_assets(assets, directory)
        if also is not None:
            also(directory)


def write_entries(
    directory: Path,
    form: str,
    entries: Sequence[Entry],
    pieces: Callable[[Entry], Iterator[np.ndarray]],
    shard_size: int,
) -> None:
    """Write the files of a form's tensors; `pieces` gives the bytes of an entry, in order."""
    files = _plan(form, entries, shard_size)
    for name, members in files.items():
        stream = (piece for entry in members for piece in pieces(entry))
        write_pieces(directory / name, _stored(members), stream, METADATA[form])
    _write_index(directory, files)


def write_adapter(
    path: Path,
    base: Checkpoint,
    raw_config: Mapping[str, Any],
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, np.ndarray]],
    also: Callable[[Path], None] | None = None,
) -> None:
    """Write the blocks alone, with their base's place and hash (clause 9.5); `also` as above."""
    with new_directory(path) as directory:
        write_json(directory / "config.json", raw_config)
        write_safetensors(directory / BLOCKS, specs, tensors, METADATA["torch"])
        write_base(directory, base.path, host_hash(base))
        if also is not None:
            also(directory)


def write_lora(
    directory: Path,
    lora: LoraConfig,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, np.ndarray]],
) -> None:
    """Write updates as PEFT does (clause 9.13), into a checkpoint directory that is being filled;
    `tensors` come in the order of `specs`, by the names of 9.3."""
    place = directory / DIRECTORY
    place.mkdir()
    write_json(place / SETTINGS, peft_config(lora))
    stored = {PREFIX + name: spec for name, spec in specs.items()}
    named = ((PREFIX + name, array) for name, array in tensors)
    write_safetensors(place / TENSORS, stored, named, METADATA["torch"])


def write_base(directory: Path, base: Path, digest: str) -> None:
    """Say what an adapter in `directory` is to be put on."""
    said = {
        "spec_version": SPEC_VERSION,
        "base": str(base.resolve()),
        "base_sha256": digest,
    }
    write_json(directory / ADAPTER, said)


def copy_assets(source: Path, target: Path) -> None:
    """Copy the tokenizer's files that there are; none from outside of their directory."""
    for name in ASSETS:
        if exists(source / name):
            with open(open_file(source / name), "rb") as old, new_file(target / name) as new:
                shutil.copyfileobj(old, new)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON file as all of ours look."""
    with new_file(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def _plan(form: str, entries: Sequence[Entry], shard_size: int) -> dict[str, list[Entry]]:
    """The entries of each file: filled in order, an entry is never split (clauses 9.4 and 9.10).

    Blocks without a host are an adapter's, which no other library shall take for a host (9.5).
    """
    blocks = [entry for entry in entries if BLOCK in entry.names[0]]
    if form != "mlx" and len(blocks) < len(entries):
        blocks = []
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if blocks and BLOCK in entry.names[0]:
            continue
        if shards[-1] and size + entry.nbytes > shard_size:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    count = len(shards)
    names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    files = dict(zip([SINGLE] if count == 1 else names, shards, strict=True))
    files[BLOCKS] = blocks
    return {name: members for name, members in files.items() if members}


def _stored(entries: Iterable[Entry]) -> dict[str, TensorSpec]:
    """The tensors of a file by their stored names."""
    return {name: spec for entry in entries for name, spec in entry.stored.items()}


def _write_index(directory: Path, files: Mapping[str, Sequence[Entry]]) -> None:
    """The index of what is in shards."""
    if len(files.keys() - {BLOCKS}) < 2:
        return
    stored = {name: _stored(entries) for name, entries in files.items()}
    total = sum(spec.nbytes for specs in stored.values() for spec in specs.values())
    weight_map = {member: name for name, specs in stored.items() for member in specs}
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
