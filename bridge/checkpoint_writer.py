"""Writing checkpoints (chapter 9): whole or not at all, and the same bytes for the same tensors.

Tensors come one by one, in canonical order, and are written as they come: one in memory at a time.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from bridge.atomic import new_directory, new_file
from bridge.checkpoint import ADAPTER, INDEX, SINGLE, Checkpoint, host_hash
from bridge.config import SPEC_VERSION
from bridge.errors import BridgeError
from bridge.safetensors_io import TensorSpec, write_safetensors

SHARD_SIZE = 5_000_000_000  # bytes, Hugging Face's default
METADATA = {"format": "pt"}  # which transformers wants to see
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
) -> None:
    """Write a checkpoint directory; `tensors` come in the order of `specs`, the canonical one.

    `assets`: a directory whose tokenizer files are copied. `shard_size`: at most so many bytes of
    tensors a file, where more than one fits. Refuses a target that exists, before any work;
    `overwrite` allows for a checkpoint in its place, which is exchanged in one step.
    """
    with new_directory(path, overwrite) as directory:
        _write_json(directory / "config.json", raw_config)
        stream = iter(tensors)
        shards = _plan(specs, shard_size)
        for name, members in shards.items():
            part = {member: specs[member] for member in members}
            write_safetensors(directory / name, part, islice(stream, len(part)), METADATA)
        if (left_over := next(stream, None)) is not None:
            raise BridgeError(
                f"{path}: tensor {left_over[0]!r} came, but config.json has none such"
            )
        if len(shards) > 1:
            total = sum(spec.nbytes for spec in specs.values())
            weight_map = {member: name for name, members in shards.items() for member in members}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            _write_json(directory / INDEX, index)
        if assets is not None:
            copy_assets(assets, directory)


def write_adapter(
    path: Path,
    base: Checkpoint,
    raw_config: Mapping[str, Any],
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, np.ndarray]],
) -> None:
    """Write the blocks alone, with their base's place and hash (clause 9.5)."""
    with new_directory(path) as directory:
        _write_json(directory / "config.json", raw_config)
        write_safetensors(directory / SINGLE, specs, tensors, METADATA)
        said = {
            "spec_version": SPEC_VERSION,
            "base": str(base.path.resolve()),
            "base_sha256": host_hash(base),
        }
        _write_json(directory / ADAPTER, said)


def copy_assets(source: Path, target: Path) -> None:
    """Copy the tokenizer's files that there are."""
    for name in ASSETS:
        if (source / name).is_file():
            with (source / name).open("rb") as old, new_file(target / name) as new:
                shutil.copyfileobj(old, new)


def _plan(specs: Mapping[str, TensorSpec], shard_size: int) -> dict[str, list[str]]:
    """The tensors of each file: filled in order, a tensor is never split."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.nbytes > shard_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    count = len(shards)
    return {f"model-{i:05}-of-{count:05}.safetensors": s for i, s in enumerate(shards, 1)}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with new_file(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
