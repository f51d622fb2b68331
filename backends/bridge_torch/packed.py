"""The weights of a model packed for decoding, and the forward that reads them without gradients.

A packed form is derived from a `Transformer` (`packing.py`) and never changes: what reads one input
is stacked, and on CPUs in oneDNN's blocked layout, or narrow. What is computed may be wider than
what is held: on CPUs a model in bfloat16 or float16 has float32 activations. The forward is that of
`model.py` over `[B, S]` cells, and the parts of it that a decoding step takes too.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from bridge.config import ModelConfig
from bridge_torch.block import PackedBlock, rms_norm, wide
from bridge_torch.cells import Cells, Rope, attend, rotate
from bridge_torch.linear import Linear, Whole
from bridge_torch.pieces import Pieces

# q `[..., heads, d]`, k and v `[..., kv_heads, d]`, placed, to y `[..., heads * d]`.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class PackedLayer:
    """One decoder layer, and the Bridge block that follows its FFN (clause 3.7)."""

    config: ModelConfig
    prefix: str  # of its tensors' names
    window: int | None
    input_norm: Float[Tensor, " D"]
    qkv: Linear
    o: Linear
    q_norm: Float[Tensor, " d"] | None
    k_norm: Float[Tensor, " d"] | None
    post_norm: Float[Tensor, " D"]
    gate_up: Linear
    down: Linear
    block: PackedBlock | None

    def attention(
        self, h: Float[Tensor, "... D"], rope: Float[Tensor, "two ... d"], attend: Attend
    ) -> Float[Tensor, "... D"]:
        """On the residual stream (clause 5.3); `attend` has the keys and values of before."""
        q, k, v = self._project(rms_norm(h, self.input_norm, self.config.rms_norm_eps), rope)
        return self.o.add_to(h, attend(q, k, v))

    def feed_forward(self, h: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """On the residual stream (clauses 5.3 and 5.8)."""
        x = rms_norm(h, self.post_norm, self.config.rms_norm_eps)
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down.add_to(h, F.silu(gate) * up)

    def _project(
        self, x: Float[Tensor, "... D"], rope: Float[Tensor, "two ... d"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        c, eps = self.config, self.config.rms_norm_eps
        heads = self.qkv(x).unflatten(-1, (-1, c.head_dim))
        turning = c.num_attention_heads + c.num_key_value_heads
        qk, v = heads[..., :turning, :], heads[..., turning:, :]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk[..., : c.num_attention_heads, :], qk[..., c.num_attention_heads :, :]
            q, k = rms_norm(q, self.q_norm, eps), rms_norm(k, self.k_norm, eps)
            return rotate(q, rope), rotate(k, rope), v
        qk = rotate(qk, rope)
        return qk[..., : c.num_attention_heads, :], qk[..., c.num_attention_heads :, :], v

    def host(self) -> tuple[Linear, ...]:
        """The matrices of the host."""
        return self.qkv, self.o, self.gate_up, self.down

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """Its tensors by checkpoint name, in canonical order."""
        yield f"{self.prefix}.input_layernorm.weight", self.input_norm
        yield from self.qkv.parts()
        yield from self.o.parts()
        if self.q_norm is not None and self.k_norm is not None:
            yield f"{self.prefix}.self_attn.q_norm.weight", self.q_norm
            yield f"{self.prefix}.self_attn.k_norm.weight", self.k_norm
        yield f"{self.prefix}.post_attention_layernorm.weight", self.post_norm
        yield from self.gate_up.parts()
        yield from self.down.parts()
        if self.block is not None:
            yield f"{self.prefix}.bridge.norm.weight", self.block.norm
            yield from self.block.inward.parts()
            yield from self.block.outward.parts()


Part = PackedLayer | Linear


@dataclass(frozen=True, eq=False)
class Packed:
    """The weights of a whole model, tied or not."""

    config: ModelConfig
    rope: Rope
    like: Float[Tensor, " 0"]  # of the dtype that is computed in, where the weights are
    embed: Float[Tensor, "V D"]
    layers: tuple[PackedLayer, ...]
    norm: Float[Tensor, " D"]
    head: Linear

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by checkpoint name, in canonical order (clause 9.3), in the dtype of the
        embedding, which is the model's."""
        for name, tensor in self._parts():
            yield name, tensor.to(self.embed.dtype)

    def _parts(self) -> Iterator[tuple[str, Tensor]]:
        yield "model.embed_tokens.weight", self.embed
        for layer in self.layers:
            yield from layer.parts()
        yield "model.norm.weight", self.norm
        if not self.config.tie_word_embeddings:
            yield from self.head.parts()

    def emptied(self) -> list[Part]:
        """What packing took out of the module, where it consumed it."""
        return [*self.layers] if self.config.tie_word_embeddings else [*self.layers, self.head]

    def suit(self, rows: int) -> None:
        """Lay the host's matrices out for steps of so many rows: the numbers are the same. Whoever
        decodes with them meanwhile goes on as before, at another speed."""
        for layer in self.layers:
            for linear in (layer.qkv, layer.o, layer.gate_up, layer.down):
                linear.suit(rows)
        self.head.suit(rows)
        head = self.head
        if (
            self.config.tie_word_embeddings
            and isinstance(head, Whole)
            and not head.weight.is_mkldnn
        ):
            head.weight = self.embed  # the same numbers, once

    def cells(self, groups: np.ndarray, active: np.ndarray, positions: np.ndarray) -> Cells:
        """Of a batch `[B, S]`."""
        return Cells.of(self.config, self.rope, self.like, groups, active, positions)

    def look_up(self, tokens: Int[Tensor, "..."]) -> Float[Tensor, "... D"]:
        """What the first layer reads (clause 5.2)."""
        return F.embedding(tokens, self.embed).to(self.like.dtype)

    def read(
        self,
        tokens: Int[Tensor, "B S"],
        cells: Cells,
        keep: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> Float[Tensor, "B S D"]:
        """Hidden states after the last layer; `keep` receives each layer's keys and values."""
        h = self.look_up(tokens)
        for i, layer in enumerate(self.layers):
            h = layer.attention(h, cells.rope, _teacher_forced(i, layer, cells, keep))
            h = layer.feed_forward(h)
            if layer.block is not None:
                h = layer.block(h, cells.grid, cells.active)
        return h

    def logits(self, h: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Final norm and head, in float32 or wider (clause 5.2)."""
        h = rms_norm(h, self.norm, self.config.rms_norm_eps)
        return self.head(h).to(wide(h.dtype))

    def over(
        self,
        cells: Pieces,
        watch: Callable[[Tensor, Tensor], None] | None = None,
    ) -> Float[Tensor, "C D"]:
        """What `read` gives, of the cells of a batch that are computed (clause 7.14); `watch`
        receives what each block reads and what it adds."""
        h = self.look_up(cells.tokens)
        for layer in self.layers:
            h = layer.attention(h, cells.rope, partial(cells.attend, window=layer.window))
            h = layer.feed_forward(h)
            if layer.block is not None:
                y = layer.block.added(h, cells)
                if watch is not None:
                    watch(h, y)
                h = h + y
        return h

    def norm_ratios(self, cells: Pieces) -> Float[Tensor, " blocks"]:
        """How much each block adds to what it reads, in order of layers (clause 3.9): the mean over
        all cells of the batch, those that share a computed one too."""
        ratios: list[Tensor] = []
        self.over(cells, lambda h, y: ratios.append(mean_ratio(y, h, cells.rows)))
        return torch.stack(ratios) if ratios else torch.empty(0)


def mean_ratio(
    y: Float[Tensor, "C D"], h: Float[Tensor, "C D"], rows: Int[Tensor, " C"]
) -> Float[Tensor, ""]:
    """The norm of y to that of h, its mean over cells that count as so many `rows`; wide."""
    added, before = (torch.linalg.vector_norm(z, dim=-1, dtype=wide(z.dtype)) for z in (y, h))
    ratio = (added / before).masked_fill(before == 0, 0)
    return (ratio * rows).sum() / rows.sum().clamp(min=1)


def _teacher_forced(
    i: int, layer: PackedLayer, cells: Cells, keep: Callable[[int, Tensor, Tensor], None] | None
) -> Attend:
    def over_cells(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if keep is not None:
            keep(i, k, v)
        return attend(q, k, v, cells, layer.window)

    return over_cells
