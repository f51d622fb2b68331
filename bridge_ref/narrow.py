"""Narrow weights (clause 10.5): the host's linear maps where its matrices are held as integers.

Written to be read beside the clause: integers are made of the weight anew at each call.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from bridge.checkpoints.packing import quantise
from bridge.config.quantization import Quantization
from bridge_ref.ops import linear as whole_linear
from bridge_ref.precision import DTYPES, product, rounded, wide, wide_dtype

INT4 = Quantization(bits=4, group_size=32)
NOTHING = 2.0**-100


class NarrowTensors(dict[str, np.ndarray]):
    """The tensors of a model whose host's linear maps are `int8_linear` or `int4_linear`."""

    def __init__(self, tensors: Mapping[str, np.ndarray], weights: str) -> None:
        super().__init__(tensors)
        self.weights = weights


def linear(
    x: Float[np.ndarray, "... I"],
    weight: Float[np.ndarray, "O I"],
    bias: Float[np.ndarray, " O"] | None,
    weights: str,
) -> Float[np.ndarray, "... O"]:
    """The map for what a weight is held as, `int8` or `int4`."""
    return (int8_linear if weights == "int8" else int4_linear)(x, weight, bias)


def int8_linear(
    x: Float[np.ndarray, "... I"],
    weight: Float[np.ndarray, "O I"],
    bias: Float[np.ndarray, " O"] | None,
) -> Float[np.ndarray, "... O"]:
    """`y[o] = (sum over i of q[i] w[o, i]) unit unit[o] + bias[o]`, rounded once."""
    q, unit = integers(x)
    w, units = integers(weight)
    sums = q.astype(np.float64) @ w.T.astype(np.float64)  # exact
    y = sums.astype(unit.dtype) * unit * units[:, 0]
    return rounded(y if bias is None else y + wide(bias), x.dtype)


def integers(
    x: Float[np.ndarray, "... I"],
) -> tuple[Float[np.ndarray, "... I"], Float[np.ndarray, "... one"]]:
    """`unit = max |x| / 127` of each row and `q = round(x / unit)`, wide; a row with no number
    above 2^-100 counts as zeros."""
    top = np.max(np.abs(wide(x)), axis=-1, keepdims=True)
    unit = np.where(top > NOTHING, top / 127, 0).astype(wide_dtype(x.dtype))
    return np.rint(np.divide(wide(x), unit, out=np.zeros_like(wide(x)), where=unit > 0)), unit


def int4_linear(
    x: Float[np.ndarray, "... I"],
    weight: Float[np.ndarray, "O I"],
    bias: Float[np.ndarray, " O"] | None,
) -> Float[np.ndarray, "... O"]:
    """A product of bfloat16 numbers: the weight that 4 bits stand for, and x; a weight whose rows
    are no whole groups stays as it is."""
    if weight.shape[1] % INT4.group_size:
        return whole_linear(x, weight, bias)[0]
    T = DTYPES["bfloat16"]
    y = rounded(product(rounded(x, T), rounded(floats(weight, "int4"), T).T), T)
    return rounded(wide(y) if bias is None else wide(y) + wide(bias), x.dtype)


def floats(weight: Float[np.ndarray, "O I"], weights: str) -> Float[np.ndarray, "O I"]:
    """The numbers that the integers stand for."""
    if weights == "int8":
        w, units = integers(weight)
        return rounded(w * units, weight.dtype)
    if weight.shape[1] % INT4.group_size:
        return weight
    stored = np.float32 if weight.dtype == np.float64 else weight.dtype
    return quantise(weight.astype(stored), INT4).dequantise(dtype=weight.dtype)
