"""Linear layers: their product, and how their weights lie on a mesh of devices.

A weight is `[out, in]` as in a checkpoint, one leaf a matrix: q, k and v are not joined, so that
each can be sharded by heads, and XLA merges products of the same input where that pays. Operands
stay in the model's dtype and sums are float32, on TPUs too.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float

Array = jax.Array
FEW = 64  # rows up to which a product is bound by reading the weight


def contract(spec: str, a: Array, b: Array) -> Array:
    """An einsum of two operands in one dtype, with a float32 result.

    float32 operands are multiplied as float32: the default of TPUs, and of GPUs with TF32, is less.
    """

    def product(a: Array, b: Array) -> Array:
        return jnp.einsum(
            spec, a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )

    if a.dtype == jnp.float32:
        return product(a, b)
    # XLA's CPU compiler has no kernel for some products of narrow operands with a wide result.
    return jax.lax.platform_dependent(
        a,
        b,
        cpu=lambda a, b: product(a.astype(jnp.float32), b.astype(jnp.float32)),
        default=product,
    )


def linear(
    x: Float[Array, "... in"], weight: Float[Array, "out in"], bias: Array | None = None
) -> Float[Array, "... out"]:
    """`x @ weight.T + bias` (clause 2.1), rounded once to the dtype of x."""
    rows = x.reshape(-1, x.shape[-1])
    # With the weight on the left XLA streams it through the CPU's cores as it lies, once.
    few = len(rows) <= FEW
    y = contract("oi,ni->on", weight, rows).T if few else contract("ni,oi->no", rows, weight)
    y = y if bias is None else y + bias.astype(y.dtype)
    return y.astype(x.dtype).reshape(*x.shape[:-1], -1)
