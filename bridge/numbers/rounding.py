"""Floats of one dtype in another, each rounded once, to the nearest, ties to even; and whether all
of them are finite.

Arrays in, arrays out. NumPy and ml_dtypes round so but for float64 to bfloat16, which goes through
float32 and is there rounded twice.
"""

import ml_dtypes
import numpy as np

from bridge.errors import BridgeError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
CHUNK = 1 << 16  # elements; fits the cache
# By dtype: the integer of the same width, and its bits without the sign. Exponent bits all set
# mean infinity or NaN, and without its sign such a pattern is above that of every finite number.
_BITS = {
    np.dtype(np.float64): (np.uint64, 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    np.dtype(np.float32): (np.uint32, 0x7FFF_FFFF, 0x7F80_0000),
    np.dtype(np.float16): (np.uint16, 0x7FFF, 0x7C00),
    BFLOAT16: (np.uint16, 0x7FFF, 0x7F80),
}


def rounded(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Finite numbers in `dtype`; the array itself where it has it already.

    Raises BridgeError, with the tensor's `name`, where a number is beyond the dtype's largest.
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):  # told below
        narrow = array
        if array.dtype == np.float64 and dtype == BFLOAT16:
            narrow = _to_odd(array)
        narrow = narrow.astype(dtype)
    if narrow.dtype.itemsize <= array.dtype.itemsize:
        where = first_not_finite(narrow)
        if where is not None:
            raise BridgeError(
                f"tensor {name!r} holds {array[where]}, which is too large for {dtype.name}; "
                "choose bfloat16 or float32"
            )
    return narrow


def first_not_finite(array: np.ndarray) -> tuple[int, ...] | None:
    """The index of the first NaN or infinity; None where all is finite."""
    unsigned, unsign, infinity = _BITS[array.dtype]
    bits = np.ascontiguousarray(array).reshape(-1).view(unsigned)
    buffer = np.empty(min(CHUNK, bits.size), unsigned)
    for start in range(0, bits.size, CHUNK):
        chunk = bits[start : start + CHUNK]
        magnitude = np.bitwise_and(chunk, unsigned(unsign), out=buffer[: chunk.size])
        if magnitude.max() >= infinity:
            flat = start + int(np.argmax(magnitude >= infinity))
            return tuple(int(i) for i in np.unravel_index(flat, array.shape))
    return None


def _to_odd(array: np.ndarray) -> np.ndarray:
    """float64 in float32, cut off towards zero, with the last bit set where something was lost:
    what a tie was is then told apart from a tie when it is rounded further."""
    single = array.astype(np.float32)
    back, bits = single.astype(np.float64), single.view(np.uint32)
    bits -= (np.abs(back) > np.abs(array)).astype(np.uint32)
    bits |= (back != array).astype(np.uint32)
    return single
