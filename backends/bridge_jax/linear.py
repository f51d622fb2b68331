"""Linear layers: their product, and how their weights lie on a mesh of devices.

A weight is `[out, in]` as in a checkpoint, one leaf a matrix: q, k and v are not joined, so that
each can be sharded by heads, and XLA merges products of the same input where that pays. Operands
stay in the model's dtype and sums are float32, on TPUs too.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Float

Array = jax.Array
FEW = 64  # rows up to which a product is bound by reading the weight


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def contract(spec: str, a: Array, b: Array) -> Array:
    """An einsum of two operands in one dtype, with a float32 result. Every axis of an operand is
    in the other one or in the result.

    float32 operands are multiplied as float32: the default of TPUs, and of GPUs with TF32, is less.
    """
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None

    def product(a: Array, b: Array) -> Array:
        return jnp.einsum(spec, a, b, precision=exact, preferred_element_type=jnp.float32)

    if exact:
        return product(a, b)
    # XLA's CPU compiler has no kernel for some products of narrow operands with a wide result.
    return jax.lax.platform_dependent(
        a,
        b,
        cpu=lambda a, b: product(a.astype(jnp.float32), b.astype(jnp.float32)),
        default=product,
    )


def _contract(spec: str, a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return contract(spec, a, b), (a, b)


def _contract_backward(
    spec: str, operands: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    """The products of the backward pass have operands in the model's dtype too: JAX's own would
    multiply a float32 gradient by a narrow operand, which accelerators do slowly."""
    a, b = operands
    of_a, of_b, of_product = re.split(",|->", spec)
    g = gradient.astype(a.dtype)
    to_a = contract(f"{of_product},{of_b}->{of_a}", g, b)
    to_b = contract(f"{of_a},{of_product}->{of_b}", a, g)
    return to_a.astype(a.dtype), to_b.astype(b.dtype)


contract.defvjp(_contract, _contract_backward)


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
