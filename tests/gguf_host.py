"""Tiny hosts as GGUF files, as llama.cpp's converter writes them, from models of transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map, quantize
from gguf.constants import GGMLQuantizationType, RopeScalingType
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from bridge.checkpoints.gguf import export_gguf
from bridge.errors import BridgeError

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<eos>", "<bos>", *LETTERS, "ĠĠ", "Ġ1", "11"]  # byte-level, with three merges
SIZES: dict[str, Any] = {
    "vocab_size": len(TOKENS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def host(family: str = "llama", **changes: Any) -> Any:
    """A random model of transformers, whose logits tell each of its settings."""
    config = AutoConfig.for_model(family, **{**SIZES, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model


def factors(config: Any) -> np.ndarray:
    """`rope_freqs.weight` of a llama3 host, from transformers' own frequencies."""
    plain, _ = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return (plain / ROPE_INIT_FUNCTIONS["llama3"](config)[0]).numpy()


def write(path: Path, model: Any, **changes: Any) -> Path:
    """The file of a host, as `write_gguf` does, with the tensor that llama3 needs."""
    if model.config.rope_parameters["rope_type"] == "llama3":
        changes = {"add": {"rope_freqs.weight": factors(model.config)}, **changes}
    return write_gguf(path, model, **changes)


def logits(model: Any, length: int = 40) -> np.ndarray:
    """Logits `[1, S, V]` of some tokens."""
    tokens = torch.from_numpy(np.random.default_rng(0).integers(2, 200, (1, length)))
    with torch.inference_mode():
        return model(tokens).logits.numpy()


def write_gguf(
    path: Path,
    model: Any,
    *,
    drop: tuple[str, ...] = (),
    add: dict[str, np.ndarray] | None = None,
    keys: dict[str, Any] | None = None,
    kind: GGMLQuantizationType | None = None,
    split: int = 0,
) -> Path:
    """Write `model`: without the tensors and keys of `drop`, with those of `add` and `keys`; its
    matrices quantised as `kind`; at most `split` tensors a part. Gives the first part."""
    config, state = model.config, model.state_dict()
    family = "llama" if config.model_type == "mistral" else config.model_type
    arch = next(a for a in MODEL_ARCH if MODEL_ARCH_NAMES[a] == family)
    writer = GGUFWriter(path, family, split_max_tensors=split)
    said = {**metadata(config, family), **tokenizer(), **(keys or {})}
    for key, value in said.items():
        if key not in drop and value is not None:
            put(writer, key, value)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    tensors = {}
    for name, tensor in state.items():
        stem, _, suffix = name.rpartition(".")
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            tensors[f"{names.get_name(stem)}.{suffix}"] = rows(name, tensor.numpy(), config, family)
    kept = {name: array for name, array in tensors.items() if name not in drop}
    for name, array in {**kept, **(add or {})}.items():
        if kind is not None and array.ndim == 2:
            writer.add_tensor(name, quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))[0] if split else path


def put(writer: GGUFWriter, key: str, value: Any) -> None:
    """One key of the metadata; arrays of strings, integers or booleans too."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        if key != "general.architecture":  # which the writer has put already
            writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def rows(name: str, tensor: np.ndarray, config: Any, family: str) -> np.ndarray:
    """Rows of q and k in the order of llama.cpp: for `llama`, pairs that turn together are
    neighbours there."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(name.split(".")[-2]) if family == "llama" else None
    if count is None:
        return tensor
    halves = tensor.reshape(count, 2, tensor.shape[0] // count // 2, *tensor.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(tensor.shape))


def metadata(config: Any, family: str) -> dict[str, Any]:
    """What the converter says of a model."""
    rope = config.rope_parameters
    head_dim = getattr(config, "head_dim", None) or 8
    said = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "vocab_size": config.vocab_size,
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": head_dim,
    }
    if rope["rope_type"] in ("linear", "yarn"):
        said |= {
            "rope.scaling.type": RopeScalingType[rope["rope_type"].upper()].value,
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": rope.get("original_max_position_embeddings"),
            "rope.scaling.yarn_beta_fast": rope.get("beta_fast"),
            "rope.scaling.yarn_beta_slow": rope.get("beta_slow"),
        }
    if window := getattr(config, "sliding_window", None):
        said["attention.sliding_window"] = window
        if family != "llama":
            kinds = config.layer_types
            said["attention.sliding_window_pattern"] = [k == "sliding_attention" for k in kinds]
    return {f"{family}.{key}": value for key, value in said.items()}


def tokenizer() -> dict[str, Any]:
    """A byte-level vocabulary that splits as SmolLM2's does."""
    return {
        "general.name": "tiny",
        "general.file_type": 0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(TOKENS) - 2),
        "tokenizer.ggml.merges": ["Ġ Ġ", "Ġ 1", "1 1"],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
    }


def refused(path: Path, tmp_path: Path, *messages: str) -> None:
    """Export `path`, which must be refused in one line that has `messages`; nothing is written."""
    with pytest.raises(BridgeError) as caught:
        export_gguf(path, tmp_path / "out")
    assert "\n" not in str(caught.value)
    for message in messages:
        assert message in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
