"""What a stored tensor is: a dtype and a shape; and the names that dtypes go by.

safetensors has codes for them (`BF16`), NumPy and users have names (`bfloat16`). Weights are of the
four float dtypes in `FLOATS`; packed ones are integers, with floats beside them.
"""

import math
from typing import NamedTuple

import ml_dtypes
import numpy as np

from bridge.errors import BridgeError
from bridge.registry import ALIASES

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
# What weights may be: the names of dtypes, by code.
FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class TensorSpec(NamedTuple):
    """A tensor as it is stored, and as a file's header says it."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.dtype.itemsize * math.prod(self.shape)


def float_dtype(name: str) -> tuple[str, np.dtype]:
    """A dtype to store by its name or alias. Raises BridgeError for any other."""
    name = ALIASES.get(name, name)
    codes = {value: code for code, value in FLOATS.items()}
    if name not in codes:
        raise BridgeError(f"dtype {name!r} cannot be stored; use one of {', '.join(codes)}")
    return name, DTYPES[codes[name]]
