"""A host decoder of the Llama family with Bridge blocks after its FFNs (chapters 3 and 5).

Modules whose parameters have the checkpoint's names, in its order, and whose forward is the
teacher-forced one: what a model learns by, over the cells of `pieces.py`, or over all of a batch.
Decoding reads the same weights packed (`packed.py`), by the functions of this file.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bridge.config import LoraConfig, ModelConfig, tensor_shapes
from bridge_torch.block import Block, Mixing, Norm, wide
from bridge_torch.cells import Cells, Rope, rotate
from bridge_torch.linear import Embedding, stack_parameters
from bridge_torch.pointwise import swiglu


class Reading(Mixing, Protocol):
    """Of the cells of a batch, what layers need to know: `cells.Cells`, or `pieces.Pieces`."""

    @property
    def rope(self) -> Float[Tensor, "two *cells d"]:
        """cos and sin of each cell's position."""
        ...

    def attend(
        self,
        q: Float[Tensor, "*cells heads d"],
        k: Float[Tensor, "*cells kv_heads d"],
        v: Float[Tensor, "*cells kv_heads d"],
        window: int | None,
    ) -> Float[Tensor, "*cells heads_d"]:
        """Causal attention over active cells inside the window (clauses 5.4 and 5.5)."""
        ...


class LoraLinear(nn.Linear):
    """A linear layer with a low-rank update (clause 5.10)."""

    def __init__(self, inward: int, out: int, bias: bool, lora: LoraConfig) -> None:
        super().__init__(inward, out, bias)
        self.lora_A = nn.Linear(inward, lora.rank, bias=False)
        self.lora_B = nn.Linear(lora.rank, out, bias=False)
        self.scale = lora.scale

    def forward(self, input: Float[Tensor, "*cells inward"]) -> Float[Tensor, "*cells out"]:
        y = super().forward(input)
        return torch.add(y, self.lora_B(self.lora_A(input)), alpha=self.scale)

    @torch.no_grad()
    def merged(self) -> Float[Tensor, "out inward"]:
        """The matrix that computes the same, rounded once."""
        dtype = wide(self.weight.dtype)
        A, B = self.lora_A.weight.to(dtype), self.lora_B.weight.to(dtype)
        return torch.addmm(self.weight.to(dtype), B, A, alpha=self.scale).to(self.weight.dtype)


def linear(config: ModelConfig, name: str, inward: int, out: int, bias: bool) -> nn.Linear:
    """The module `name` of a layer, with an update where the model has one of it."""
    lora = config.lora
    if lora is None or name not in lora.targets:
        return nn.Linear(inward, out, bias)
    return LoraLinear(inward, out, bias, lora)


class Attention(nn.Module):
    """The host's attention (clauses 5.4 to 5.6)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        D, d, eps = config.hidden_size, config.head_dim, config.rms_norm_eps
        queries, keys = config.num_attention_heads * d, config.num_key_value_heads * d
        self.head_dim = d
        self.window = config.sliding_windows[layer] if config.sliding_windows else None
        self.q_proj = linear(config, "q_proj", D, queries, config.qkv_bias)
        self.k_proj = linear(config, "k_proj", D, keys, config.qkv_bias)
        self.v_proj = linear(config, "v_proj", D, keys, config.qkv_bias)
        self.o_proj = linear(config, "o_proj", queries, D, config.o_bias)
        self.q_norm = Norm(d, eps) if config.qk_norm else None
        self.k_norm = Norm(d, eps) if config.qk_norm else None

    def inward(self) -> dict[str, nn.Linear]:
        """What reads the stream, by name, in stacking order."""
        return {"q_proj": self.q_proj, "k_proj": self.k_proj, "v_proj": self.v_proj}

    def forward(self, x: Float[Tensor, "*cells D"], cells: Reading) -> Float[Tensor, "*cells D"]:
        """What a normed stream adds to itself."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cells.rope), rotate(k, cells.rope)
        return self.o_proj(cells.attend(q, k, v, self.window))


class FeedForward(nn.Module):
    """SwiGLU (clause 5.8)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = linear(config, "gate_proj", D, inner, config.mlp_bias)
        self.up_proj = linear(config, "up_proj", D, inner, config.mlp_bias)
        self.down_proj = linear(config, "down_proj", inner, D, config.mlp_bias)

    def inward(self) -> dict[str, nn.Linear]:
        """What reads the stream, by name, in stacking order."""
        return {"gate_proj": self.gate_proj, "up_proj": self.up_proj}

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """What a normed stream adds to itself."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


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

    def forward(self, h: Float[Tensor, "*cells D"], cells: Reading) -> Float[Tensor, "*cells D"]:
        """The residual stream after it."""
        h = h + self.self_attn(self.input_layernorm(h), cells)
        h = h + self.mlp(self.post_attention_layernorm(h))
        return h if self.bridge is None else self.bridge(h, cells)


class Body(nn.Module):
    """What has a name under `model.` in a checkpoint: all but an untied head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens: Int[Tensor, "*cells"], cells: Reading) -> Float[Tensor, "*cells D"]:
        """Hidden states after the last layer."""
        return self.through(self.embed_tokens(tokens), cells)

    def through(
        self, h: Float[Tensor, "*cells D"], cells: Reading, recompute: bool = False
    ) -> Float[Tensor, "*cells D"]:
        """The layers alone. `recompute`: the backward pass computes each again from its input
        (clause 7.11)."""
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
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

    def merge_updates(self) -> None:
        """Add the low-rank updates to their matrices for good: a model without any, computing the
        same."""
        for module in list(self.modules()):
            for name, part in list(module.named_children()):
                if isinstance(part, LoraLinear):
                    with torch.device("meta"):
                        plain = nn.Linear(part.in_features, part.out_features, bias=False)
                    plain.weight, plain.bias = nn.Parameter(part.merged()), part.bias
                    setattr(module, name, plain)
        self.config = replace(self.config, lora=None)

    def put(self, name: str, tensor: Tensor) -> None:
        """A tensor, and its memory, in the place of a parameter."""
        module, _, kind = name.rpartition(".")
        setattr(self.get_submodule(module), kind, nn.Parameter(tensor))

    @property
    def like(self) -> Tensor:
        """Of the dtype that is computed in, where the weights are."""
        return self.model.embed_tokens.weight

    def cells(self, groups: np.ndarray, active: np.ndarray, positions: np.ndarray) -> Cells:
        """Of a batch `[B, S]`: what `forward` needs to know of it beside its tokens. `groups [B]`,
        `active [B, S]` and `positions [B, S]` are those of `bridge.contract.Batch`."""
        return Cells.of(self.config, self.rope, self.like, groups, active, positions)

    def forward(self, tokens: Int[Tensor, "B S"], cells: Cells) -> Float[Tensor, "B S V"]:
        """Logits in float32 or wider (clause 5.2). Ids of inactive cells may be any tokens."""
        return self.logits(self.model(tokens, cells))

    def logits(self, h: Float[Tensor, "*cells D"]) -> Float[Tensor, "*cells V"]:
        """Final norm and head, of hidden states."""
        h, tied = self.model.norm(h), self.model.embed_tokens.weight
        logits = F.linear(h, tied) if self.lm_head is None else self.lm_head(h)
        return logits.to(wide(logits.dtype))
