"""The worst cases that are known, by kind: every profile begins with them.

One small host serves them all, so that what is compiled for one is there for the next: windows in
every other layer, key heads that several query heads share, and a block after each layer.
"""

from typing import Any

from bridge.config import SPEC_VERSION, parse_config, tensor_shapes
from bridge_conformance.cases import DecodeCase, ModelCase, rows_of
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
