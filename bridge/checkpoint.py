"""Checkpoints on disk, opened lazily (chapter 9).

A directory holds `config.json`, `model.safetensors` or shards with an index, and a tokenizer's
files. Opening reads headers alone and checks every name, shape and dtype against the config; a
tensor is read, and checked for NaN and infinity, when it is asked for. Nothing in a checkpoint can
make us read outside its directory or run code.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bridge.config import ModelConfig, parse_config, read_config, tensor_shapes
from bridge.errors import BridgeError
from bridge.finite import first_not_finite
from bridge.safetensors_io import CODES, DAMAGED, SafetensorsFile, TensorSpec, tensor_bytes

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "bridge_adapter.json"
FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class CheckpointTensors(Mapping[str, np.ndarray]):
    """Tensors by name in canonical order (clause 9.3), each read and checked when asked for."""

    def __init__(self, files: Mapping[str, SafetensorsFile]) -> None:
        """`files`: the file that holds each tensor."""
        self.files = dict(files)
        self.specs = {name: file.specs[name] for name, file in files.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        file = self.files[name]
        array = file[name]
        if (where := first_not_finite(array)) is not None:
            raise BridgeError(
                f"{file.path}: tensor {name!r} holds {array[where]} at {list(where)}; "
                "weights must be finite"
            )
        return array

    def __contains__(self, name: object) -> bool:
        return name in self.files  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint."""

    path: Path
    assets: Path  # where the tokenizer's files are: the base's directory for an adapter
    config: ModelConfig
    raw_config: dict[str, Any]
    tensors: CheckpointTensors
    base: "Checkpoint | None" = None  # of an adapter

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Dtype and shape of every tensor, from the headers."""
        return self.tensors.specs

    @property
    def dtype(self) -> str:
        """The stored dtype; where tensors differ, that of most bytes."""
        stored: Counter[str] = Counter()
        for spec in self.specs.values():
            stored[FLOATS[CODES[spec.dtype]]] += spec.nbytes
        return stored.most_common(1)[0][0]


def open_checkpoint(
    path: Path, base: Path | None = None, *, headers_only: bool = False
) -> Checkpoint:
    """Open a checkpoint directory, or an adapter on its base (clause 9.5).

    `base`: the host of an adapter; None takes the one that the adapter names. `headers_only`: do
    not compare contents either (the hash of an adapter's base, a tied head stored twice), which is
    for looking at a checkpoint and not for running it. Raises BridgeError, naming file, tensor and
    mend, for whatever does not fit.
    """
    if not path.is_dir():
        mend = (
            "bridge init makes a checkpoint of a GGUF file" if path.is_file() else "check the name"
        )
        raise BridgeError(f"{path}: no such checkpoint directory; {mend}")
    config, raw = read_config(path / "config.json")
    if (path / ADAPTER).exists():
        return _open_adapter(path, config, raw, base, headers_only)
    if base is not None:
        raise BridgeError(f"{path}: is no adapter (no {ADAPTER}), so it takes no base")
    tensors = _match(path, config, tensor_shapes(config), find_tensors(path), headers_only)
    return Checkpoint(path, path, config, raw, tensors)


def content_hash(tensors: CheckpointTensors) -> str:
    """SHA-256 over names, dtypes, shapes and bytes in canonical order, however they are sharded."""
    digest = hashlib.sha256()
    for name, file in tensors.files.items():
        dtype, shape = tensors.specs[name]
        digest.update(json.dumps([name, CODES[dtype], list(shape)]).encode())
        digest.update(tensor_bytes(file[name]))
    return digest.hexdigest()


def find_tensors(path: Path) -> dict[str, SafetensorsFile]:
    """The file of every tensor in a directory, single or sharded (clause 9.4)."""
    single, index = path / SINGLE, path / INDEX
    if single.exists() and index.exists():
        raise BridgeError(f"{path}: has both {SINGLE} and {INDEX}; remove one of the two")
    if not index.exists():
        if not single.exists():
            raise BridgeError(f"{path}: has neither {SINGLE} nor {INDEX}; copy the weights there")
        file = SafetensorsFile(single)
        return dict.fromkeys(file, file)
    weight_map = _read_index(index)
    shards = {name: SafetensorsFile(path / name) for name in sorted(set(weight_map.values()))}
    holders: dict[str, str] = {}
    for shard, file in shards.items():
        for name in file:
            if name in holders:
                raise BridgeError(f"{path}: tensor {name!r} is in {holders[name]} and in {shard}")
            if weight_map.get(name) != shard:
                raise BridgeError(f"{path / shard}: tensor {name!r} is not where {INDEX} says")
            holders[name] = shard
    for name, shard in weight_map.items():
        if name not in holders:
            raise BridgeError(f"{path / shard}: lacks tensor {name!r}, which {INDEX} puts there")
    return {name: shards[shard] for name, shard in weight_map.items()}


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = set(weight_map.values())
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise BridgeError(f"{index}: must be JSON with a weight_map; {DAMAGED}") from None
    for shard in shards:
        plain = isinstance(shard, str) and shard == Path(shard).name and "\\" not in shard
        if not plain or not shard.endswith(".safetensors"):
            raise BridgeError(
                f"{index}: weight_map names {shard!r}; it must be a .safetensors file in the same "
                "directory"
            )
    return weight_map


def _match(
    path: Path,
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    found: dict[str, SafetensorsFile],
    headers_only: bool = False,
) -> CheckpointTensors:
    """The tensors found, in canonical order, once their names, shapes and dtypes are as wanted."""
    found = {n: f for n, f in found.items() if not n.endswith(".rotary_emb.inv_freq")}  # computed
    if config.tie_word_embeddings and "lm_head.weight" in found:
        if not headers_only:
            _check_tied(found["lm_head.weight"], found.get("model.embed_tokens.weight"))
        del found["lm_head.weight"]
    for name, shape in shapes.items():
        if name not in found:
            raise BridgeError(f"{path}: tensor {name!r} is missing; config.json calls for it")
        spec, file = found[name].specs[name], found[name]
        if spec.shape != shape:
            raise BridgeError(
                f"{file.path}: tensor {name!r} is {list(spec.shape)}, but config.json calls for "
                f"{list(shape)}"
            )
        if CODES[spec.dtype] not in FLOATS:
            raise BridgeError(
                f"{file.path}: tensor {name!r} is {CODES[spec.dtype]}; weights must be one of "
                f"{', '.join(FLOATS)}"
            )
    if unexpected := sorted(found.keys() - shapes.keys()):
        hint = "; config.json has no bridge object" if ".bridge." in unexpected[0] else ""
        raise BridgeError(
            f"{found[unexpected[0]].path}: tensor {unexpected[0]!r} is not one that config.json "
            f"calls for{hint}"
        )
    return CheckpointTensors({name: found[name] for name in shapes})


def _check_tied(head: SafetensorsFile, embedding: SafetensorsFile | None) -> None:
    """Some writers store a tied head again; it must then be the embedding."""
    name, other = "lm_head.weight", "model.embed_tokens.weight"
    if embedding is None:
        return  # the embedding's absence is told elsewhere
    same = head.specs[name] == embedding.specs[other]
    if not same or tensor_bytes(head[name]) != tensor_bytes(embedding[other]):
        raise BridgeError(
            f"{head.path}: {name} differs from {other}, but config.json ties them; set "
            "tie_word_embeddings to false"
        )


def _open_adapter(
    path: Path, config: ModelConfig, raw: dict[str, Any], base: Path | None, headers_only: bool
) -> Checkpoint:
    where = path / ADAPTER
    try:
        said = json.loads(where.read_text(encoding="utf-8"))
        name, digest = said["base"], said["base_sha256"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        raise BridgeError(f"{where}: must be JSON with base and base_sha256; {DAMAGED}") from None
    if config.bridge is None:
        raise BridgeError(f"{path / 'config.json'}: bridge is missing; an adapter holds blocks")
    if not isinstance(name, str) or not isinstance(digest, str):
        raise BridgeError(f"{where}: base and base_sha256 must be texts; {DAMAGED}")
    directory = base or path / name  # an absolute name stands for itself
    if not directory.is_dir():
        raise BridgeError(f"{where}: its base {name!r} is not there; name it with --base")
    host = open_checkpoint(directory, headers_only=headers_only)
    if host.config != parse_config({k: v for k, v in raw.items() if k != "bridge"}):
        raise BridgeError(f"{directory}: its config.json differs from that of the adapter {path}")
    if not headers_only and content_hash(host.tensors) != digest:
        raise BridgeError(f"{directory}: is not the base of {path}: base_sha256 differs")
    shapes = {n: s for n, s in tensor_shapes(config).items() if n not in host.tensors}
    added = _match(path, config, shapes, find_tensors(path))
    files = {n: (added if n in added else host.tensors).files[n] for n in tensor_shapes(config)}
    return Checkpoint(path, host.assets, config, raw, CheckpointTensors(files), host)
