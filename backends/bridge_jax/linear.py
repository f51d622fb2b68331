"""Linear layers: their product, and how weights are stored and lie on a mesh of devices.

A weight is `[out, in]` as in a checkpoint. The layers' are stacked under one name, with `*` for the
layer's number. q, k and v are not joined, so that each can be sharded by heads. Operands of a
product stay in the model's dtype and sums are float32, on TPUs too.
"""

import re
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Float

from bridge.config import LoraConfig, ModelConfig, tensor_shapes

Array = jax.Array
LAYERS = "model.layers.*."
FEW = 64  # rows up to which a product is bound by reading the weight
WEIGHT, TURNED = ".weight", ".turned"  # of a matrix that is `[out, in]`, or `[in, out]`
DOWN, UP = ".lora_A.weight", ".lora_B.weight"  # of its low-rank update
KEPT = "kept"  # by its name, what a training step's backward pass reads rather than computes again


def contract(spec: str, a: Array, b: Array) -> Array:
    """An einsum of two operands in one dtype, with a float32 result. Every axis of an operand is
    in the other one or in the result.

    float32 operands are multiplied as float32: the default of TPUs, and of GPUs with TF32, is less.
    The products of the backward pass have operands in the model's dtype too: JAX's own would
    multiply a float32 gradient by a narrow operand, which accelerators do slowly.
    """
    return jnp.asarray(_contract(spec, a, b))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _contract(spec: str, a: Array, b: Array) -> Array:
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


def _contract_forward(spec: str, a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return contract(spec, a, b), (a, b)


def _contract_backward(
    spec: str, operands: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    a, b = operands
    of_a, of_b, of_product = re.split(",|->", spec)
    g = gradient.astype(a.dtype)
    to_a = contract(f"{of_product},{of_b}->{of_a}", g, b)
    to_b = contract(f"{of_a},{of_product}->{of_b}", a, g)
    return to_a.astype(a.dtype), to_b.astype(b.dtype)


_contract.defvjp(_contract_forward, _contract_backward)


def named(
    weights: Mapping[str, Array],
    name: str,
    x: Float[Array, "... in"],
    lora: LoraConfig | None = None,
) -> Float[Array, "... out"]:
    """The linear layer of that name, with its bias and its low-rank update where it has them
    (clauses 2.1 and 5.10), rounded once to the dtype of x."""
    rows = x.reshape(-1, x.shape[-1])
    if (turned := weights.get(name + TURNED)) is not None:
        y = contract("ni,io->no", rows, turned)
    elif len(rows) <= FEW:
        # With the weight on the left XLA streams it through the CPU's cores as it lies, once.
        y = contract("oi,ni->on", weights[name + WEIGHT], rows).T
    else:
        y = contract("ni,oi->no", rows, weights[name + WEIGHT])
    if lora is not None and name + DOWN in weights:
        low = contract("ni,ri->nr", rows, weights[name + DOWN]).astype(x.dtype)
        low = checkpoint_name(low, KEPT)
        y = y + lora.scale * contract("nr,or->no", low, weights[name + UP])
    if (bias := weights.get(f"{name}.bias")) is not None:
        y = y + bias.astype(y.dtype)
    return checkpoint_name(y.astype(x.dtype).reshape(*x.shape[:-1], -1), KEPT)


def stacked(name: str) -> tuple[str, int | None]:
    """A checkpoint tensor's key among the parameters, and its layer."""
    found = re.match(r"model\.layers\.(\d+)\.(.*)", name)
    return (LAYERS + found[2], int(found[1])) if found else (name, None)


def stacked_names(config: ModelConfig) -> dict[str, list[str]]:
    """The checkpoint names that lie under each key, in canonical order."""
    names: dict[str, list[str]] = {}
    for name in tensor_shapes(config):
        names.setdefault(stacked(name)[0], []).append(name)
    return names


def partition_specs(
    config: ModelConfig, devices: int, axis: str = "model"
) -> dict[str, PartitionSpec]:
    """How each parameter lies on a mesh axis of so many devices (tensor parallelism).

    What reads the residual stream is split by its outputs, whole heads together, and what writes to
    it by its inputs, so that a layer adds up across devices three times: after attention, FFN and
    block. Embedding and head are split by tokens. A low-rank update has the half on that side split
    as its matrix. What does not divide evenly is on every device.
    """
    bridge = config.bridge
    of_block = 0 if bridge is None else bridge.num_heads if bridge.kind == "attention" else 1
    q, kv, ffn = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    # The number of pieces that a matrix may be split into, by its name.
    outward = {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv}
    outward |= {"mlp.gate_proj": ffn, "mlp.up_proj": ffn}
    outward |= {f"bridge.{part}_proj": of_block for part in "qkv"}
    inward = {"self_attn.o_proj": q, "mlp.down_proj": ffn, "bridge.o_proj": of_block}
    if bridge is not None and bridge.kind == "mlp":
        outward["bridge.up_proj"] = inward["bridge.down_proj"] = 2 * bridge.inner

    def spec(key: str) -> PartitionSpec:
        name, _, kind = key.removeprefix(LAYERS).rpartition(".")
        if name in ("model.embed_tokens", "lm_head") and config.vocab_size % devices == 0:
            return PartitionSpec(axis, None)
        module, _, half = name.partition(".lora_")
        if module in outward and outward[module] % devices == 0 and half != "A":
            return PartitionSpec(None, axis, *([None] if kind == "weight" else []))
        if module in inward and inward[module] % devices == 0 and half != "B" and kind == "weight":
            return PartitionSpec(None, None, axis)
        return PartitionSpec()

    return {key: spec(key) for key in stacked_names(config)}
