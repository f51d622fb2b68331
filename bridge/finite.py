"""Whether every number of a tensor is finite, at the speed of memory and for every float dtype."""

import ml_dtypes
import numpy as np

CHUNK = 1 << 16  # elements; fits the cache

# By dtype: the integer of the same width, and its bits without the sign. Exponent bits all set
# mean infinity or NaN, and without its sign such a pattern is above that of every finite number.
_BITS = {
    np.dtype(np.float64): (np.uint64, 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    np.dtype(np.float32): (np.uint32, 0x7FFF_FFFF, 0x7F80_0000),
    np.dtype(np.float16): (np.uint16, 0x7FFF, 0x7C00),
    np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7FFF, 0x7F80),
}


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
