"""What Hugging Face's configs may say, family by family: what is read, passed over, and refused.

The families are those of clause 5.1. Some keys are read; some say nothing of the forward pass, and
may say what they like; some would change it, and may have the one value under which they do not.
Whatever else is there is refused by name, never guessed (clause 5.9).
"""

from collections.abc import Mapping
from typing import Any

from bridge.errors import BridgeError, show

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")

# What Hugging Face assumes where a config is silent, by family.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "attention_bias": False,
    },
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
}
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
READ = {
    *SIZES,
    "model_type",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "original_max_position_embeddings",
    "eos_token_id",
    "bridge",
    "quantization",
    "quantization_config",
}
FAMILY_KEYS = {
    "llama": {"attention_bias", "mlp_bias"},
    "qwen2": {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"},
    "qwen3": {
        "attention_bias",
        "use_sliding_window",
        "sliding_window",
        "max_window_layers",
        "layer_types",
    },
    "mistral": {"sliding_window"},
}
# Keys that say nothing about the forward pass.
IGNORED = {
    "architectures",
    "attention_dropout",  # of their training code; evaluation never drops
    "auto_map",  # code for transformers, which we do not run
    "chunk_size_feed_forward",
    "dtype",
    "id2label",
    "initializer_range",
    "is_llama_config",
    "keys_to_ignore_at_inference",
    "label2id",
    "max_window_layers",
    "model_file",  # code for mlx-lm, which we do not run
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "use_cache",
}
# Keys that would change the forward pass, with the one value under which they do not.
NEUTRAL = {
    "attention_bias": False,
    "cross_attention_hidden_size": None,
    "hidden_act": "silu",
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "pretraining_tp": 1,
    "rope_interleaved": False,
    "rope_traditional": False,
    "tie_encoder_decoder": False,
    "use_mrope": False,
    "use_sliding_window": False,
}


def refuse_unknown(raw: Mapping[str, Any], family: str, source: str) -> None:
    """Raise BridgeError, naming `source` and the key, for a setting that is not known, or has a
    value that is not."""
    for key, value in raw.items():
        if key in READ or key in FAMILY_KEYS[family] or key.startswith("_"):
            continue
        if key.endswith("_token_id"):  # text's business: unk, sep, decoder_start and more
            continue
        if key in NEUTRAL:
            if value is not None and value != NEUTRAL[key]:
                raise BridgeError(f"{source}: {key} {show(value)} is not supported for {family}")
        elif key not in IGNORED and value is not None:
            raise BridgeError(
                f"{source}: unknown setting {show(key)}; remove it if it does not change the model"
            )
