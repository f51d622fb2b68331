"""Floats of one dtype in another, each rounded once, to the nearest, ties to even.

NumPy and ml_dtypes do so but for float64 to bfloat16, which goes through float32 and is there
rounded twice.
"""

import ml_dtypes
import numpy as np

from bridge.errors import BridgeError
from bridge.finite import first_not_finite

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


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


def _to_odd(array: np.ndarray) -> np.ndarray:
    """float64 in float32, cut off towards zero, with the last bit set where something was lost:
    what a tie was is then told apart from a tie when it is rounded further."""
    single = array.astype(np.float32)
    back, bits = single.astype(np.float64), single.view(np.uint32)
    bits -= (np.abs(back) > np.abs(array)).astype(np.uint32)
    bits |= (back != array).astype(np.uint32)
    return single
