"""The tensors of an opened checkpoint: whole arrays when asked for, or their bytes in passing.

Whatever the form, a tensor has its Hugging Face name, a float dtype, and only finite numbers. Who
asks for an array gets a view of the mapped file, or a quantised matrix dequantised. Pieces are read
into memory of their own, some at a time, and leave nothing resident.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from bridge.checkpoints.forms import Entry, PackedPlace, Place, Source, parts_of
from bridge.checkpoints.lora import Update, update_of
from bridge.checkpoints.packing import Packed, quantise, side_names
from bridge.checkpoints.safetensors_io import SafetensorsFile
from bridge.checkpoints.tensor_specs import CODES, TensorSpec
from bridge.config import LoraConfig
from bridge.config.quantization import Quantization
from bridge.errors import BridgeError
from bridge.numbers.rounding import first_not_finite, rounded

PIECE = 1 << 21  # bytes read at a time: few enough for the cache, many enough for the disk


class CheckpointTensors(Mapping[str, np.ndarray]):
    """Tensors by name in canonical order (clause 9.3), each read and checked when asked for."""

    def __init__(self, sources: Mapping[str, Source]) -> None:
        """`sources`: where each tensor lies."""
        self.sources = dict(sources)
        self.specs = {name: _logical(source) for name, source in sources.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        """The tensor in its stored dtype, for a quantised one that of its scales."""
        source = self.sources[name]
        if isinstance(source, Place):
            return _checked(source, source.view())
        return _checked(source.weight, _packed(source).dequantise())

    def packed(self, name: str) -> Packed | None:
        """A quantised matrix as it is stored; None for any other tensor."""
        source = self.sources[name]
        return _packed(source) if isinstance(source, PackedPlace) else None

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor on disk: fewer than its numbers take, where it is quantised."""
        return sum(place.spec.nbytes for place in parts_of(self.sources[name]))

    @property
    def files(self) -> dict[str, SafetensorsFile]:
        """The file that holds each tensor."""
        return {name: parts_of(source)[0].file for name, source in self.sources.items()}

    def __contains__(self, name: object) -> bool:
        return name in self.sources  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)


def content_hash(tensors: CheckpointTensors, names: Iterable[str]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of `names`, in their order (clause 9.5).

    However they are sharded or stacked; a quantised matrix counts as the three that it is.
    """
    digest = hashlib.sha256()
    for name in names:
        parts = parts_of(tensors.sources[name])
        for part, place in zip((name, *side_names(name)), parts, strict=False):
            dtype, shape = place.spec
            digest.update(json.dumps([part, CODES[dtype], list(shape)]).encode())
            for piece in raw_pieces(place):
                digest.update(piece.data)
    return digest.hexdigest()


def same_bytes(one: Place, other: Place) -> bool:
    """Whether two arrays are the same in dtype, shape and every byte."""
    if one.spec != other.spec:
        return False
    pairs = zip(raw_pieces(one), raw_pieces(other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def raw_pieces(place: Place, piece: int = PIECE) -> Iterator[np.ndarray]:
    """The bytes of an array as they are, uint8, unchecked."""
    size = place.spec.nbytes
    for start in range(0, size, piece):
        buffer = np.empty(min(piece, size - start), np.uint8)
        place.read_into(start, buffer.data)
        yield buffer


def entry_pieces(
    entry: Entry,
    tensors: CheckpointTensors,
    specs: Mapping[str, TensorSpec],
    packed: Mapping[str, Quantization],
    merge: LoraConfig | None = None,
) -> Iterator[np.ndarray]:
    """The bytes of what a writer stores, in order: numbers in the dtypes of `specs`, and the
    matrices in `packed` quantised, or as they are where they are quantised already.

    `merge`: add the updates among `tensors` to their matrices (clause 9.13), none of which is to
    stay quantised. Raises BridgeError for a number that is not finite, or not in the dtype.
    """
    for name in entry.names:
        source, spec = tensors.sources[name], specs[name]
        if name in packed and isinstance(source, PackedPlace):
            yield from _checked_parts(source)
            continue
        pieces = _float_pieces(name, source, spec, update_of(tensors, name, merge))
        yield from _quantised(pieces, spec, packed[name]) if name in packed else pieces


def _quantised(
    pieces: Iterator[np.ndarray], spec: TensorSpec, how: Quantization
) -> Iterator[np.ndarray]:
    """A matrix packed: its words as they come, then all scales and all biases."""
    scales, biases = [], []
    for rows in pieces:
        part = quantise(rows.reshape(-1, spec.shape[1]), how)
        yield part.weight
        scales.append(part.scales)
        biases.append(part.biases)
    yield from scales
    yield from biases


def merged(tensors: Mapping[str, np.ndarray], name: str, lora: LoraConfig | None) -> np.ndarray:
    """A tensor with its update, if it has one, added and rounded once to its dtype (9.13)."""
    array, update = tensors[name], update_of(tensors, name, lora)
    if update is None:
        return array
    out = np.empty_like(array)
    rows = max(1, PIECE // (8 * array.shape[1]))
    for first in range(0, len(array), rows):
        part = update.added(array[first : first + rows], first)
        out[first : first + rows] = rounded(part, array.dtype, name)
    return out


def _float_pieces(
    name: str, source: Source, spec: TensorSpec, update: Update | None
) -> Iterator[np.ndarray]:
    """A tensor's numbers as `spec` has them, whole rows of it at a time and flat, all of them
    finite, and with its update added if one is given.

    Raises BridgeError for one that is not finite, or not in the dtype.
    """
    if isinstance(source, PackedPlace):
        pieces = _dequantised(source)
    else:
        dtype, shape = source.spec
        row = shape[-1] * dtype.itemsize if len(shape) > 1 else dtype.itemsize
        pieces = _numbers(source, max(1, PIECE // row) * row)
    first = 0
    for piece in pieces:
        if update is not None:
            rows = piece.reshape(-1, spec.shape[1])
            piece = update.added(rows, first).reshape(-1)
            first += len(rows)
        yield rounded(piece, spec.dtype, name)


def _checked_parts(source: PackedPlace) -> Iterator[np.ndarray]:
    """The bytes of a quantised matrix as they are stored, its scales and biases being finite."""
    yield from raw_pieces(source.weight)
    for place in (source.scales, source.biases):
        yield from _numbers(place, PIECE)


def _numbers(place: Place, piece: int) -> Iterator[np.ndarray]:
    """An array's numbers, flat, `piece` bytes at a time, all of them finite."""
    dtype, start = place.spec.dtype, 0
    for raw in raw_pieces(place, piece):
        array = raw.view(dtype)
        yield _checked(place, array, place.spec.shape, start)
        start += array.size


def _dequantised(source: PackedPlace) -> Iterator[np.ndarray]:
    """A quantised matrix's numbers, flat, whole rows at a time."""
    outputs, inputs = _logical(source).shape
    rows = max(1, PIECE // (4 * inputs))
    widths = [place.spec.nbytes // outputs for place in source[:3]]
    pieces = (
        raw_pieces(place, rows * width) for place, width in zip(source[:3], widths, strict=True)
    )
    start = 0
    for parts in zip(*pieces, strict=True):
        weight, scales, biases = (
            part.view(place.spec.dtype).reshape(-1, place.spec.shape[1])
            for part, place in zip(parts, source[:3], strict=True)
        )
        for place, side in ((source.scales, scales), (source.biases, biases)):
            _checked(place, side, place.spec.shape, start * side.shape[1])
        packed = Packed(weight, scales, biases, source.how.bits, source.how.group_size)
        numbers = packed.dequantise().reshape(-1)
        yield _checked(source.weight, numbers, (outputs, inputs), start * inputs)
        start += len(weight)


def _packed(source: PackedPlace) -> Packed:
    """A quantised matrix as views of the mapped file, its scales and biases being finite."""
    scales, biases = (_checked(place, place.view()) for place in (source.scales, source.biases))
    return Packed(source.weight.view(), scales, biases, source.how.bits, source.how.group_size)


def _logical(source: Source) -> TensorSpec:
    """Dtype and shape of a tensor: of a quantised one, the dtype of its scales."""
    if isinstance(source, Place):
        return source.spec
    dtype, (outputs, groups) = source.scales.spec
    return TensorSpec(dtype, (outputs, groups * source.how.group_size))


def _checked(
    place: Place, array: np.ndarray, shape: tuple[int, ...] | None = None, start: int = 0
) -> np.ndarray:
    """The array, all of whose numbers are finite: a whole one, or what follows number `start` of
    one of `shape`."""
    where = first_not_finite(array)
    if where is not None:
        flat = start + int(np.ravel_multi_index(where, array.shape))
        at = [int(i) for i in np.unravel_index(flat, shape or array.shape)]
        at = at if place.row is None else [place.row, *at]
        raise BridgeError(
            f"{place.file.path}: tensor {place.stored!r} holds {array[where]} at {at}; "
            "weights must be finite"
        )
    return array
