"""The linear maps of a decoder by name (clauses 5.2, 5.4 and 5.8): with low-rank updates where it
has some (clause 5.10), and narrow where its matrices are integers (clause 10.5).

Conventions as in `ops`; gradients are by the names of tensors. Axes: I in, O out.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from bridge.config import ModelConfig
from bridge_ref import ops
from bridge_ref.narrow import NarrowTensors, floats
from bridge_ref.narrow import linear as narrow_linear
from bridge_ref.ops import Cache
from bridge_ref.precision import product, rounded, wide

Tensors = Mapping[str, np.ndarray]
Grads = dict[str, np.ndarray]


def named_linear(
    config: ModelConfig, tensors: Tensors, name: str, x: Float[np.ndarray, "... I"]
) -> tuple[Float[np.ndarray, "... O"], Cache]:
    """`y = weight x + bias + (alpha / r) lora_B (lora_A x)`, with `name.bias` and the update where
    the model has them. Of narrow weights the merged matrix is mapped with, which has no backward.
    """
    bias = tensors.get(f"{name}.bias")
    if isinstance(tensors, NarrowTensors):
        return narrow_linear(x, merged(config, tensors, name), bias, tensors.weights), ()
    y, cache = ops.linear(x, tensors[f"{name}.weight"], bias)
    scale, update = update_scale(config, name), ()
    if scale is not None:
        low, a_cache = ops.linear(x, tensors[f"{name}.lora_A.weight"])
        added, b_cache = ops.linear(low, tensors[f"{name}.lora_B.weight"])
        y = rounded(wide(y) + scale * wide(added), x.dtype)
        update = (scale, a_cache, b_cache)
    return y, (name, bias is not None, cache, update)


def named_linear_backward(
    dy: Float[np.ndarray, "... O"], cache: Cache
) -> tuple[Float[np.ndarray, "... I"], Grads]:
    """The input's gradient, and the parameters' by name. Through an update: `dlow = scale dy
    lora_B`, and on from there as through any matrix."""
    name, has_bias, linear_cache, update = cache
    dx, dweight, dbias = ops.linear_backward(dy, linear_cache)
    grads = {f"{name}.weight": dweight}
    if has_bias:
        grads[f"{name}.bias"] = dbias
    if update:
        scale, a_cache, b_cache = update
        dlow, grads[f"{name}.lora_B.weight"], _ = ops.linear_backward(
            rounded(scale * wide(dy), dy.dtype), b_cache
        )
        dx_low, grads[f"{name}.lora_A.weight"], _ = ops.linear_backward(dlow, a_cache)
        dx = dx + dx_low
    return dx, grads


def merged(config: ModelConfig, tensors: Tensors, name: str) -> Float[np.ndarray, "O I"]:
    """Clause 5.10: `weight + (alpha / r) lora_B lora_A`, rounded once; the weight itself where it
    has no update."""
    weight, scale = tensors[f"{name}.weight"], update_scale(config, name)
    if scale is None:
        return weight
    a, b = (tensors[f"{name}.lora_{part}.weight"] for part in "AB")
    return rounded(wide(weight) + scale * product(b, a), weight.dtype)


def update_scale(config: ModelConfig, name: str) -> float | None:
    """alpha / r for a module that has an update; None for one that has none."""
    lora = config.lora
    return lora.scale if lora is not None and name.rpartition(".")[2] in lora.targets else None


def stands_for(config: ModelConfig, tensors: NarrowTensors, name: str) -> np.ndarray:
    """Clause 10.5: of a narrow matrix the numbers that its integers stand for, 0 for the update
    that is in it, and anything else as it is."""
    module, _, kind = name.rpartition(".")
    if ".lora_" in name:
        return np.zeros_like(tensors[name])
    if kind == "weight" and module.endswith(("_proj", "lm_head")) and ".bridge." not in name:
        return floats(merged(config, tensors, module), tensors.weights)
    return tensors[name].copy()
