"""The weights of a model in the form that is needed: stacked over layers, or each layer's own.

A scan over stacks keeps what is compiled small, and is what accelerators run and training
differentiates. XLA's CPU compiler copies each layer out of a stack before it multiplies by it,
which at a few rows is as long as the step itself: so a CPU decodes a layer at a time, each from
arrays of its own, with matrices turned to `[in, out]`, which it multiplies by faster. There is one
form at a time, and what asks for the other one has it made: no copy can be stale.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bridge.config import ModelConfig, tensor_shapes
from bridge_jax.compiled import compiled
from bridge_jax.linear import (
    DOWN,
    LAYERS,
    TURNED,
    UP,
    WEIGHT,
    contract,
    stacked,
    stacked_names,
)

Array = jax.Array
Params = Mapping[str, Array]
Get = Callable[[str], np.ndarray]
Put = Callable[[np.ndarray], Array]


class Layers(NamedTuple):
    """Parameters by layer."""

    outer: Params  # what no layer has: embedding, last norm, head
    each: tuple[Params, ...]  # by their names after the layer's, matrices turned


class Weights:
    """All parameters of a model, in one form; those of one with low-rank updates always stacked
    (clause 5.10), and beside them what decoders read, once one asks, until they may be written."""

    def __init__(self, config: ModelConfig, get: Get, put: Put, *, by_layer: bool) -> None:
        """Each tensor is read once, by its checkpoint name, through `get`, and goes to the device
        through `put`."""
        self.config, self.put = config, put
        self._layers: Layers | None = None
        self._stacks: dict[str, Array] | None = None
        self._merged: dict[str, Array] | None = None
        if by_layer and config.lora is None:
            self._layers = self._apart(get)
        else:
            names = stacked_names(config).items()
            self._stacks = {key: put(_stack(config, same, get)) for key, same in names}

    @property
    def stacked(self) -> dict[str, Array]:
        """By checkpoint name, the layers' stacked under one name; to be written to."""
        if self._stacks is None:
            assert self._layers is not None
            names = stacked_names(self.config).items()
            self._stacks = {key: self._together(same, self._layers) for key, same in names}
        self._layers = self._merged = None
        return self._stacks

    def merged(self, *, quick: bool) -> Params:
        """Stacks to be read by decoders: each matrix with its update in it, and no other update."""
        lora = self.config.lora
        if lora is None:
            return self.stacked
        if self._merged is None:
            stacks, self._merged = self.stacked, {}
            for key, stack in stacks.items():
                module = key.removesuffix(WEIGHT)
                if module + DOWN in stacks:
                    halves = stacks[module + DOWN], stacks[module + UP]
                    stack = with_update(stack, *halves, scale=lora.scale, quick=quick)
                if not key.endswith((DOWN, UP)):
                    self._merged[key] = stack
        return self._merged

    @property
    def layers(self) -> Layers:
        """Each layer's own, to be read by decoders, with updates in their matrices."""
        if self._layers is None:
            stacks, lora = self._stacks, self.config.lora
            assert stacks is not None
            on_host = {key: np.asarray(stack) for key, stack in stacks.items()}

            def get(name: str) -> np.ndarray:
                key, layer = stacked(name)
                if layer is None:
                    return on_host[key]
                module = key.removesuffix(WEIGHT)
                if lora is None or module + DOWN not in stacks:
                    return on_host[key][layer]
                parts = (key, module + UP, module + DOWN)
                weight, up, down = (on_host[k][layer].astype(np.float32) for k in parts)
                return (weight + lora.scale * up @ down).astype(on_host[key].dtype)

            self._layers = self._apart(get)
            if lora is None:
                self._stacks = None
        return self._layers

    def tensors(self, *, quick: bool) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor by checkpoint name, in canonical order, from the form that there is."""
        ready, last = {}, None
        for name in tensor_shapes(self.config):
            key, layer = stacked(name)
            if self._stacks is None:
                assert self._layers is not None
                yield name, _own(self._layers, name)
            elif layer is None:
                yield name, jax.device_get(self._stacks[key])
            else:
                if layer != last:  # one layer at a time is on the host
                    stacks = {k: p for k, p in self._stacks.items() if k.startswith(LAYERS)}
                    ready, last = jax.device_get(layer_of(stacks, layer, quick=quick)), layer
                yield name, ready[key]

    def _apart(self, get: Get) -> Layers:
        outer: dict[str, Array] = {}
        each: list[dict[str, Array]] = [{} for _ in range(self.config.num_hidden_layers)]
        for name, shape in tensor_shapes(replace(self.config, lora=None)).items():
            key, layer = stacked(name)
            if layer is None:
                outer[name] = self.put(get(name))
            elif len(shape) == 2:
                turned = np.ascontiguousarray(get(name).T)
                each[layer][key.removeprefix(LAYERS).removesuffix(WEIGHT) + TURNED] = self.put(
                    turned
                )
            else:
                each[layer][key.removeprefix(LAYERS)] = self.put(get(name))
        return Layers(outer, tuple(each))

    def _together(self, names: list[str], layers: Layers) -> Array:
        return self.put(_stack(self.config, names, lambda name: _own(layers, name)))


def _own(layers: Layers, name: str) -> np.ndarray:
    """A tensor by its checkpoint name, as it is in a checkpoint."""
    key, layer = stacked(name)
    if layer is None:
        return np.asarray(layers.outer[name])
    own, key = layers.each[layer], key.removeprefix(LAYERS)
    if key in own:
        return np.asarray(own[key])
    return np.asarray(own[key.removesuffix(WEIGHT) + TURNED]).T


@compiled(static_argnames="scale")
def with_update(
    weight: Float[Array, "L out in"],
    down: Float[Array, "L rank in"],
    up: Float[Array, "L out rank"],
    *,
    scale: float,
) -> Float[Array, "L out in"]:
    """`weight + scale * up @ down`, in float32 and rounded once, a layer at a time."""

    def one(of_layer: tuple[Array, Array, Array]) -> Array:
        weight, down, up = of_layer
        update = scale * contract("or,ri->oi", up, down)
        return (weight.astype(jnp.float32) + update).astype(weight.dtype)

    return jax.lax.map(one, (weight, down, up))


@compiled()
def layer_of(stacks: Params, layer: int) -> Params:
    """One layer of every stack."""
    return {key: stack[layer] for key, stack in stacks.items()}


def parameters(config: ModelConfig) -> int:
    """How many numbers a model has."""
    return sum(map(prod, tensor_shapes(config).values()))


def _stack(config: ModelConfig, names: list[str], get: Get) -> np.ndarray:
    """`[layers, ...]`, or one tensor. A layer without a block has zeros, which are not read."""
    if stacked(names[0])[1] is None:
        return get(names[0])
    layers: list[Any] = [None] * config.num_hidden_layers
    for name in names:
        layers[stacked(name)[1] or 0] = get(name)
    blank = next(layer for layer in layers if layer is not None)
    return np.stack([np.zeros_like(blank) if layer is None else layer for layer in layers])
