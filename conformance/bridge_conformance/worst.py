"""The worst cases that are known, by kind: every profile begins with them.

One small host serves them, so that what is compiled for one is there for the next: windows in every
other layer, key heads that several query heads share, and a block after each layer. What may be
trained needs it deeper, and shallower.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from bridge.config import SPEC_VERSION, LoraConfig, parse_config, tensor_shapes
from bridge.contract import GRPO, SFT
from bridge_conformance.cases import DecodeCase, ModelCase, RowsCase, TrainCase, rows_of, share
from bridge_conformance.cases_coming import ComingCase, Wave
from bridge_conformance.cases_ends import EndsCase
from bridge_conformance.cases_life import Do, LifeCase

HOST: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 16,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "eos_token_id": 1,
    "bos_token_id": 0,
    "rope_theta": 1000.0,
    "use_sliding_window": True,
    "sliding_window": 4,
    "layer_types": ["full_attention", "sliding_attention"],
    "bridge": {
        "spec_version": SPEC_VERSION,
        "kind": "attention",
        "num_heads": 2,
        "head_dim": 4,
        "layers": [0, 1],
        "norm_eps": 1e-6,
    },
}
MODEL = ModelCase(HOST, 1)

LONG = (
    # Windows that pass from prompts to answers, while rows and prompts leave in turn: the longest
    # prompt, which is a row alone, then rows of a wide one, then another prompt.
    DecodeCase(MODEL, (1, 6, 2, 1), (9, 4, 1, 2), 14, 1224),
    # Past 64, 256 and 300 timesteps: tables of draws, of rope, and caches that grow.
    DecodeCase(MODEL, (2, 1), (5, 1), 310, 111),
    # A long prompt beside short ones.
    DecodeCase(MODEL, (1, 2), (390, 3), 4, 15),
)
# A group that comes when others are under way, longer and wider than they are; one soon after, the
# shortest, as the first leave; and others once nobody is left.
COMING = (
    ComingCase(
        DecodeCase(MODEL, (2, 1, 3, 2, 1, 2), (5, 2, 9, 1, 3, 4), 8, 140, False),
        (Wave(1, 2), Wave(2, 1), Wave(3, 1), Wave(99, 2)),
    ),
)
ENDS = (EndsCase(16, 0),)
LIFE = (
    LifeCase(
        rows_of(MODEL, [2, 1], 6, ["full", "left", "right"], False, 0),
        tuple(tensor_shapes(parse_config(HOST))),
        (
            # Two decoders at once, of one request, fed apart.
            Do("read"),
            Do("prefill", 0, (0,)),
            Do("advance", 0),
            Do("prefill", 1, (0,)),
            Do("advance", 1),
            Do("advance", 0, (1,)),
            Do("advance", 1),
            Do("advance", 0, (0,)),
            Do("advance", 1, (0, 1)),
            Do("export"),
            Do("save"),
            # An update, then the same prompts again, others, and rows that leave in turn.
            Do("step", 0),
            Do("prefill", 0, (0,)),
            Do("prefill", 1, (2,)),
            Do("advance", 1, (0,)),
            Do("advance", 0),
            Do("advance", 1, (1, 3, 4)),
            Do("advance", 1, (2, 3)),
            Do("advance", 1),
            Do("score"),
            Do("save"),
            Do("step", 1),
            Do("step", 1),
            Do("save"),
            Do("read"),
            # Back to the first update, on from there, and back to the birth.
            Do("restore", 1),
            Do("read"),
            Do("prefill", 0, (1,)),
            Do("advance", 0),
            Do("step", 1),
            Do("save"),
            Do("restore", 0),
            Do("prefill", 0, (0,)),
            Do("step", 0),
            Do("restore", 1),
            Do("step", 1),
            Do("save"),
            Do("export"),
            Do("read"),
        ),
        0,
    ),
)

# Deep enough that a stack of layers can be trained in part, with whatever a layer can have.
DEEP = HOST | {
    "num_hidden_layers": 3,
    "attention_bias": True,
    "layer_types": [*HOST["layer_types"], "full_attention"],
    "bridge": HOST["bridge"] | {"layers": [0, 2]},
}
# For long rows that mostly say one token, whose embedding adds up over a thousand cells.
SHALLOW = DEEP | {
    "vocab_size": 40,
    "num_hidden_layers": 1,
    "tie_word_embeddings": False,
    "layer_types": HOST["layer_types"][:1],
    "bridge": HOST["bridge"] | {"layers": [0]},
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


DEEP_ROWS = rows_of(
    ModelCase(DEEP, 3), [3, 2], 7, ["full", "right", "left", "gaps", "full"], False, 1
)
SHALLOW_ROWS = common(rows_of(ModelCase(SHALLOW, 4), [4, 2], 256, ["full"] * 6, False, 1))
TRAINABLE = (
    # An odd seed: a reference policy beside a beta of 0, and a sampling policy (`TrainCase.batch`).
    TrainCase(DEEP_ROWS, GRPO(0.2, 0.28), SOME, 1),
    TrainCase(SHALLOW_ROWS, SFT(), ("model.embed_tokens.weight",), 1),
)

# A prompt behind padding, longer than a window, that four rows share and end when they like; one of
# which three rows go on at once, one with gaps; two rows that are equal to the end, gaps and all; a
# row alone; and two of one text that share nothing, since one stands elsewhere.
_ENDS = ["full", "right", "full", "right", "right", "full", "full", "gaps", "right", "right"]
SHARED_ROWS = share(
    rows_of(MODEL, [4, 2, 1, 3, 2], 12, [*_ENDS, "full", "full"], False, 0),
    [1, 4, 12, 7, 6],
    ["full", "full", "gaps", "left", "full"],
    "group",
    2,
)
_LAST_OF_TWO = np.flatnonzero(SHARED_ROWS.groups == 847)[1]
SHARED_ROWS.positions[_LAST_OF_TWO] += 1
SHARED = (TrainCase(SHARED_ROWS, GRPO(0.2, 0.28, 0.1), tuple(tensor_shapes(MODEL.config)), 1),)
# Updates of some of what a backend keeps as one matrix and not of the rest, beside biases, a tied
# embedding and trained blocks.
UPDATED = ModelCase(
    DEEP, 6, lora=LoraConfig(3, 6.0, ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"))
)
LORA = (
    TrainCase(
        replace(DEEP_ROWS, model=UPDATED),
        GRPO(0.2, 0.28, 0.1),
        tuple(n for n in tensor_shapes(UPDATED.config) if ".lora_" in n or ".bridge." in n),
        1,
    ),
)
