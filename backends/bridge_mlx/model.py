"""A host decoder of the Llama family with Bridge blocks after its FFNs (chapters 3 and 5).

The teacher-forced forward over the cells of a batch, of which some may be inactive. Prefill is the
same forward with keys and values kept. Weights are in plain dataclasses, in the order that data
flows. Nothing here evaluates: graphs are built, and whoever asked evaluates what it needs.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Float

from bridge.config import ModelConfig
from bridge_mlx.attention import Rope
from bridge_mlx.block import rms_norm
from bridge_mlx.cells import Cells
from bridge_mlx.layer import Layer
from bridge_mlx.linear import Linear, Weight, embed, evaluate

Keep = Callable[[int, mx.array, mx.array], None]
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"


@dataclass(frozen=True)
class Head:
    """What makes logits of the last layer's hidden states (clause 5.2)."""

    norm: Float[mx.array, " D"]
    linear: Linear
    eps: float
    tied: bool  # its matrix is the embedding

    def __call__(self, h: Float[mx.array, "... D"]) -> Float[mx.array, "... V"]:
        """Final norm and matrix, then float32."""
        return self.linear(rms_norm(h, self.norm, self.eps)).astype(mx.float32)

    def parts(self) -> Iterator[tuple[str, Weight]]:
        """Its own tensors by checkpoint name."""
        yield NORM, self.norm
        if not self.tied:
            yield from self.linear.parts()

    def names(self) -> set[str]:
        """The tensors that it reads."""
        return {NORM, EMBEDDING if self.tied else "lm_head.weight"}

    def substitute(self, tensors: Mapping[str, mx.array]) -> "Head":
        """This head with some tensors replaced, differentiably."""
        linear = self.linear.substitute(tensors)
        if self.tied and EMBEDDING in tensors:
            linear = replace(linear, weights=(tensors[EMBEDDING],))
        return replace(self, norm=tensors.get(NORM, self.norm), linear=linear)


class Transformer:
    """The weights of a model and its teacher-forced forward."""

    def __init__(self, config: ModelConfig, device: mx.Device, get: Callable[[str], Any]) -> None:
        """Read every tensor once, by its checkpoint name, through `get`: an array, or packed."""
        self.config, self.device = config, device
        self.embed: Weight = get(EMBEDDING)
        self.layers = []
        for i in range(config.num_hidden_layers):
            self.layers.append(Layer.read(config, i, get))
            evaluate(self.layers[i].parts())  # one by one: never two copies of the model
        tied = config.tie_word_embeddings
        matrix = self.embed if tied else get("lm_head.weight")
        linear = Linear(("lm_head",), (len(matrix),), (matrix,))
        self.head = Head(get(NORM), linear, config.rms_norm_eps, tied)
        self.dtype = self.embed.dtype
        self.rope = Rope(config)
        self._merged: Callable[[], Transformer | None] = lambda: None

    def parts(self) -> Iterator[tuple[str, Weight]]:
        """Every tensor by checkpoint name."""
        yield EMBEDDING, self.embed
        for layer in self.layers:
            yield from layer.parts()
        yield from self.head.parts()

    def substitute(self, tensors: Mapping[str, mx.array]) -> "Transformer":
        """This model with some tensors replaced, differentiably; shares all others."""
        new = object.__new__(Transformer)
        new.__dict__.update(self.__dict__)
        new.embed = tensors.get(EMBEDDING, self.embed)
        new.layers = [layer.substitute(tensors) for layer in self.layers]
        new.head = self.head.substitute(tensors)
        new._merged = lambda: None
        return new

    def merged(self) -> "Transformer":
        """What decoders compute with: this model with low-rank updates in its matrices (clause
        5.10), for as long as somebody holds it and nothing is changed."""
        if self.config.lora is None:
            return self
        merged = self._merged()
        if merged is None:
            merged = self.substitute({})
            merged.layers = []
            for layer in self.layers:
                merged.layers.append(layer.merged())
                evaluate(merged.layers[-1].parts())  # one by one, for what is made on the way
            self._merged = weakref.ref(merged)
        return merged

    def update(self, tensors: Mapping[str, mx.array]) -> None:
        """Take `tensors` as its own from now on."""
        self.__dict__.update(self.substitute(tensors).__dict__)
        evaluate(self.parts())

    def cells(
        self, tokens: np.ndarray, groups: np.ndarray, active: np.ndarray, positions: np.ndarray
    ) -> Cells:
        """What of a batch `[B, S]` is computed, and what its cells read."""
        windows = {layer.window for layer in self.layers}
        return Cells.of(tokens, groups, active, positions, self.rope, windows)

    def forward(
        self,
        cells: Cells,
        keep: Keep | None = None,
        recompute: Mapping[str, mx.array] | None = None,
    ) -> Float[mx.array, "n D"]:
        """Hidden states after the last layer; `keep` receives each layer's keys and values.

        `recompute`: the backward pass computes each layer again from its input (clause 7.11), and
        these tensors, which stand in for the model's, are what is differentiated.
        """
        h = embed(self.embed, cells.ids)
        for i, layer in enumerate(self.layers):
            if recompute is None:
                h = _run(i, layer, h, cells, keep)
                continue

            # A gradient reaches what a checkpoint is passed, and nothing that it closes over.
            def again(h, mine, i=i, layer=layer):
                return _run(i, layer.substitute(mine), h, cells, keep)

            mine = {n: x for n, x in recompute.items() if n.startswith(f"{layer.prefix}.")}
            h = mx.checkpoint(again)(h, mine)
        return h

    def norm_ratios(self, cells: Cells) -> Float[mx.array, " blocks"]:
        """How much each block adds to what it reads, in order of layers (clause 3.9)."""
        h, ratios = embed(self.embed, cells.ids), []
        for i, layer in enumerate(self.layers):
            h = _run(i, replace(layer, block=None), h, cells, None)
            if layer.block is not None:
                ratios.append(layer.block.norm_ratio(h, cells.sharing, cells.share))
                h = layer.block(h, cells.sharing)
        return mx.stack(ratios) if ratios else mx.zeros(0)


def _run(
    i: int, layer: Layer, h: Float[mx.array, "n D"], cells: Cells, keep: Keep | None
) -> Float[mx.array, "n D"]:
    """Attention, FFN and block on the residual stream (clauses 5.3 and 3.7)."""
    q, k, v = layer.project(h, cells.rope)
    if keep is not None:
        keep(i, k, v)
    h = layer.finish(h, cells.attend(q, k, v, layer.window))
    return h if layer.block is None else layer.block(h, cells.sharing)
