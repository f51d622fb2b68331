"""What the metadata of a GGUF file say of the model, as a Hugging Face config.

Every key of the file's architecture is taken once: into the config, or because its value says
nothing. Any other is refused by name, and so is what no config of our families can say. The names
of keys are llama.cpp's; what they mean is told by how it reads them.
"""

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from bridge.config import MAX_LAYERS
from bridge.errors import BridgeError, one_line, show
from bridge.files.strict_json import among
from bridge.rope import RopeConfig, inverse_frequencies

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Mistral's models are `llama` there
MEND = "start from the model's Hugging Face directory"
SIZES = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}
# Keys that would change the model, with the values under which they do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "final_logit_softcapping": (0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (0, 1),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.finetuned": (True, False),
    "tensor_data_layout": ("Meta AI original pth",),
    "use_parallel_residual": (False,),
}
# What Llama 3.1 and later have: wavelengths between a quarter of a context and a whole are blended.
LOW, HIGH, LENGTH = 1.0, 4.0, 8192


class _Keys:
    """The keys of the architecture, without its name before them, until they are taken."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str, source: str) -> None:
        self.prefix, self.source = f"{architecture}.", source
        self.left = {
            key.removeprefix(self.prefix): value
            for key, value in metadata.items()
            if key.startswith(self.prefix)
        }

    def take(self, key: str, default: Any = None) -> Any:
        """The value of `key`, one for all layers; `default` where it is not there."""
        value = self.left.pop(key, default)
        if isinstance(value, list):
            if len({repr(each) for each in value}) != 1:
                self.refuse(key, f"{show(value)} is not one value for all layers")
            value = value[0]
        return value

    def number(self, key: str, default: float | None = None, kind: str = "number") -> Any:
        """A finite number that is at least 0, `kind` "integer" or "number"."""
        value = self.take(key, default)
        types = (int,) if kind == "integer" else (int, float)
        if value is not None and (type(value) not in types or not 0 <= value < math.inf):
            self.refuse(key, f"must be a {kind}, not {show(value)}")
        return value

    def refuse(self, key: str, why: str) -> NoReturn:
        """Raise the error that names file, key and mend."""
        raise BridgeError(f"{self.source}: {self.prefix}{one_line(key)} {why}; {MEND}")


def config_of(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    factors: np.ndarray | None,
    source: str,
) -> dict[str, Any]:
    """The raw config of a file: `shapes` of its tensors, `factors` those of `rope_freqs.weight`.

    Raises BridgeError, naming `source` and the key, for an architecture that is not supported, and
    for a key that is missing, unknown or of a value that cannot be carried over.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise BridgeError(
            f"{source}: architecture {show(architecture)} is not supported (known: {known})"
        )
    if (kind := metadata.get("general.type", "model")) != "model":
        raise BridgeError(f"{source}: holds {show(kind)} (general.type), not a whole model")
    _refuse_others(metadata, architecture, source)
    keys = _Keys(metadata, architecture, source)
    sizes = {name: keys.number(key, kind="integer") for key, name in SIZES.items()}
    for key, name in SIZES.items():
        if not sizes[name]:
            keys.refuse(key, "is missing")
    layers, heads = sizes["num_hidden_layers"], sizes["num_attention_heads"]
    if layers > MAX_LAYERS:
        keys.refuse("block_count", f"{layers} is above {MAX_LAYERS}")
    head_dim = _head_dim(keys, sizes["hidden_size"], heads)
    window, kinds = _windows(keys, layers, sizes["max_position_embeddings"])
    biases = {name.rsplit(".", 2)[-2] for name in shapes if name.endswith(".bias")}
    family = "mistral" if architecture == "llama" and window else architecture
    raw: dict[str, Any] = {
        "architectures": [CLASSES[family]],
        "model_type": family,
        "dtype": "float32",
        "hidden_act": "silu",
        "vocab_size": _vocabulary(keys, metadata, shapes),
        **sizes,
        "num_key_value_heads": keys.number("attention.head_count_kv", heads, "integer"),
        "head_dim": head_dim,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        # llama.cpp stores a head of its own only where it is not the embedding
        "tie_word_embeddings": "output.weight" not in shapes,
        "rope_parameters": _rope(keys, factors, head_dim),
        **_token_ids(metadata),
    }
    if raw["rms_norm_eps"] is None:
        keys.refuse("attention.layer_norm_rms_epsilon", "is missing")
    if family in ("llama", "qwen3"):
        raw["attention_bias"] = any(name.startswith("attn_") for name in biases)
    if family == "llama":
        raw["mlp_bias"] = any(name.startswith("ffn_") for name in biases)
    if family == "mistral":
        if not all(kind == "sliding_attention" for kind in kinds or ()):
            keys.refuse("attention.sliding_window_pattern", "is not of all layers")
        raw["sliding_window"] = window
    elif window:
        if kinds is None:
            keys.refuse("attention.sliding_window", f"{window} does not say for which layers it is")
        raw |= {"use_sliding_window": True, "sliding_window": window, "layer_types": kinds}
    for key, value in keys.left.items():
        if key not in NEUTRAL:
            keys.refuse(key, f"{show(value)} is not known")
        if not among(value, NEUTRAL[key]):
            keys.refuse(key, f"{show(value)} is not supported")
    return raw


def _refuse_others(metadata: Mapping[str, Any], architecture: str, source: str) -> None:
    """Keys of another architecture than the file says are of nothing that is known."""
    from gguf import MODEL_ARCH_NAMES

    others = {*MODEL_ARCH_NAMES.values(), "adapter"} - {architecture}
    for key in metadata:
        if key.partition(".")[0] in others:
            raise BridgeError(
                f"{source}: {one_line(key)} is not a key of the architecture {architecture}; {MEND}"
            )


def _head_dim(keys: _Keys, hidden: int, heads: int) -> int:
    """The width of a head: all of it is turned, and keys are as wide as values."""
    head_dim = keys.number("attention.key_length", hidden // heads, "integer")
    for key in ("attention.value_length", "rope.dimension_count"):
        if (value := keys.number(key, head_dim, "integer")) != head_dim:
            keys.refuse(key, f"{value} is not the width of a head, {head_dim}, which it must be")
    return head_dim


def _vocabulary(
    keys: _Keys, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> int:
    """The rows of the embedding, which the metadata must agree with."""
    if len(shape := shapes.get("token_embd.weight", ())) != 2:
        raise BridgeError(
            f"{keys.source}: tensor 'token_embd.weight' is missing; copy the file again, or, if it "
            "is one part of several, all of them"
        )
    rows, tokens = shape[0], metadata.get("tokenizer.ggml.tokens", 0)
    if (said := keys.number("vocab_size", rows, "integer")) != rows:
        keys.refuse("vocab_size", f"is {said}, but token_embd.weight has {rows} rows")
    if tokens > rows:
        raise BridgeError(
            f"{keys.source}: tokenizer.ggml.tokens are {tokens}, but token_embd.weight has {rows} "
            f"rows; {MEND}"
        )
    return rows


def _token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Special tokens. llama.cpp ends a response at the end of a text, a turn or a message."""
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    ids["pad"] = metadata.get("tokenizer.ggml.padding_token_id")
    more = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom"))
    ends = list(dict.fromkeys(i for i in (ids["eos"], *more) if i is not None))
    ids["eos"] = ends if len(ends) > 1 else ends[0] if ends else None
    return {f"{name}_token_id": value for name, value in ids.items() if value is not None}


def _windows(keys: _Keys, layers: int, context: int) -> tuple[int, list[str] | None]:
    """The sliding window, 0 where none is in force, and the kinds of the layers where they say."""
    window = keys.number("attention.sliding_window", 0, "integer")
    pattern = keys.left.pop("attention.sliding_window_pattern", None)
    if not window or window >= context or pattern == 1:  # llama.cpp: each first layer is full
        return 0, None
    if pattern is None:
        return window, None
    if type(pattern) is int and pattern >= 0:
        pattern = [pattern == 0 or i % pattern < pattern - 1 for i in range(layers)]
    if not isinstance(pattern, list) or len(pattern) != layers or not {*pattern} <= {False, True}:
        keys.refuse(
            "attention.sliding_window_pattern", f"{show(pattern)} is not of {layers} layers"
        )
    kinds = ["sliding_attention" if sliding else "full_attention" for sliding in pattern]
    return (window, kinds) if any(pattern) else (0, None)


def _rope(keys: _Keys, factors: np.ndarray | None, head_dim: int) -> dict[str, Any]:
    """The settings of rope, in the newer spelling (clause 5.7)."""
    theta = keys.number("rope.freq_base", 10000.0)
    factor = keys.number("rope.scaling.factor") or keys.number("rope.scale_linear") or 1.0
    keys.left.pop("rope.scale_linear", None)
    kind = keys.take("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        keys.refuse("rope.scaling.type", f"{show(kind)} is not supported")
    yarn = {
        "original_max_position_embeddings": keys.number(
            "rope.scaling.original_context_length", kind="integer"
        ),
        "beta_fast": keys.number("rope.scaling.yarn_beta_fast"),
        "beta_slow": keys.number("rope.scaling.yarn_beta_slow"),
    }
    extrapolated = keys.take("rope.scaling.yarn_ext_factor", 1)
    if extrapolated not in (1, -1):  # -1: not said
        keys.refuse("rope.scaling.yarn_ext_factor", f"{show(extrapolated)} is not supported")
    if (value := keys.take("rope.scaling.yarn_attn_factor")) is not None and kind == "yarn":
        why = "is the factor of cos and sin to some writers, and a multiple of yarn's own to others"
        keys.refuse("rope.scaling.yarn_attn_factor", f"{show(value)} {why}")
    if value not in (None, 1):
        keys.refuse("rope.scaling.yarn_attn_factor", f"{show(value)} is not supported")
    settings: dict[str, Any] = {"rope_theta": theta, "rope_type": "default"}
    if kind == "yarn":
        settings |= {"rope_type": "yarn", "factor": factor}
        settings |= {key: value for key, value in yarn.items() if value}
    elif kind == "linear" and factor != 1:
        settings |= {"rope_type": "linear", "factor": factor}
    if factors is None or (factors == 1).all():
        return settings
    if settings["rope_type"] != "default":
        keys.refuse("rope.scaling.type", f"{kind!r} beside rope_freqs.weight is not supported")
    return settings | llama3_of(factors, float(theta), head_dim, keys.source)


def llama3_of(factors: np.ndarray, theta: float, head_dim: int, source: str) -> dict[str, Any]:
    """The settings of `llama3` (clause 5.6) that divide the frequencies by `factors`.

    A file has the numbers `[d / 2]` alone. What Llama 3 has is tried with the greatest as the
    factor, and holds if it gives all of them up to how they were rounded. Raises BridgeError
    otherwise.
    """
    where = f"{source}: rope_freqs.weight"
    if factors.shape != (head_dim // 2,) or not (np.isfinite(factors) & (factors >= 1)).all():
        raise BridgeError(f"{where} must be {head_dim // 2} numbers from 1 on; copy the file again")
    factor, wide = float(factors.max()), factors.astype(np.float64)
    plain, _ = inverse_frequencies(RopeConfig(rope_theta=theta), head_dim)
    kept = (1 / wide - 1 / factor) / (1 - 1 / factor)
    i = int(np.argmin(np.abs(kept - 0.5)))  # the best blended, which tells the length
    turns = LOW + kept[i] * (HIGH - LOW)
    length = round(2 * math.pi * turns / plain[i]) if 0.01 < kept[i] < 0.99 else LENGTH
    rope = RopeConfig("llama3", theta, factor, LOW, HIGH, length)
    ours = plain / inverse_frequencies(rope, head_dim)[0]
    # Written from float32 frequencies, whose error the blend can make `factor` times as large.
    if np.abs(ours / wide - 1).max() > 32 * np.finfo(np.float32).eps * factor:
        raise BridgeError(
            f"{where} is not what llama3 scaling gives with low_freq_factor {LOW:g} and "
            f"high_freq_factor {HIGH:g}, so it cannot be carried over; {MEND}"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LOW,
        "high_freq_factor": HIGH,
        "original_max_position_embeddings": length,
    }
