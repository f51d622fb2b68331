"""The worst cases that are known of what may be trained: every profile begins with them.

One small host, deep enough that a stack of layers can be trained in part, with whatever a layer can
have, and tied; and a shallow one with long rows that mostly say one token, whose embedding adds up
over a thousand cells.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from bridge.config import SPEC_VERSION
from bridge.contract import GRPO, SFT
from bridge_conformance.cases import ModelCase, RowsCase, TrainCase, rows_of

HOST: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 12,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": True,
    "hidden_act": "silu",
    "eos_token_id": 1,
    "bos_token_id": 0,
    "bridge": {
        "spec_version": SPEC_VERSION,
        "kind": "attention",
        "num_heads": 2,
        "head_dim": 3,
        "layers": [0, 2],
        "norm_eps": 1e-6,
    },
}
# q without k and v, half of a stack, some layers of a stack, a bias, a layer's norms alone, and a
# tied embedding.
SOME = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.bridge.k_proj.weight",
    "model.layers.1.input_layernorm.weight",
    "model.layers.1.self_attn.k_norm.weight",
    "model.layers.1.post_attention_layernorm.weight",
    "model.layers.2.self_attn.v_proj.bias",
    "model.layers.2.mlp.down_proj.weight",
    "model.layers.2.bridge.norm.weight",
    "model.layers.2.bridge.o_proj.weight",
)


def common(batch: RowsCase) -> RowsCase:
    """The batch with nearly all its cells of one token."""
    often = np.random.default_rng(2).random(batch.tokens.shape) < 0.95
    return replace(batch, tokens=np.where(often, 5, batch.tokens))


MODEL = ModelCase(HOST, 3)
ROWS = rows_of(MODEL, [3, 2], 7, ["full", "right", "left", "gaps", "full"], False, 1)
SHALLOW = HOST | {
    "vocab_size": 40,
    "num_hidden_layers": 1,
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
    "bridge": HOST["bridge"] | {"layers": [0]},
}
LONG = common(rows_of(ModelCase(SHALLOW, 4), [4, 2], 256, ["full"] * 6, False, 1))

# An odd seed: a reference policy beside a beta of 0, and a sampling policy (`TrainCase.batch`).
CASES = (
    TrainCase(ROWS, GRPO(0.2, 0.28), SOME, 1),
    TrainCase(LONG, SFT(), ("model.embed_tokens.weight",), 1),
)
