"""The safetensors format, read strictly and written reproducibly, without any framework.

A file is 8 bytes of header length, a JSON header, and the tensors' bytes, little-endian and back
to back. Tensors stay on disk until they are asked for, and are written as they come, so a file may
be larger than memory. Same tensors in, same bytes out.

Arrays are views of the mapped file, whose pages count as this process's memory once touched; who
reads in passing reads into a buffer of its own instead (`read_into`).
"""

import itertools
import json
import mmap
import os
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bridge.checkpoints.tensor_specs import CODES, DTYPES, TensorSpec
from bridge.errors import BridgeError, show
from bridge.files.atomic import new_file
from bridge.files.opening import open_file

AHEAD = 4  # pieces that may wait to be written
SETTLE = 1 << 26  # bytes after which what was written is sent to the disk
MAX_HEADER = 100_000_000  # bytes, as in the format's own library
MAX_AXES = 64  # as in NumPy
MAX_NUMBER = 2**63 - 1
DAMAGED = "the file is damaged, copy it again"


class SafetensorsFile(Mapping[str, np.ndarray]):
    """The tensors of one file by name, in file order; each is a read-only view of the disk.

    Opening reads and checks the header alone. Raises BridgeError, naming file and tensor, where the
    header is not well-formed, a name comes twice, a dtype is unknown, a shape does not fit its
    bytes, bytes overlap or belong to no tensor, or the file is cut off or has bytes to spare.
    """

    path: Path
    specs: dict[str, TensorSpec]
    metadata: dict[str, str]

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open_file(path)
            weakref.finalize(self, os.close, self._file)
            size = os.fstat(self._file).st_size
            length = int.from_bytes(os.pread(self._file, 8, 0), "little")
            if size < 8 or length > size - 8:
                raise BridgeError(f"{path}: cut off within its header; {DAMAGED}")
            if length > MAX_HEADER:
                raise BridgeError(f"{path}: its header of {length} bytes is above 100 MB")
            header = _parse_header(path, os.pread(self._file, length, 8))
        except FileNotFoundError:
            raise BridgeError(f"{path}: no such file") from None
        except OSError as error:
            raise BridgeError(f"{path}: cannot be read ({error.strerror})") from None
        self.metadata = _metadata(path, header.pop("__metadata__", {}))
        self._start = 8 + length
        entries = {name: _entry(path, name, entry) for name, entry in header.items()}
        ordered = sorted(entries.items(), key=lambda item: item[1][1:])
        _check_tiling(path, ordered, size - self._start)
        self.specs = {name: spec for name, (spec, _, _) in ordered}
        self._offsets = {name: start for name, (_, start, _) in ordered}

    def __contains__(self, name: object) -> bool:
        return name in self.specs  # Mapping's own would map the file

    def __getitem__(self, name: str) -> np.ndarray:
        spec = self.specs[name]
        array: np.ndarray = np.ndarray(
            spec.shape, spec.dtype, self._bytes, self._start + self._offsets[name]
        )
        if not array.flags.aligned:  # by a header that another program did not pad
            array = array.copy()
            array.flags.writeable = False
        return array

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `start` of a tensor on, without mapping anything.

        Raises BridgeError where the file has become shorter since it was opened, or the disk
        refuses.
        """
        at = self._start + self._offsets[name] + start
        try:
            while buffer:
                count = os.preadv(self._file, [buffer], at)
                if not count:
                    raise BridgeError(f"{self.path}: was cut off while it was read; {DAMAGED}")
                at, buffer = at + count, buffer[count:]
        except OSError as error:
            raise BridgeError(f"{self.path}: cannot be read ({error.strerror})") from None

    @cached_property
    def _bytes(self) -> mmap.mmap:
        try:
            return mmap.mmap(self._file, 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise BridgeError(f"{self.path}: cannot be mapped ({error.strerror})") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


class InMemory(SafetensorsFile):
    """Tensors that are in no file yet, as if one at `path` held them."""

    def __init__(self, path: Path, tensors: Mapping[str, np.ndarray]) -> None:
        self.path, self.specs, self.metadata = path, specs_of(tensors), {}
        self._arrays = dict(tensors)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        buffer[:] = tensor_bytes(self._arrays[name])[start : start + len(buffer)]


def specs_of(tensors: Mapping[str, np.ndarray]) -> dict[str, TensorSpec]:
    """What a header will say of tensors in memory."""
    return {name: TensorSpec(array.dtype, array.shape) for name, array in tensors.items()}


def write_safetensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors as they come, in the order of `specs`, atomically.

    Raises BridgeError where a tensor is not as `specs` says, has a dtype that the format lacks, or
    the disk refuses; the old file is then left as it was.
    """
    with new_file(path) as file:
        file.write(_header(path, specs, metadata or {}))
        for expected, given in itertools.zip_longest(specs.items(), tensors):
            if expected is None or given is None or expected[0] != given[0]:
                want, got = (pair and pair[0] for pair in (expected, given))
                raise BridgeError(f"{path}: expected tensor {want!r} next, but {got!r} came")
            (name, spec), (_, array) = expected, given
            if spec != (array.dtype, array.shape):
                raise BridgeError(
                    f"{path}: tensor {name!r} should be {spec.dtype} {list(spec.shape)}, "
                    f"but {array.dtype} {list(array.shape)} came"
                )
            file.write(tensor_bytes(array))


def write_pieces(
    path: Path,
    specs: Mapping[str, TensorSpec],
    pieces: Iterable[np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors whose bytes come in pieces, back to back in the order of `specs`, atomically.

    A piece is written while the next ones are made, so its memory must not be used again. Raises
    BridgeError where there are more or fewer bytes than `specs` call for, or the disk refuses.
    """
    left = sum(spec.nbytes for spec in specs.values())
    with new_file(path) as file, ThreadPoolExecutor(1) as writer:
        settled = 0

        def write(data: memoryview) -> None:
            nonlocal settled
            file.write(data)
            # Pages that wait for the disk fill the memory, and then hold everyone up.
            if file.tell() - settled >= SETTLE and hasattr(os, "posix_fadvise"):
                settled = file.tell()
                os.posix_fadvise(file.fileno(), 0, settled, os.POSIX_FADV_DONTNEED)

        file.write(_header(path, specs, metadata or {}))
        waiting: deque[Future[None]] = deque()
        for piece in pieces:
            data = tensor_bytes(piece)
            left -= data.nbytes
            waiting.append(writer.submit(write, data))
            if len(waiting) > AHEAD:
                waiting.popleft().result()
        for future in waiting:
            future.result()
        if left:
            raise BridgeError(f"{path}: its tensors came {left} bytes short")


def tensor_bytes(array: np.ndarray) -> memoryview:
    """The bytes of a tensor as the format stores them; no copy where it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _header(path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON, padded with spaces so that the first tensor is 8-byte aligned."""
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name, spec in specs.items():
        code = CODES.get(spec.dtype)
        if code is None:
            raise BridgeError(f"{path}: safetensors cannot hold {name!r} in {spec.dtype}")
        entries[name] = {
            "dtype": code,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset := offset + spec.nbytes],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for name, value in pairs:
            if name in seen:
                raise BridgeError(f"{path}: its header names {show(name)} twice; {DAMAGED}")
            seen[name] = value
        return seen

    try:
        header = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=unique,
            # Minus zero is no natural number to other readers.
            parse_int=_natural if b"-0" in text else None,
        )
        if b"\\u" in text:  # half a surrogate pair, which no other reader takes
            json.dumps(header, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError):
        raise BridgeError(f"{path}: its header is not JSON; {DAMAGED}") from None
    if not isinstance(header, dict) or not text.startswith(b"{"):
        raise BridgeError(f"{path}: its header is not a JSON object; {DAMAGED}")
    return header


def _natural(digits: str) -> int:
    if digits.startswith("-"):
        raise ValueError(digits)
    return int(digits)


def _metadata(path: Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise BridgeError(f"{path}: __metadata__ must map names to texts; {DAMAGED}")
    return value


def _entry(path: Path, name: str, entry: Any) -> tuple[TensorSpec, int, int]:
    """A tensor's dtype, shape, and range of bytes, once they fit each other."""
    where = f"{path}: tensor {show(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise BridgeError(f"{where} must have dtype, shape and data_offsets; {DAMAGED}")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise BridgeError(f"{where} has dtype {show(code)}, which is not known")
    for value in (shape, offsets):
        if not isinstance(value, list) or not all(type(v) is int and v >= 0 for v in value):
            raise BridgeError(f"{where}: shape and data_offsets must hold integers; {DAMAGED}")
    if len(offsets) != 2:
        raise BridgeError(f"{where}: data_offsets must be a start and an end; {DAMAGED}")
    if len(shape) > MAX_AXES or max([*shape, *offsets]) > MAX_NUMBER:
        raise BridgeError(f"{where}: no tensor has such a shape or such data_offsets; {DAMAGED}")
    spec = TensorSpec(DTYPES[code], tuple(shape))
    start, end = offsets
    if end - start != spec.nbytes:
        raise BridgeError(
            f"{where}: {code} {show(shape)} needs {spec.nbytes} bytes, but data_offsets {offsets} "
            f"hold {end - start}; {DAMAGED}"
        )
    return spec, start, end


def _check_tiling(
    path: Path, ordered: list[tuple[str, tuple[TensorSpec, int, int]]], size: int
) -> None:
    """The tensors' bytes must cover the data, in order, once."""
    at = 0
    for name, (_, start, end) in ordered:
        if start != at:
            what = "overlap another tensor" if start < at else f"leave a hole of {start - at} bytes"
            raise BridgeError(f"{path}: the bytes of tensor {show(name)} {what}; {DAMAGED}")
        if end > size:
            raise BridgeError(
                f"{path}: cut off within tensor {show(name)}, {end} bytes of data needed but "
                f"{size} there; {DAMAGED}"
            )
        at = end
    if at != size:
        raise BridgeError(f"{path}: {size - at} bytes follow the last tensor; {DAMAGED}")
