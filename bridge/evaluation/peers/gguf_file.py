"""A host as the GGUF file that llama.cpp runs, in float32, bfloat16 or quantised.

In: an opened checkpoint without blocks. Out: one file with every tensor of it, by the `gguf`
package, and what llama.cpp must know of the model. The words of its vocabulary are made up, so that
texts are ids (`ids_of`), whatever tokenizer the host has.
"""

from pathlib import Path
from typing import Any

import numpy as np

from bridge.checkpoints.reading import Checkpoint
from bridge.config import ModelConfig
from bridge.errors import BridgeError
from bridge.rope import RopeConfig, inverse_frequencies

TYPES = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}

WORD = "w"  # and a number


def write_gguf(opened: Checkpoint, path: Path, weights: str) -> None:
    """Write the host as `path`, its matrices as `weights` names them in `TYPES`; vectors stay
    float32, as llama.cpp's own converter leaves them. Raises BridgeError for what cannot be said
    in such a file."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map, quantize
    from gguf.constants import GGMLQuantizationType

    config, kind = opened.config, GGMLQuantizationType[TYPES[weights]]
    family = FAMILIES[config.model_type]
    arch = next(a for a in MODEL_ARCH if MODEL_ARCH_NAMES[a] == family)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    writer = GGUFWriter(path, family, use_temp_file=True)
    _describe(writer, config)
    if config.rope.rope_type == "llama3":
        writer.add_tensor("rope_freqs.weight", _factors(config))
    for name, stored in opened.tensors.items():
        stem, _, suffix = name.rpartition(".")
        tensor = _rows(name, np.asarray(stored, np.float32), config, family)
        found = f"{names.get_name(stem)}.{suffix}"
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0:  # what a quantised block holds
            writer.add_tensor(found, quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(found, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def ids_of(text: str) -> list[int]:
    """The tokens of a text in made-up words."""
    return [int(word) for word in text.split(WORD)[1:]]


def _describe(writer: Any, config: ModelConfig) -> None:
    """What llama.cpp reads of the model, by its own names."""
    from gguf import RopeScalingType

    rope = config.rope
    if rope.rope_type not in ("default", "linear", "llama3"):
        raise BridgeError(f"rope type {rope.rope_type!r} is not written as GGUF here")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rope.rope_theta)
    if rope.rope_type == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factor)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"{WORD}{i}" for i in range(config.vocab_size)])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges([f"{WORD} 0"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    writer.add_add_bos_token(False)


def _rows(name: str, tensor: np.ndarray, config: ModelConfig, family: str) -> np.ndarray:
    """Rows of q and k in llama.cpp's order: for `llama`, the pairs that rope turns together are
    neighbours there (`bridge.checkpoints.gguf` reads them back)."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(name.split(".")[-2]) if family == "llama" else None
    if count is None:
        return tensor
    halves = tensor.reshape(count, 2, config.head_dim // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(tensor.shape))


def _factors(config: ModelConfig) -> np.ndarray:
    """By what llama.cpp divides each frequency, for llama3's rope."""
    plain, _ = inverse_frequencies(RopeConfig(rope_theta=config.rope.rope_theta), config.head_dim)
    scaled, _ = inverse_frequencies(config.rope, config.head_dim)
    return (plain / scaled).astype(np.float32)
