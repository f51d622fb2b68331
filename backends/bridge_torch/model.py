"""A host decoder of the Llama family with Bridge blocks after its FFNs (chapters 3 and 5).

The teacher-forced forward over `[B, S]` cells, of which some may be inactive. Prefill is the same
forward with keys and values kept. Weights are plain tensors in dataclasses, in the order that data
flows; autograd sees them as it sees any tensors.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bridge.config import ModelConfig
from bridge.rope import inverse_frequencies
from bridge_torch.block import Block, Grid, rms_norm, wide
from bridge_torch.fused import serves
from bridge_torch.linear import Linear, embed


class Rope:
    """Tables of cos and sin by position, from float64 on the host (clause 5.6)."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.frequencies, self.factor = inverse_frequencies(config.rope, config.head_dim)
        self.device, self.dtype = device, wide(dtype)
        self._grow(0)

    def _grow(self, length: int) -> None:
        angles = np.arange(length)[:, None] * self.frequencies
        cos, sin = np.cos(angles) * self.factor, np.sin(angles) * self.factor
        # The sign of rotate_half is in the table: x * cos + (halves of x swapped) * sin.
        tables = np.stack([np.concatenate([cos, cos], -1), np.concatenate([-sin, sin], -1)])
        self.tables = torch.from_numpy(tables).to(self.device, self.dtype)

    def reserve(self, length: int) -> None:
        """Make room for positions below `length`."""
        if length > self.tables.shape[1]:
            self._grow(-(-length // 256) * 256)

    def __call__(self, positions: Int[Tensor, "..."]) -> Float[Tensor, "two ... d"]:
        """cos and sin of positions below what was reserved."""
        rows = self.tables.index_select(1, positions.reshape(-1))
        return rows.reshape(2, *positions.shape, -1)


def rotate(x: Float[Tensor, "... heads d"], rope: Float[Tensor, "two ... d"]) -> Tensor:
    """Turn each head by its position, in Hugging Face's layout of halves."""
    cos, sin = rope.unsqueeze(-2)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


@dataclass(frozen=True)
class Cells:
    """What the layers need to know of a batch beside its hidden states; made once a call."""

    grid: Grid
    rope: Float[Tensor, "two B S d"]
    active: Bool[Tensor, "B S"] | None  # None: all are
    masks: Mapping[int | None, Bool[Tensor, "B one S S"] | None]  # by window; None: causal


@dataclass
class Layer:
    """One decoder layer, and the Bridge block that follows its FFN (clause 3.7)."""

    prefix: str
    input_norm: Float[Tensor, " D"]
    qkv: Linear
    q_norm: Float[Tensor, " d"] | None
    k_norm: Float[Tensor, " d"] | None
    o: Linear
    post_norm: Float[Tensor, " D"]
    gate_up: Linear
    down: Linear
    block: Block | None
    window: int | None

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """Its tensors by checkpoint name."""
        yield from self.norms().items()
        for linear in (self.qkv, self.o, self.gate_up, self.down):
            yield from linear.parts()
        if self.block is not None:
            yield from self.block.parts()

    def linears(self) -> list[Linear]:
        """Its linear layers, the block's too."""
        host = [self.qkv, self.o, self.gate_up, self.down]
        return host if self.block is None else [*host, self.block.inward, self.block.outward]

    def pack(self) -> None:
        """Weights in the layout that is fastest; the fused step reads those of a block as they
        are."""
        for linear in (self.qkv, self.o, self.gate_up, self.down):
            linear.pack()
        if self.block is not None and not serves(
            self.input_norm.device.type, self.input_norm.dtype
        ):
            self.block.inward.pack()
            self.block.outward.pack()

    def norms(self) -> dict[str, Tensor]:
        """The norms' weights by checkpoint name."""
        named = {
            f"{self.prefix}.input_layernorm.weight": self.input_norm,
            f"{self.prefix}.self_attn.q_norm.weight": self.q_norm,
            f"{self.prefix}.self_attn.k_norm.weight": self.k_norm,
            f"{self.prefix}.post_attention_layernorm.weight": self.post_norm,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def substitute(self, tensors: Mapping[str, Tensor]) -> "Layer":
        """This layer with some tensors replaced, differentiably."""

        def norm(name: str, own: Tensor | None) -> Tensor | None:
            return tensors.get(f"{self.prefix}.{name}.weight", own)

        return replace(
            self,
            input_norm=norm("input_layernorm", self.input_norm),
            qkv=self.qkv.substitute(tensors),
            q_norm=norm("self_attn.q_norm", self.q_norm),
            k_norm=norm("self_attn.k_norm", self.k_norm),
            o=self.o.substitute(tensors),
            post_norm=norm("post_attention_layernorm", self.post_norm),
            gate_up=self.gate_up.substitute(tensors),
            down=self.down.substitute(tensors),
            block=self.block and self.block.substitute(tensors),
        )


class Transformer:
    """The weights of a model and its teacher-forced forward."""

    def __init__(self, config: ModelConfig, get: Callable[[str], Tensor]) -> None:
        """Read every tensor once, by its checkpoint name, through `get`."""
        self.config = config
        self.embed = get("model.embed_tokens.weight")
        self.layers = []
        for i in range(config.num_hidden_layers):
            self.layers.append(_read_layer(config, i, get))
            self.layers[i].pack()  # one by one: never two copies of the model
        self.norm = get("model.norm.weight")
        head = self.embed if config.tie_word_embeddings else get("lm_head.weight")
        self.head = Linear(("lm_head",), (len(head),), head).pack()
        self.device, self.dtype = self.embed.device, self.embed.dtype
        self.rope = Rope(config, self.device, self.dtype)

    def pack(self) -> None:
        """Weights in the layout that is fastest to compute with."""
        for layer in self.layers:
            layer.pack()
        self.head.pack()

    def unpack(self) -> None:
        """Weights in the layout that has gradients, a tied head sharing the embedding's memory."""
        for linear in self.linears():
            linear.unpack()
        if self.config.tie_word_embeddings:
            self.head.weight = self.embed

    def linears(self) -> Iterator[Linear]:
        """Every linear layer, the head last."""
        for layer in self.layers:
            yield from layer.linears()
        yield self.head

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by checkpoint name, as views of what the model computes with."""
        yield "model.embed_tokens.weight", self.embed
        for layer in self.layers:
            yield from layer.parts()
        yield "model.norm.weight", self.norm
        if not self.config.tie_word_embeddings:
            yield from self.head.parts()

    def substitute(self, tensors: Mapping[str, Tensor]) -> "Transformer":
        """This model with some tensors replaced, differentiably; shares all others."""
        new = object.__new__(Transformer)
        new.__dict__.update(self.__dict__)
        new.embed = tensors.get("model.embed_tokens.weight", self.embed)
        new.layers = [layer.substitute(tensors) for layer in self.layers]
        new.norm = tensors.get("model.norm.weight", self.norm)
        new.head = self.head.substitute(tensors)
        if self.config.tie_word_embeddings and "model.embed_tokens.weight" in tensors:
            new.head = replace(self.head, weight=new.embed)
        return new

    def cells(self, groups: np.ndarray, active: np.ndarray, positions: np.ndarray) -> Cells:
        """Masks, rope and the grid of a batch `[B, S]`. Masks are `[B, 1, S, S]` where one is
        needed; a causal batch without padding, inside every window, needs none."""
        S = active.shape[1]
        positions = np.where(active, positions, 0)  # of other cells they may be any numbers
        self.rope.reserve(int(positions.max(initial=0)) + 1)
        place = torch.tensor(positions, dtype=torch.int64, device=self.device)
        full = bool(active.all())
        on = None if full else torch.tensor(active, device=self.device)
        reach = int((positions.max(1) - positions.min(1)).max(initial=0))
        masks: dict[int | None, Tensor | None] = {}
        for window in {layer.window for layer in self.layers}:
            if full and (window is None or reach < window):
                masks[window] = None
                continue
            mask = torch.ones(S, S, dtype=torch.bool, device=self.device).tril()[None]
            if on is not None:
                mask = mask & on[:, None, :]
            if window is not None:
                mask = mask & (place[:, :, None] - place[:, None, :] < window)
            # Every cell may read itself, so that no softmax is empty; inactive ones give 0 below.
            eye = torch.eye(S, dtype=torch.bool, device=self.device)
            masks[window] = (mask | eye).unsqueeze(1)
        return Cells(Grid.of(groups, self.device), self.rope(place), on, masks)

    def forward(
        self,
        tokens: Int[Tensor, "B S"],
        cells: Cells,
        keep: Callable[[int, Tensor, Tensor], None] | None = None,
        recompute: bool = False,
    ) -> Float[Tensor, "B S D"]:
        """Hidden states after the last layer; `keep` receives each layer's keys and values.

        `recompute`: the backward pass computes each layer again from its input (clause 7.11).
        """
        h = embed(self.embed, tokens)
        for i, layer in enumerate(self.layers):
            if recompute:
                h = checkpoint(self._layer, i, layer, h, cells, keep, use_reentrant=False)
            else:
                h = self._layer(i, layer, h, cells, keep)
        return h

    def norm_ratios(self, tokens: Int[Tensor, "B S"], cells: Cells) -> Float[Tensor, " blocks"]:
        """How much each block adds to what it reads, in order of layers (clause 3.9)."""
        h, ratios = F.embedding(tokens, self.embed), []
        for i, layer in enumerate(self.layers):
            h = self._layer(i, replace(layer, block=None), h, cells, None)
            if layer.block is not None:
                ratios.append(layer.block.norm_ratio(h, cells.grid, cells.active))
                h = layer.block(h, cells.grid, cells.active)
        return torch.stack(ratios) if ratios else torch.empty(0)

    def _layer(
        self,
        i: int,
        layer: Layer,
        h: Float[Tensor, "B S D"],
        cells: Cells,
        keep: Callable[[int, Tensor, Tensor], None] | None,
    ) -> Float[Tensor, "B S D"]:
        """Attention, FFN and block on the residual stream (clauses 5.3 and 3.7)."""
        x = rms_norm(h, layer.input_norm, self.config.rms_norm_eps)
        q, k, v = self.project(layer, x, cells.rope)
        if keep is not None:
            keep(i, k, v)
        h = layer.o.add_to(h, _attend(q, k, v, cells, layer.window))
        h = feed_forward(layer, h, rms_norm(h, layer.post_norm, self.config.rms_norm_eps))
        return h if layer.block is None else layer.block(h, cells.grid, cells.active)

    def project(
        self, layer: Layer, x: Float[Tensor, "... D"], rope: Float[Tensor, "two ... d"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q `[..., heads, d]`, k and v `[..., kv_heads, d]`, with norms and rope applied."""
        c = self.config
        heads = layer.qkv(x).unflatten(-1, (-1, c.head_dim))
        turning = c.num_attention_heads + c.num_key_value_heads
        qk, v = heads[..., :turning, :], heads[..., turning:, :]
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = qk[..., : c.num_attention_heads, :], qk[..., c.num_attention_heads :, :]
            q = rms_norm(q, layer.q_norm, c.rms_norm_eps)
            k = rms_norm(k, layer.k_norm, c.rms_norm_eps)
            return rotate(q, rope), rotate(k, rope), v
        qk = rotate(qk, rope)
        return qk[..., : c.num_attention_heads, :], qk[..., c.num_attention_heads :, :], v

    def logits(self, h: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Final norm and head, in float32 or wider (clause 5.2)."""
        h = rms_norm(h, self.norm, self.config.rms_norm_eps)
        return self.head(h).to(wide(self.dtype))


def feed_forward(
    layer: Layer, h: Float[Tensor, "... D"], x: Float[Tensor, "... D"]
) -> Float[Tensor, "... D"]:
    """SwiGLU of x on the residual stream h (clauses 5.3 and 5.8)."""
    gate, up = layer.gate_up(x).chunk(2, -1)
    return layer.down.add_to(h, F.silu(gate) * up)


def _attend(
    q: Float[Tensor, "B S heads d"],
    k: Float[Tensor, "B S kv_heads d"],
    v: Float[Tensor, "B S kv_heads d"],
    cells: Cells,
    window: int | None,
) -> Float[Tensor, "B S heads_d"]:
    """Causal attention over active cells inside the window (clauses 5.4 and 5.5)."""
    mask = cells.masks[window]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
    )
    out = out.transpose(1, 2).flatten(2)
    return out if cells.active is None else out.masked_fill(~cells.active[..., None], 0)


def _read_layer(config: ModelConfig, i: int, get: Callable[[str], Tensor]) -> Layer:
    prefix = f"model.layers.{i}"

    def linear(part: str, *names: str, bias: bool) -> Linear:
        return Linear.stack(tuple(f"{prefix}.{part}.{n}_proj" for n in names), get, bias)

    def norm(name: str) -> Tensor:
        return get(f"{prefix}.{name}.weight")

    block = None
    bridge = config.bridge
    if bridge is not None and i in bridge.layers:
        attention = bridge.kind == "attention"
        block = Block(
            norm_name=f"{prefix}.bridge.norm.weight",
            norm=norm("bridge.norm"),
            inward=linear("bridge", *("qkv" if attention else ("up",)), bias=False),
            outward=linear("bridge", "o" if attention else "down", bias=False),
            num_heads=bridge.num_heads if attention else None,
            eps=bridge.norm_eps,
        )
    return Layer(
        prefix=prefix,
        input_norm=norm("input_layernorm"),
        qkv=linear("self_attn", *"qkv", bias=config.qkv_bias),
        q_norm=norm("self_attn.q_norm") if config.qk_norm else None,
        k_norm=norm("self_attn.k_norm") if config.qk_norm else None,
        o=linear("self_attn", "o", bias=config.o_bias),
        post_norm=norm("post_attention_layernorm"),
        gate_up=linear("mlp", "gate", "up", bias=config.mlp_bias),
        down=linear("mlp", "down", bias=config.mlp_bias),
        block=block,
        window=config.sliding_windows[i] if config.sliding_windows else None,
    )
