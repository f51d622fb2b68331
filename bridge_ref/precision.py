"""How the reference computes in a dtype T (clause 10.2).

Every tensor is stored in T. A matrix product, norm, softmax or rotation is computed in the *wide*
dtype of T and its result rounded to T: float64 for float64, float32 for the rest. Complex numbers
pass through unrounded, so that gradients can be checked by the complex step.
"""

from typing import Any

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def wide_dtype(dtype: np.dtype) -> np.dtype:
    """Where results in T are computed: T itself if it has 8 bytes or more, else float32."""
    return dtype if dtype.itemsize >= 8 else np.dtype(np.float32)


def wide(x: np.ndarray) -> np.ndarray:
    """`x` in its wide dtype, exactly."""
    return x.astype(wide_dtype(x.dtype), copy=False)


def rounded(x: Any, dtype: np.dtype) -> np.ndarray:
    """`x` rounded to T, to nearest even."""
    return np.asarray(x).astype(dtype, copy=False)


def matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`a @ b` over the last two axes, both of dtype T: wide operands, one rounding at the end."""
    return rounded(product(a, b), a.dtype)


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`a @ b` over the last two axes, wide. Some BLAS libraries now and then raise the flag of an
    invalid operation for lanes of a vector that they load and then leave out; NaN stays NaN."""
    with np.errstate(invalid="ignore"):
        return wide(a) @ wide(b)
