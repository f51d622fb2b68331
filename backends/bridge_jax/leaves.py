"""What is trained of a model, as leaves that stand in for the model's own (chapter 7).

Leaves are stacked over their layers as the model's parameters are, in float32; whatever else it
holds is frozen, shared, and not differentiated.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from bridge.config import ModelConfig
from bridge.decoding.inputs import check_trainable
from bridge_jax.block import take
from bridge_jax.linear import stacked, stacked_names
from bridge_jax.weights import Params

Array = jax.Array
Leaves = dict[str, Array]
# What is trained: keys of the parameters, each with the layers of its stack; None: the whole leaf.
Chosen = tuple[tuple[str, tuple[int, ...] | None], ...]


def choose(config: ModelConfig, trainable: Sequence[str]) -> Chosen:
    """The leaves of the tensors named. Raises BridgeError for a name that is no tensor."""
    names = stacked_names(config)
    check_trainable([name for same in names.values() for name in same], trainable)
    wanted, chosen = set(trainable), []
    for key, same in names.items():
        layers = [stacked(name)[1] for name in same if name in wanted]
        whole = layers == list(range(config.num_hidden_layers)) or layers == [None]
        if layers:
            chosen.append((key, None if whole else tuple(layers)))
    return tuple(chosen)


def take_leaves(params: Params, chosen: Chosen) -> Leaves:
    """What is trained, as float32 copies."""
    return {
        key: jnp.array(params[key] if layers is None else take(params[key], np.array(layers)))
        .astype(jnp.float32)
        .copy()
        for key, layers in chosen
    }


def substitute(params: Params, leaves: Leaves, chosen: Chosen) -> dict[str, Array]:
    """The parameters with leaves in place of their own, rounded to the model's dtype."""
    new = dict(params)
    for key, layers in chosen:
        leaf = leaves[key].astype(params[key].dtype)
        new[key] = leaf if layers is None else params[key].at[np.array(layers)].set(leaf)
    return new


def by_name(
    leaves: Mapping[str, Array], config: ModelConfig, chosen: Chosen
) -> dict[str, np.ndarray]:
    """Leaves as arrays on the host, by the names of their tensors."""
    tensors, names = {}, stacked_names(config)
    for key, layers in chosen:
        leaf = jax.device_get(leaves[key])
        if stacked(names[key][0])[1] is None:
            tensors[key] = leaf
            continue
        for row, layer in zip(leaf, range(len(leaf)) if layers is None else layers, strict=True):
            tensors[key.replace("*", str(layer), 1)] = row
    return tensors


def from_names(
    tensors: Mapping[str, np.ndarray], config: ModelConfig, chosen: Chosen
) -> dict[str, np.ndarray]:
    """What `by_name` gave, as leaves."""
    leaves, names = {}, stacked_names(config)
    for key, layers in chosen:
        arrays = [
            tensors[name] for name in names[key] if layers is None or stacked(name)[1] in layers
        ]
        leaves[key] = arrays[0] if stacked(names[key][0])[1] is None else np.stack(arrays)
    return leaves


def swap(
    params: dict[str, Array], config: ModelConfig, tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Put tensors into the parameters, and give those that were there (clause 7.16), each in the
    dtype of the parameters."""
    chosen = choose(config, list(tensors)) if tensors else ()
    new, before = from_names(tensors, config, chosen), {}
    for key, layers in chosen:
        old = params[key]
        before[key] = old if layers is None else take(old, np.array(layers))
        leaf = new[key].astype(old.dtype)
        stack = leaf if layers is None else old.at[np.array(layers)].set(leaf)
        params[key] = jax.device_put(stack, old.sharding, may_alias=False)
    found = by_name(before, config, chosen)
    return {name: np.array(found[name]) for name in tensors}
