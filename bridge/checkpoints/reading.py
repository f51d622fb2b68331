"""Checkpoints on disk, opened lazily (chapter 9).

A directory holds `config.json`, the tensors in one of three forms (bridge/checkpoints/forms.py),
and a tokenizer's files. Opening reads headers alone and checks every name, shape and dtype against
the config; a tensor is read, and checked for NaN and infinity, when it is asked for. Nothing in a
checkpoint can make us read outside its directory or run code.
"""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bridge.checkpoints.forms import BLOCK, LORA, Place, Source, find_packed, form_of, locate
from bridge.checkpoints.lora import DIRECTORY, find_lora, read_lora
from bridge.checkpoints.packing import side_names
from bridge.checkpoints.safetensors_io import DAMAGED, SafetensorsFile
from bridge.checkpoints.shards import ADAPTER, BLOCKS, find_tensors, is_adapter
from bridge.checkpoints.tensor_specs import CODES, FLOATS, TensorSpec
from bridge.checkpoints.tensors import CheckpointTensors, content_hash, same_bytes
from bridge.config import ModelConfig, read_config, tensor_shapes
from bridge.config.quantization import Quantization, parse_quantization
from bridge.errors import BridgeError, show
from bridge.files.strict_json import read_object


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint."""

    path: Path
    assets: Path  # where the tokenizer's files are: the base's directory for an adapter
    config: ModelConfig
    raw_config: dict[str, Any]
    tensors: CheckpointTensors
    form: str  # torch, jax or mlx (chapter 9); of an adapter, that of its blocks
    quantization: Quantization | None = None  # of most quantised matrices; None: there are none
    base: "Checkpoint | None" = None  # of an adapter

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Dtype and shape of every tensor, from the headers."""
        return self.tensors.specs

    @property
    def dtype(self) -> str:
        """The stored dtype, for quantised tensors that of their scales; where tensors differ, that
        of most numbers by size."""
        stored: Counter[str] = Counter()
        for spec in self.specs.values():
            stored[FLOATS[CODES[spec.dtype]]] += spec.nbytes
        return stored.most_common(1)[0][0]


def open_checkpoint(
    path: Path,
    base: Path | None = None,
    *,
    headers_only: bool = False,
    any_base: bool = False,
    lora: Path | None = None,
) -> Checkpoint:
    """Open a checkpoint directory of any form, or an adapter on its base (clause 9.5).

    `base`: the host of an adapter; None takes the one that the adapter names. `headers_only`: do
    not compare contents either (the hash of an adapter's base, a tied head stored twice), which is
    for looking at a checkpoint and not for running it. `any_base`: take a base of another hash.
    `lora`: a directory of updates as PEFT saves it, for a checkpoint without (clause 9.13).
    Raises BridgeError, naming file, tensor and mend, for whatever does not fit.
    """
    if not os.path.isdir(path):  # also of a name that no file can have
        mend = (
            "bridge init and bridge convert make a checkpoint of a GGUF file"
            if os.path.isfile(path)
            else "check the name"
        )
        raise BridgeError(f"{path}: no such checkpoint directory; {mend}")
    config, raw = read_config(path / "config.json")
    if is_adapter(path):
        opened = _open_adapter(path, raw, base, headers_only, any_base)
    elif base is not None:
        raise BridgeError(f"{path}: is no adapter (no {ADAPTER}), so it takes no base")
    else:
        opened = _with_updates(_opened(path, config, raw, tensor_shapes(config), headers_only))
    return opened if lora is None else _with_updates(opened, lora)


def host_hash(checkpoint: Checkpoint) -> str:
    """What an adapter says of its base: the content hash of its host's tensors (clause 9.5)."""
    host = checkpoint.config.without_bridge().without_lora()
    return content_hash(checkpoint.tensors, tensor_shapes(host))


def _opened(
    path: Path,
    config: ModelConfig,
    raw: dict[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    headers_only: bool = False,
) -> Checkpoint:
    """The checkpoint of a directory that holds exactly the tensors `shapes`."""
    found = find_tensors(path)
    tensors = _match(path, config, raw, shapes, found, headers_only)
    files = {file.path.name for file in found.values()}
    apart = BLOCKS in files and len(files) > 1
    form = "mlx" if apart else form_of(tensors.sources.values())
    quantization = parse_quantization(raw, str(path / "config.json"))
    return Checkpoint(path, path, config, raw, tensors, form, quantization)


def _with_updates(opened: Checkpoint, directory: Path | None = None) -> Checkpoint:
    """A checkpoint with the updates that are beside its tensors, if any (clause 9.13); or with
    those of a directory that the user named."""
    if directory is None:
        found = find_lora(opened.path, opened.config)
    elif opened.config.lora is not None:
        raise BridgeError(
            f"{opened.path}: has updates of its own (in {DIRECTORY}); take one of them"
        )
    else:
        found = read_lora(directory, opened.config)
    if found is None:
        return opened
    config = replace(opened.config, lora=found.config)
    sources = {**opened.tensors.sources, **found.places}
    ordered = {name: sources[name] for name in tensor_shapes(config) if name in sources}
    return replace(opened, config=config, tensors=CheckpointTensors(ordered))


def _match(
    path: Path,
    config: ModelConfig,
    raw: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    found: Mapping[str, SafetensorsFile],
    headers_only: bool = False,
) -> CheckpointTensors:
    """The tensors found, in canonical order, once their names, shapes and dtypes are as wanted."""
    places = locate(found, config)
    left = {n: p for n, p in places.items() if not n.endswith(".rotary_emb.inv_freq")}  # computed
    if config.tie_word_embeddings:
        _take_tied(left, headers_only)
    sources: dict[str, Source] = {}
    for name, shape in shapes.items():
        if name not in left:
            if BLOCK in name and not any(BLOCK in other for other in places):
                raise BridgeError(
                    f"{path}: has no blocks, though config.json has a bridge object; what saved it "
                    "held the host alone (transformers and trainers need trust_remote_code=True "
                    "and code, see bridge convert --remote-code), or take bridge out of config.json"
                )
            raise BridgeError(f"{path}: tensor {name!r} is missing; config.json calls for it")
        place, packed = left.pop(name), find_packed(name, shape, places)
        sources[name] = packed or place
        if packed is None:
            _check_spec(name, place, shape)
            continue
        for side in side_names(name):
            del left[side]
        if raw.get("quantization") is None:
            raise BridgeError(
                f"{place.file.path}: tensor {name!r} is quantised, but config.json has no "
                "quantization; copy both again"
            )
    if left:
        name = min(left)
        hint = "; config.json has no bridge object" if BLOCK in name and not config.bridge else ""
        raise BridgeError(
            f"{left[name].file.path}: tensor {show(name)} is not one that config.json calls "
            f"for{hint}"
        )
    return CheckpointTensors(sources)


def _check_spec(name: str, place: Place, shape: tuple[int, ...]) -> None:
    spec = place.spec
    if spec.shape != shape:
        raise BridgeError(
            f"{place.file.path}: tensor {name!r} is {list(spec.shape)}, but config.json calls for "
            f"{list(shape)}"
        )
    if CODES[spec.dtype] not in FLOATS:
        raise BridgeError(
            f"{place.file.path}: tensor {name!r} is {CODES[spec.dtype]}; weights must be one of "
            f"{', '.join(FLOATS)}"
        )


def _take_tied(places: dict[str, Place], headers_only: bool) -> None:
    """Some writers store a tied head again; it must then be the embedding, and is left out."""
    name, other = "lm_head.weight", "model.embed_tokens.weight"
    for one, same in zip((name, *side_names(name)), (other, *side_names(other)), strict=True):
        head, embedding = places.pop(one, None), places.get(same)
        if head is None or headers_only or (one == name and embedding is None):
            continue  # the embedding's absence is told elsewhere
        if embedding is None or not same_bytes(head, embedding):
            raise BridgeError(
                f"{head.file.path}: {one} differs from {same}, but config.json ties them; set "
                "tie_word_embeddings to false"
            )


def _open_adapter(
    path: Path,
    raw: dict[str, Any],
    base: Path | None,
    headers_only: bool,
    any_base: bool,
) -> Checkpoint:
    name, digest = read_adapter(path)
    blocks = open_blocks(path)
    directory = base or path / name  # an absolute name stands for itself
    if not os.path.isdir(directory):  # also for a name that no file can have
        raise BridgeError(
            f"{path / ADAPTER}: its base {show(name)} is not there; name it with --base"
        )
    if is_adapter(directory):
        raise BridgeError(f"{directory}: is an adapter itself, so it cannot be the base of {path}")
    host = open_checkpoint(directory, headers_only=headers_only)
    config = blocks.config
    if host.config.lora is not None and config.lora is None:
        raise BridgeError(
            f"{directory}: has updates (in {DIRECTORY}), and its adapter {path} has none, which "
            "leaves open what it is of; copy them to the adapter, or merge them: bridge convert "
            "--merge-lora"
        )
    plain = [of.without_bridge().without_lora() for of in (host.config, config)]
    if plain[0] != plain[1]:
        raise BridgeError(f"{directory}: its config.json differs from that of the adapter {path}")
    if not (headers_only or any_base) and host_hash(host) != digest:
        raise BridgeError(
            f"{directory}: is not the base of {path}: base_sha256 differs; use the base that it "
            "was made for, or take this one with bridge convert --any-base"
        )
    sources = blocks.tensors.sources | {
        n: s for n, s in host.tensors.sources.items() if BLOCK not in n and LORA not in n
    }
    tensors = CheckpointTensors({name: sources[name] for name in tensor_shapes(config)})
    quantization = host.quantization or blocks.quantization
    return Checkpoint(path, host.assets, config, raw, tensors, blocks.form, quantization, host)


def open_blocks(path: Path, lora: Path | None = None) -> Checkpoint:
    """The blocks and updates of an adapter alone, without its base; `lora` as above."""
    config, raw = read_config(path / "config.json")
    shapes = {name: shape for name, shape in tensor_shapes(config).items() if BLOCK in name}
    if shapes:
        blocks = _opened(path, config, raw, shapes)
    else:
        blocks = Checkpoint(path, path, config, raw, CheckpointTensors({}), "torch")
    found = _with_updates(blocks)
    if not found.specs:
        raise BridgeError(
            f"{path / 'config.json'}: bridge is missing; an adapter holds blocks, or updates (in "
            f"{DIRECTORY})"
        )
    return found if lora is None else _with_updates(found, lora)


def read_adapter(path: Path) -> tuple[str, str]:
    """The place and the hash of an adapter's base, as it says."""
    where = path / ADAPTER
    try:
        said = read_object(where)
        name, digest = said["base"], said["base_sha256"]
    except (OSError, KeyError):
        raise BridgeError(f"{where}: must be JSON with base and base_sha256; {DAMAGED}") from None
    if not isinstance(name, str) or not isinstance(digest, str):
        raise BridgeError(f"{where}: base and base_sha256 must be texts; {DAMAGED}")
    return name, digest
