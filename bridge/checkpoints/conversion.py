"""`bridge convert`: a checkpoint in another form, dtype or packing, or with its blocks apart.

Tensors stream from SRC to DST in pieces, so that a checkpoint larger than memory converts. SRC is
never written to, and DST appears whole or not at all (clauses 9.7 and 9.12).
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from bridge import remote_code as code
from bridge.checkpoints.conversion_checks import check_options, check_updates, keep_apart
from bridge.checkpoints.forms import BLOCK, FORMS, LORA, Entry, PackedPlace, arrange, plain_config
from bridge.checkpoints.gguf import as_directory
from bridge.checkpoints.older_rope import with_older_rope
from bridge.checkpoints.packing import SCALES
from bridge.checkpoints.reading import (
    Checkpoint,
    host_hash,
    open_blocks,
    open_checkpoint,
    read_adapter,
)
from bridge.checkpoints.shards import is_adapter
from bridge.checkpoints.tensor_specs import TensorSpec, float_dtype
from bridge.checkpoints.tensors import entry_pieces
from bridge.checkpoints.writing import (
    SHARD_SIZE,
    copy_assets,
    write_base,
    write_entries,
    write_json,
    write_lora,
)
from bridge.config.quantization import Quantization
from bridge.errors import BridgeError, show
from bridge.files.atomic import new_directory, refuse_existing
from bridge.numbers.ranges import take
from bridge.numbers.rounding import rounded

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Converted:
    """What `convert` wrote."""

    path: str
    form: str
    dtype: str  # of most tensors; of quantised ones, that of their scales
    bytes: int  # of tensors
    tensors: int  # as the form stores them
    quantization: dict[str, Any] | None  # as in config.json
    dequantised: bool  # whether SRC was quantised and this is not
    adapter: bool
    lora_rank: int | None  # of the updates that are kept; None: there are none
    merged: bool  # whether updates were added to the matrices

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


def convert(
    src: str | Path,
    dst: str | Path,
    to: str = "mlx",
    *,
    dtype: str | None = None,
    quantize: int | None = None,
    group_size: int = 64,
    shard_size: int | str = SHARD_SIZE,
    adapter: bool = False,
    merge: str | Path | None = None,
    any_base: bool = False,
    remote_code: bool = False,
    quantize_blocks: bool = False,
    lora: str | Path | None = None,
    merge_lora: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Converted:
    """Write the checkpoint `src` as `dst` in the form `to`, torch, jax or mlx (clause 9.12).

    `src`: a checkpoint directory of any form, with blocks or without, an adapter, or a GGUF file
    (extra `gguf`). `dtype`: float32, bfloat16 or float16, rounded to the nearest; None keeps each
    tensor's. `quantize`: 4 or 8 bits (mlx alone), of the host's matrices, and of the blocks' with
    `quantize_blocks`. `shard_size`: bytes, or a text such as 5GB. `adapter`: write the blocks
    alone; without it an adapter is written whole, on the base that it names or on `merge`.
    `any_base`: whatever the hash of that base. `remote_code`: add the code with which transformers
    (torch) or mlx-lm (mlx) runs the blocks. `lora`: take the low-rank updates in this directory,
    which PEFT saved (clause 9.13). `merge_lora`: add updates, these or SRC's own, to the matrices,
    rounded once; without it they are kept. `overwrite`: a checkpoint at `dst` is replaced.
    `progress(done, total)` hears of bytes. Raises BridgeError in one line; `dst` is then as it was.
    """
    src, dst = Path(src), Path(dst)
    refuse_existing(dst, overwrite)
    if to not in FORMS:
        raise BridgeError(f"to: {to!r} is no form; use one of {', '.join(FORMS)}")
    check_options(to, quantize, group_size, adapter, merge, remote_code, quantize_blocks)
    largest = parse_size(shard_size)
    for other in (src, *(Path(read) for read in (merge, lora) if read is not None)):
        keep_apart(dst, other)
    with _opened(src, dst, adapter, merge, any_base, lora) as opened:
        check_updates(opened, to, quantize, adapter, remote_code, merge_lora)
        if opened.base is not None:
            keep_apart(dst, opened.base.path)
        stored, wanted = float_dtype(dtype or opened.dtype)
        of_all = {
            name: TensorSpec(spec.dtype if dtype is None else wanted, spec.shape)
            for name, spec in opened.specs.items()
            if BLOCK in name or LORA in name or not adapter
        }
        specs = {name: spec for name, spec in of_all.items() if LORA not in name}
        updates = {n: spec for n, spec in of_all.items() if LORA in n and not merge_lora}
        packed = _packing(opened, specs, to, quantize, group_size, quantize_blocks)
        if packed and dtype is not None and quantize is None:
            raise BridgeError(
                f"{src}: is quantised, so its dtype is that of its scales; leave --dtype out, or "
                "convert it to torch first"
            )
        new = None if quantize is None else Quantization(quantize, group_size)
        raw = _config(opened, packed, new)
        for key in ("dtype", "torch_dtype"):  # the host's own key says what is stored
            if dtype is not None and key in raw:
                raw[key] = stored
        entries = arrange(to, specs, packed)
        total = sum(entry.nbytes for entry in entries)
        kept, added = (None, opened.config.lora) if merge_lora else (opened.config.lora, None)
        pieces = _reported(
            lambda e: entry_pieces(e, opened.tensors, specs, packed, added), total, progress
        )
        said = _base(src, opened) if adapter else None
        if to == "mlx":
            raw = with_older_rope(raw)
        with new_directory(dst, overwrite) as directory:
            if remote_code:
                raw = code.add(directory, raw, to)
            write_json(directory / "config.json", raw)
            write_entries(directory, to, entries, pieces, largest)
            if kept is not None:
                numbers = ((n, rounded(opened.tensors[n], s.dtype, n)) for n, s in updates.items())
                write_lora(directory, kept, updates, numbers)
            if said:
                write_base(directory, *said)
            else:
                copy_assets(opened.assets, directory)
        was_packed = any(isinstance(opened.tensors.sources[n], PackedPlace) for n in specs)
    return Converted(
        path=str(dst),
        form=to,
        dtype=stored,
        bytes=total + sum(spec.nbytes for spec in updates.values()),
        tensors=sum(len(entry.stored) for entry in entries) + len(updates),
        quantization=raw.get("quantization"),
        dequantised=was_packed and not packed,
        adapter=adapter,
        lora_rank=kept.rank if kept else None,
        merged=added is not None,
    )


def parse_size(size: int | str) -> int:
    """Bytes: a number, or a text such as 5GB, 500MB or 2GiB."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(size))
    unit = UNITS.get(found[2].upper()) if found else None
    number = float(found[1]) * unit if found is not None and unit is not None else 0.0
    if number < 1:
        raise BridgeError(f"shard_size: {show(size)} is no size; try 5GB, 500MB or 2GiB")
    return take("shard_size", int(number) if isfinite(number) else number)


@contextmanager
def _opened(
    src: Path,
    dst: Path,
    adapter: bool,
    merge: str | Path | None,
    any_base: bool,
    lora: str | Path | None,
) -> Iterator[Checkpoint]:
    """SRC, opened: of an adapter that stays one, the blocks and updates alone."""
    updates = None if lora is None else Path(lora)
    if src.suffix == ".gguf":
        if adapter or merge is not None:
            raise BridgeError(f"{src}: a GGUF file holds a plain host, so there are no blocks")
        with as_directory(src, dst) as directory:
            yield open_checkpoint(directory, lora=updates)
    elif adapter and src.is_dir() and is_adapter(src):
        yield open_blocks(src, updates)
    else:
        base = None if merge is None else Path(merge)
        opened = open_checkpoint(src, base, any_base=any_base, lora=updates)
        if adapter and opened.config.bridge is None and opened.config.lora is None:
            raise BridgeError(
                f"{src}: has no blocks, so there is no adapter; bridge init adds some"
            )
        yield opened


def _base(src: Path, opened: Checkpoint) -> tuple[Path, str]:
    """The base of the adapter that is written, and its hash: SRC, or what it names itself."""
    if is_adapter(src):
        name, digest = read_adapter(src)
        return src / name, digest
    return src, host_hash(opened)


def _packing(
    opened: Checkpoint,
    specs: Mapping[str, TensorSpec],
    to: str,
    quantize: int | None,
    group_size: int,
    quantize_blocks: bool,
) -> dict[str, Quantization]:
    """How to store each matrix that is to be quantised, or to stay so (clause 9.11)."""
    sources = opened.tensors.sources
    already = {n: s.how for n in specs if isinstance(s := sources[n], PackedPlace)}
    if quantize is None:
        return already if to == "mlx" else {}
    if already:
        raise BridgeError(
            f"{opened.path}: is quantised already, and twice would lose more; start from the "
            "checkpoint that it was made of"
        )
    chosen = {
        name: Quantization(quantize, group_size)
        for name, spec in specs.items()
        if len(spec.shape) == 2 and spec.shape[1] % group_size == 0
        if quantize_blocks or BLOCK not in name
    }
    if not chosen:
        raise BridgeError(
            f"{opened.path}: no matrix has rows of a multiple of {group_size} numbers; choose a "
            "smaller --group-size"
        )
    for name in chosen:
        if specs[name].dtype.name not in SCALES:
            raise BridgeError(
                f"{opened.path}: tensor {name!r} is {specs[name].dtype}, which MLX does not "
                "quantise; add --dtype f32"
            )
    return chosen


def _config(
    opened: Checkpoint, packed: Mapping[str, Quantization], new: Quantization | None
) -> dict[str, Any]:
    """The config that fits what is written, with every key of the source in its place."""
    raw = plain_config(opened.raw_config)
    if not packed:
        return raw
    said = opened.raw_config.get("quantization")
    if new is None and said is not None:
        keys = raw.keys() | {"quantization", "quantization_config"}
        return {key: value for key, value in opened.raw_config.items() if key in keys}
    if new is None and opened.base is not None:  # the host alone is quantised, and says how
        said = opened.base.raw_config["quantization"]
    said = new.to_json() if new else said
    return raw | {"quantization": said, "quantization_config": said}


def _reported(
    pieces: Callable[[Entry], Iterator[np.ndarray]],
    total: int,
    progress: Callable[[int, int], None] | None,
) -> Callable[[Entry], Iterator[np.ndarray]]:
    """`pieces`, of which `progress` hears."""
    done = 0

    def each(entry: Entry) -> Iterator[np.ndarray]:
        nonlocal done
        for piece in pieces(entry):
            yield piece
            done += piece.nbytes
            if progress is not None:
                progress(done, total)

    return each
