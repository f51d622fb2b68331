"""A GGUF file, in one part or several, as a Hugging Face directory (extra `gguf`).

The `gguf` package reads and dequantises, to float32; transformers makes the tokenizer of it. Every
tensor and every key of the file's architecture is accounted for: it is in what is written, or is
known to say nothing, or the file is refused by its name. Tensors are read one at a time.
"""

import contextlib
import io
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bridge.checkpoints.gguf_config import config_of
from bridge.checkpoints.gguf_tokenizer import save_tokenizer
from bridge.checkpoints.tensor_specs import TensorSpec
from bridge.checkpoints.writing import write_checkpoint, write_json
from bridge.config import ModelConfig, parse_config, tensor_shapes
from bridge.errors import BridgeError, one_line, show
from bridge.files.atomic import refuse_existing
from bridge.numbers.rounding import first_not_finite

FACTORS = "rope_freqs.weight"  # by which llama.cpp divides rope's frequencies
COMPUTED = re.compile(r"blk\.\d+\.attn_rot_embd(\.weight)?")  # rope's frequencies, in old files
LONG = ("tokens", "token_type", "scores", "merges")  # of the vocabulary, told by their length
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
MERGE = "merge the parts by llama-gguf-split --merge FIRST-PART OUT"


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file says, all its parts together."""

    metadata: dict[str, Any]  # without `split.`; of long arrays, their length
    tensors: dict[str, Any]  # gguf's ReaderTensor, by name

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by GGUF's names, the slowest axis first as in NumPy."""
        return {name: tuple(t.shape[::-1].tolist()) for name, t in self.tensors.items()}


def export_gguf(path: Path, out: Path) -> None:
    """Write the model and tokenizer of a GGUF file as the checkpoint directory `out`.

    `path`: the file, or the first of its parts. Raises BridgeError where packages are missing or
    cannot read the file; where a part or a tensor is missing or left over; and, by name, for an
    architecture or a key that cannot be carried over.
    """
    refuse_existing(out)
    if not path.is_file():
        raise BridgeError(f"{path}: no such file")
    with _quiet():
        try:
            import gguf  # noqa: F401
            import transformers  # noqa: F401  of the tokenizer
        except ImportError as error:
            raise BridgeError(
                f"{path}: reading GGUF needs transformers and gguf ({error}); "
                "try: pip install 'bridge-llm[gguf]'"
            ) from None
        file = read_gguf(path)
        factors = _tensor(file, FACTORS, str(path)) if FACTORS in file.tensors else None
        raw = config_of(file.metadata, file.shapes(), factors, str(path))
        config = parse_config(raw, str(path))
        names = _match(file, config, str(path))
        specs = {
            name: TensorSpec(np.dtype(np.float32), shape)
            for name, shape in tensor_shapes(config).items()
        }
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.assets-") as assets:
            save_tokenizer(path, file.metadata, Path(assets))
            ids = {key: raw[key] for key in raw if key.endswith("_token_id")}
            write_json(Path(assets) / "generation_config.json", ids)
            tensors = _tensors(file, names, config, str(path))
            write_checkpoint(out, raw, specs, tensors, assets=Path(assets))


@contextmanager
def as_directory(path: Path, out: Path) -> Iterator[Path]:
    """The directory of a GGUF file, beside `out` for as long as it is needed. Raises BridgeError
    as `export_gguf` does."""
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.host-") as directory:
        export_gguf(path, Path(directory) / "host")
        yield Path(directory) / "host"


def read_gguf(path: Path) -> GgufFile:
    """The headers of a file and, if it is split, of all its parts, which lie beside it.

    Raises BridgeError where one is missing, damaged or not the part that its name says.
    """
    metadata, tensors = _read_part(path)
    count, number = metadata.get("split.count", 1), metadata.get("split.no", 0)
    if count != 1:
        metadata, tensors = _gather(path, count, number, metadata, tensors)
    kept = {k: v for k, v in metadata.items() if not k.startswith(("GGUF.", "split."))}
    return GgufFile(kept, tensors)


def _gather(
    path: Path, count: Any, number: Any, metadata: dict[str, Any], tensors: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and tensors of all `count` parts, of which `path` is `number`, from 0."""
    found = PART.fullmatch(path.name)
    if type(count) is not int or type(number) is not int or not 0 <= number < count <= 99999:
        raise BridgeError(
            f"{path}: split.no {show(number)} of split.count {show(count)} is no part"
        )
    if found is None or (int(found[2]), int(found[3])) != (number + 1, count):
        raise BridgeError(
            f"{path}: is part {number + 1} of {count}, but not named as such "
            f"(NAME-{number + 1:05}-of-{count:05}.gguf); rename it, or {MERGE}"
        )
    parts = [path.with_name(f"{found[1]}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    if number:
        raise BridgeError(
            f"{path}: is part {number + 1} of {count}; name the first, {parts[0].name}"
        )
    wanted = metadata.get("split.tensors.count")
    for i, part in enumerate(parts[1:], 1):
        if not part.is_file():
            raise BridgeError(
                f"{path}: is part 1 of {count}, and {part.name} is not beside it; copy all parts "
                f"there, or {MERGE}"
            )
        own, more = _read_part(part)
        if (own.get("split.no"), own.get("split.count")) != (i, count):
            raise BridgeError(
                f"{part}: does not say that it is part {i + 1} of {count}; copy it again"
            )
        for key, value in own.items():
            if not key.startswith(("GGUF.", "split.")) and metadata.get(key) != value:
                raise BridgeError(f"{part}: {one_line(key)} is not as in {path.name}; {MERGE}")
        if twice := sorted(more.keys() & tensors.keys()):
            raise BridgeError(f"{part}: tensor {show(twice[0])} is in an earlier part too")
        tensors = tensors | more
    if wanted is not None and wanted != len(tensors):
        raise BridgeError(
            f"{path}: split.tensors.count is {show(wanted)}, but its parts have {len(tensors)}"
        )
    return metadata, tensors


def _read_part(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    from gguf import GGUFReader

    class Reader(GGUFReader):
        """Refuses to read past the end, where the package's own would go on for as long as a count
        in the file says."""

        def _get(self, offset: int, dtype: Any, count: int = 1, *more: Any, **named: Any) -> Any:
            found = super()._get(offset, dtype, count, *more, **named)
            if len(found) != count:
                raise ValueError("it ends early; copy it again")
            return found

    try:
        reader = Reader(path)
        metadata = {
            key: len(field.data)
            if key.removeprefix("tokenizer.ggml.") in LONG
            else field.contents()
            for key, field in reader.fields.items()
        }
        return metadata, {tensor.name: tensor for tensor in reader.tensors}
    except Exception as error:  # whatever its reader raises on a damaged file
        reason = str(error).strip().partition("\n")[0]
        raise BridgeError(f"{path}: cannot be read as GGUF ({one_line(reason)})") from error


def _match(file: GgufFile, config: ModelConfig, source: str) -> dict[str, str]:
    """GGUF's name of each tensor of the model. Raises BridgeError for one that is missing, has
    another shape or is left over."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = file.metadata["general.architecture"]
    arch = next(a for a in MODEL_ARCH if MODEL_ARCH_NAMES[a] == architecture)
    theirs = get_tensor_name_map(arch, config.num_hidden_layers)
    names, shapes = {}, file.shapes()
    for name, shape in tensor_shapes(config).items():
        stem, _, kind = name.rpartition(".")
        names[name] = found = f"{theirs.get_name(stem)}.{kind}"
        if found not in shapes:
            raise BridgeError(
                f"{source}: tensor {found!r} is missing; copy the file again, or, if it is one "
                "part of several, all of them"
            )
        if shapes[found] != shape:
            raise BridgeError(
                f"{source}: tensor {found!r} is {list(shapes[found])}, but the metadata call for "
                f"{list(shape)}"
            )
    left = shapes.keys() - set(names.values()) - {FACTORS}
    if left := sorted(name for name in left if not COMPUTED.fullmatch(name)):
        raise BridgeError(
            f"{source}: tensor {show(left[0])} is not one of a {architecture} model that Bridge "
            "knows, and cannot be carried over"
        )
    return names


def _tensors(
    file: GgufFile, names: Mapping[str, str], config: ModelConfig, source: str
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors `names` in float32, under Hugging Face's names and in its order of rows."""
    interleaved = file.metadata["general.architecture"] == "llama"
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, found in names.items():
        tensor = _tensor(file, found, source)
        count = heads.get(found.split(".")[-2])
        if interleaved and count:  # llama.cpp turns coordinates 2i and 2i + 1 of a head together
            pairs = tensor.reshape(count, config.head_dim // 2, 2, -1)
            tensor = pairs.swapaxes(1, 2).reshape(tensor.shape)
        yield name, np.ascontiguousarray(tensor)


def _tensor(file: GgufFile, name: str, source: str) -> np.ndarray:
    from gguf import dequantize

    tensor = file.tensors[name]
    try:
        found = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    except Exception as error:  # a type that the package cannot unpack, or a damaged tensor
        raise BridgeError(
            f"{source}: tensor {name!r} of type {tensor.tensor_type.name} cannot be dequantised "
            f"({one_line(str(error))})"
        ) from error
    if (at := first_not_finite(found)) is not None:
        raise BridgeError(
            f"{source}: tensor {name!r} holds {found[at]} at {list(at)}; weights must be finite"
        )
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither logs nor progress bars of the libraries on the user's terminal."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield
