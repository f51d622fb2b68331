"""The numerics rule (clause 10.2): how far a backend may be from the float64 reference.

No tolerance is tuned by hand. A backend in dtype T may err by `FACTOR` times the error that the
reference itself makes in T, or that nudges of the weights by one unit in the last place of T
make: several measures, since one can be small by luck. It is never held to less than `FLOOR_ULPS`
units in the last place of the largest magnitude.
"""

from collections.abc import Sequence

import ml_dtypes
import numpy as np

FACTOR = 4.0
FLOOR_ULPS = 8.0
NUDGES = 4  # copies of the weights, each moved by one unit up or down at random
DTYPES: dict[str, np.dtype] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def ulp(dtype: str) -> float:
    """The distance from 1 to the next larger number of `dtype`."""
    return float(ml_dtypes.finfo(DTYPES[dtype]).eps)


def proxy(dtype: str) -> str:
    """The dtype in which the reference runs to show the error of `dtype`.

    float64 cannot be measured against itself: float32 stands for it, and `allowance` scales.
    """
    return "float32" if dtype == "float64" else dtype


def error(got: np.ndarray, want: np.ndarray) -> float:
    """The maximum norm of the difference, in float64; infinite where either is not finite."""
    if not got.size:
        return 0.0
    with np.errstate(invalid="ignore"):
        difference = np.abs(got.astype(np.float64) - want.astype(np.float64))
    return float(np.max(np.where(np.isfinite(difference), difference, np.inf)))


def allowance(
    exact: np.ndarray,
    own: np.ndarray,
    dtype: str,
    *,
    nudged: Sequence[np.ndarray] = (),
    largest: float | None = None,
) -> float:
    """The largest error that a backend in `dtype` may make against `exact` (clause 10.2).

    `exact` is the reference's result in float64, `own` that in `proxy(dtype)`, and `nudged` are
    those in float64 of nudged weights, all of one shape: active cells only, since what lies in
    others is unspecified. `largest`: the largest magnitude that the floor is measured by; None is
    that of `exact`.
    """
    if not exact.size:
        return 0.0
    rounding = error(own, exact) * ulp(dtype) / ulp(proxy(dtype))
    moved = max((error(other, exact) for other in nudged), default=0.0)
    largest = float(np.max(np.abs(exact))) if largest is None else largest
    return FACTOR * max(rounding, moved, FLOOR_ULPS * ulp(dtype) * largest)
