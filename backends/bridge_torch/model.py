"""A host decoder of the Llama family with Bridge blocks after its FFNs (chapters 3 and 5).

Modules whose parameters have the checkpoint's names, in its order, and whose forward is the
teacher-forced one over `[B, S]` cells, of which some may be inactive: what a model learns by.
Decoding reads the same weights packed (`packed.py`), by the functions of this file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bridge.config import ModelConfig, tensor_shapes
from bridge.decoding.rows import causal_alone, only_active
from bridge.rope import rotation_tables
from bridge_torch.block import Block, Grid, Norm, cleared, wide
from bridge_torch.linear import Embedding, stack_parameters


class Rope:
    """Tables of cos and sin by position, from float64 on the host (clause 5.6)."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.tables = torch.empty(2, 0, config.head_dim)

    def __call__(
        self, positions: Int[Tensor, "..."], end: int, dtype: torch.dtype
    ) -> Float[Tensor, "two ... d"]:
        """cos and sin of positions below `end`, in float32 or wider."""
        device, dtype = positions.device, wide(dtype)
        if (self.tables.device, self.tables.dtype) != (device, dtype):
            self.tables = self.tables.new_empty(2, 0, self.tables.shape[-1])
        if end > self.tables.shape[1]:
            length = -(-end // 256) * 256
            tables = rotation_tables(self.config.rope, self.config.head_dim, length)
            self.tables = torch.from_numpy(tables).to(device, dtype)
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

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        rope: Rope,
        weight: Tensor,
        groups: np.ndarray,
        active: np.ndarray,
        positions: np.ndarray,
    ) -> "Cells":
        """Masks, rope and the grid of a batch `[B, S]`, for a model with such a `weight`. Masks are
        `[B, 1, S, S]` where one is needed; a batch whose padding comes last, inside every window,
        needs none."""
        S, device = active.shape[1], weight.device
        positions = only_active(positions, active)
        place = torch.tensor(positions, dtype=torch.int64, device=device)
        on = None if active.all() else torch.tensor(active, device=device)
        masks: dict[int | None, Tensor | None] = {}
        for window in set(config.sliding_windows or (None,)):
            if causal_alone(active, positions, window):
                masks[window] = None
                continue
            mask = torch.ones(S, S, dtype=torch.bool, device=device).tril()[None]
            if on is not None:
                mask = mask & on[:, None, :]
            if window is not None:
                mask = mask & (place[:, :, None] - place[:, None, :] < window)
            # Every cell may read itself, so that no softmax is empty; inactive ones give 0 below.
            eye = torch.eye(S, dtype=torch.bool, device=device)
            masks[window] = (mask | eye).unsqueeze(1)
        turns = rope(place, int(positions.max(initial=0)) + 1, weight.dtype)
        return cls(Grid.of(groups, device), turns, on, masks)


def attend(
    q: Float[Tensor, "B S heads d"],
    k: Float[Tensor, "B S kv_heads d"],
    v: Float[Tensor, "B S kv_heads d"],
    cells: Cells,
    window: int | None,
) -> Float[Tensor, "B S heads_d"]:
    """Causal attention over active cells inside the window (clauses 5.4 and 5.5)."""
    mask = cells.masks[window]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    shared = q.shape[1] // k.shape[1]
    # Of CUDA's kernels flash takes no mask and no float32, and the one that takes both no heads
    # that share keys: the maths one would be left, which has all scores in memory at once.
    if shared > 1 and q.is_cuda and (mask is not None or q.dtype == torch.float32):
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
    )
    return cleared(out.transpose(1, 2).flatten(2), cells.active)


class Attention(nn.Module):
    """The host's attention (clauses 5.4 to 5.6)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        D, d, eps = config.hidden_size, config.head_dim, config.rms_norm_eps
        queries, keys = config.num_attention_heads * d, config.num_key_value_heads * d
        self.head_dim = d
        self.window = config.sliding_windows[layer] if config.sliding_windows else None
        self.q_proj = nn.Linear(D, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, D, bias=config.o_bias)
        self.q_norm = Norm(d, eps) if config.qk_norm else None
        self.k_norm = Norm(d, eps) if config.qk_norm else None

    def inward(self) -> dict[str, nn.Linear]:
        """What reads the stream, by name, in stacking order."""
        return {"q_proj": self.q_proj, "k_proj": self.k_proj, "v_proj": self.v_proj}

    def forward(self, x: Float[Tensor, "B S D"], cells: Cells) -> Float[Tensor, "B S D"]:
        """What a normed stream adds to itself."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cells.rope), rotate(k, cells.rope)
        return self.o_proj(attend(q, k, v, cells, self.window))


class FeedForward(nn.Module):
    """SwiGLU (clause 5.8)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, inner, bias=config.mlp_bias)
        self.up_proj = nn.Linear(D, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, D, bias=config.mlp_bias)

    def inward(self) -> dict[str, nn.Linear]:
        """What reads the stream, by name, in stacking order."""
        return {"gate_proj": self.gate_proj, "up_proj": self.up_proj}

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """What a normed stream adds to itself."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One decoder layer, and the Bridge block that follows its FFN (clauses 5.3 and 3.7)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = Norm(D, eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = Norm(D, eps)
        self.mlp = FeedForward(config)
        blocks = () if config.bridge is None else config.bridge.layers
        self.bridge = Block(config) if layer in blocks else None

    def forward(self, h: Float[Tensor, "B S D"], cells: Cells) -> Float[Tensor, "B S D"]:
        """The residual stream after it."""
        h = h + self.self_attn(self.input_layernorm(h), cells)
        h = h + self.mlp(self.post_attention_layernorm(h))
        return h if self.bridge is None else self.bridge(h, cells.grid, cells.active)


class Body(nn.Module):
    """What has a name under `model.` in a checkpoint: all but an untied head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, tokens: Int[Tensor, "B S"], cells: Cells, recompute: bool = False
    ) -> Float[Tensor, "B S D"]:
        """Hidden states after the last layer."""
        h = self.embed_tokens(tokens)
        again = partial(checkpoint, use_reentrant=False)
        for layer in self.layers:
            h = again(layer, h, cells) if recompute else layer(h, cells)
        return h


class Transformer(nn.Module):
    """A model whose `state_dict` is its checkpoint: `config.tensor_shapes`, in that order."""

    def __init__(self, config: ModelConfig) -> None:
        """Weights as torch draws them; `read` is what takes a checkpoint's."""
        super().__init__()
        self.config, self.rope = config, Rope(config)
        self.model = Body(config)
        D, V = config.hidden_size, config.vocab_size
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(D, V, bias=False)

    @classmethod
    def read(cls, config: ModelConfig, get: Callable[[str], Tensor]) -> "Transformer":
        """Take every tensor once, by its checkpoint name, through `get`. What reads the same input
        lies in one stack, so that nothing is copied to pack it where there is no blocked layout."""
        with torch.device("meta"):
            made = cls(config)
        made.load_state_dict({name: get(name) for name in tensor_shapes(config)}, assign=True)
        for module in made.modules():
            if isinstance(module, Attention | FeedForward | Block):
                stack_parameters(list(module.inward().values()))
        return made

    def put(self, name: str, tensor: Tensor) -> None:
        """A tensor, and its memory, in the place of a parameter."""
        module, _, kind = name.rpartition(".")
        setattr(self.get_submodule(module), kind, nn.Parameter(tensor))

    def cells(self, groups: np.ndarray, active: np.ndarray, positions: np.ndarray) -> Cells:
        """Of a batch `[B, S]`: what `forward` needs to know of it beside its tokens. `groups [B]`,
        `active [B, S]` and `positions [B, S]` are those of `bridge.contract.Batch`."""
        weight = self.model.embed_tokens.weight
        return Cells.of(self.config, self.rope, weight, groups, active, positions)

    def forward(
        self,
        tokens: Int[Tensor, "B S"],
        cells: Cells,
        read: Bool[Tensor, "B S"] | None = None,
        recompute: bool = False,
    ) -> Float[Tensor, "... V"]:
        """Logits `[B, S, V]` in float32 or wider (clause 5.2); or `[N, V]` of the N cells in `read`
        alone, for a vocabulary is wide. Ids of inactive cells may be any tokens.

        `recompute`: the backward pass computes each layer again from its input (clause 7.11).
        """
        h = self.model(tokens, cells, recompute)
        h = self.model.norm(h if read is None else h[read])
        tied = self.model.embed_tokens.weight
        logits = F.linear(h, tied) if self.lm_head is None else self.lm_head(h)
        return logits.to(wide(logits.dtype))
