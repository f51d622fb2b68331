"""The elementary operations of a decoder, each with its exact backward.

`y, cache = f(x, ...)` and `dx, ... = f_backward(dy, cache)`: `dy` is the gradient of a scalar loss
with respect to y, and what comes back is that with respect to each input, in the inputs' order.
Weights are `[out, in]`. Every result is rounded to the dtype of its input (see `precision`).
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from bridge_ref.precision import matmul, product, rounded, wide, wide_dtype

Cache = tuple[Any, ...]


def rms_norm(
    x: Float[np.ndarray, "... D"], weight: Float[np.ndarray, " D"], eps: float
) -> tuple[Float[np.ndarray, "... D"], Cache]:
    """Clauses 3.2 and 5.3: `y = x / sqrt(mean(x^2) + eps) * weight` over the last axis."""
    r = 1 / np.sqrt(np.mean(wide(x) * wide(x), axis=-1, keepdims=True) + eps)
    y = wide(x) * r * wide(weight)
    return rounded(y, x.dtype), (x, weight, r)


def rms_norm_backward(
    dy: Float[np.ndarray, "... D"], cache: Cache
) -> tuple[Float[np.ndarray, "... D"], Float[np.ndarray, " D"]]:
    """With n = x r and g = dy * weight: `dx = r (g - n mean(g n))`, `dweight = sum(dy n)`."""
    x, weight, r = cache
    n, g = wide(x) * r, wide(dy) * wide(weight)
    dx = r * (g - n * np.mean(g * n, axis=-1, keepdims=True))
    dweight = np.sum(wide(dy) * n, axis=tuple(range(x.ndim - 1)))
    return rounded(dx, x.dtype), rounded(dweight, x.dtype)


def linear(
    x: Float[np.ndarray, "... I"],
    weight: Float[np.ndarray, "O I"],
    bias: Float[np.ndarray, " O"] | None = None,
) -> tuple[Float[np.ndarray, "... O"], Cache]:
    """`y = x weight^T + bias`, rounded once (clauses 3.3 and 5.4)."""
    y = product(x, weight.T)
    if bias is not None:
        y = y + wide(bias)
    return rounded(y, x.dtype), (x, weight)


def linear_backward(
    dy: Float[np.ndarray, "... O"], cache: Cache
) -> tuple[Float[np.ndarray, "... I"], Float[np.ndarray, "O I"], Float[np.ndarray, " O"]]:
    """`dx = dy weight`, `dweight = sum(dy x^T)`, `dbias = sum(dy)` over all cells."""
    x, weight = cache
    dy_cells, x_cells = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    dbias = rounded(wide(dy_cells).sum(axis=0), x.dtype)
    return matmul(dy, weight), matmul(dy_cells.T, x_cells), dbias


def sigmoid(x: np.ndarray) -> np.ndarray:
    """`1 / (1 + exp(-x))`."""
    with np.errstate(over="ignore"):  # exp(-x) may be infinite: the sigmoid is 0 there, rightly
        return 1 / (1 + np.exp(-x))


def silu(x: Float[np.ndarray, "..."]) -> tuple[Float[np.ndarray, "..."], Cache]:
    """Clauses 5.8 and 8.1: `y = x sigmoid(x)`."""
    return rounded(wide(x) * sigmoid(wide(x)), x.dtype), (x,)


def silu_backward(dy: Float[np.ndarray, "..."], cache: Cache) -> Float[np.ndarray, "..."]:
    """`dx = dy (sigmoid(x) + x sigmoid(x) (1 - sigmoid(x)))`."""
    (x,) = cache
    s = sigmoid(wide(x))
    return rounded(wide(dy) * (s + wide(x) * s * (1 - s)), x.dtype)


def swiglu(
    gate: Float[np.ndarray, "... F"], up: Float[np.ndarray, "... F"]
) -> tuple[Float[np.ndarray, "... F"], Cache]:
    """Clause 5.8: `y = silu(gate) * up`."""
    activated, silu_cache = silu(gate)
    return activated * up, (activated, up, silu_cache)


def swiglu_backward(
    dy: Float[np.ndarray, "... F"], cache: Cache
) -> tuple[Float[np.ndarray, "... F"], Float[np.ndarray, "... F"]]:
    """`dgate = silu'(gate) dy up`, `dup = dy silu(gate)`."""
    activated, up, silu_cache = cache
    return silu_backward(dy * up, silu_cache), dy * activated


def embedding(
    tokens: Int[np.ndarray, "B S"], weight: Float[np.ndarray, "V D"]
) -> tuple[Float[np.ndarray, "B S D"], Cache]:
    """Clause 5.2: `y[b, s] = weight[tokens[b, s]]`."""
    return weight[tokens], (tokens, weight.shape)


def embedding_backward(dy: Float[np.ndarray, "B S D"], cache: Cache) -> Float[np.ndarray, "V D"]:
    """`dweight[t]` is the sum of dy over the cells that hold token t."""
    tokens, shape = cache
    dweight = np.zeros(shape, wide_dtype(dy.dtype))
    np.add.at(dweight, tokens, wide(dy))
    return rounded(dweight, dy.dtype)


def rotate(
    x: Float[np.ndarray, "B S H d"],
    cos: Float[np.ndarray, "B S half"],
    sin: Float[np.ndarray, "B S half"],
) -> Float[np.ndarray, "B S H d"]:
    """Clause 5.6: rope. Coordinate i of the first half of a head and i of the second are a pair,
    turned by the angle of frequency i: `(x1 cos - x2 sin, x2 cos + x1 sin)`."""
    x1, x2 = np.split(wide(x), 2, axis=-1)
    c, s = cos[:, :, None, :], sin[:, :, None, :]
    return rounded(np.concatenate([x1 * c - x2 * s, x2 * c + x1 * s], axis=-1), x.dtype)


def rotate_backward(
    dy: Float[np.ndarray, "B S H d"],
    cos: Float[np.ndarray, "B S half"],
    sin: Float[np.ndarray, "B S half"],
) -> Float[np.ndarray, "B S H d"]:
    """The transpose of a rotation turns back; the attention factor in cos and sin stays."""
    return rotate(dy, cos, -sin)


def log_softmax(x: Float[np.ndarray, "... V"]) -> tuple[Float[np.ndarray, "... V"], Cache]:
    """`y = x - log(sum(exp(x)))` over the last axis (clauses 7.4 and 7.5)."""
    z = wide(x) - np.max(np.real(wide(x)), axis=-1, keepdims=True)
    y = z - np.log(np.sum(np.exp(z), axis=-1, keepdims=True))
    return rounded(y, x.dtype), (y,)


def log_softmax_backward(
    dy: Float[np.ndarray, "... V"], cache: Cache
) -> Float[np.ndarray, "... V"]:
    """`dx = dy - exp(y) sum(dy)`."""
    (y,) = cache
    dx = wide(dy) - np.exp(y) * np.sum(wide(dy), axis=-1, keepdims=True)
    return rounded(dx, dy.dtype)
