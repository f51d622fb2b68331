"""Model configurations: Hugging Face's `config.json` in, one normalised frozen dataclass out.

A setting that Bridge does not know, or whose value does not fit, is refused by name, never guessed
(clause 5.9); which settings there are is in `families.py`. Normalised names are Hugging Face's own.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bridge.config.families import DEFAULTS, FAMILIES, SIZES, refuse_unknown
from bridge.config.lora import LoraConfig
from bridge.config.quantization import parse_quantization
from bridge.errors import BridgeError, one_line, show
from bridge.files.strict_json import read_object
from bridge.rope import RopeConfig, parse_rope

SPEC_VERSION = "1.0"
MAX_LAYERS = 4096  # the deepest that is read; a number in a file must not fill the memory
MAX_SIZE = 2**31 - 1


@dataclass(frozen=True)
class BridgeConfig:
    """The added blocks. `kind`: `attention`, or `mlp` for the equal-parameter baseline P-Match."""

    kind: str
    num_heads: int
    head_dim: int
    layers: tuple[int, ...]
    norm_eps: float
    spec_version: str = SPEC_VERSION

    @property
    def inner(self) -> int:
        """E: heads times head width."""
        return self.num_heads * self.head_dim

    def to_json(self) -> dict[str, Any]:
        """The `bridge` object of a config.json."""
        return {
            "spec_version": self.spec_version,
            "kind": self.kind,
            "num_heads": self.num_heads,
            "head_dim": self.head_dim,
            "layers": list(self.layers),
            "norm_eps": self.norm_eps,
        }


@dataclass(frozen=True)
class ModelConfig:
    """A host decoder, and its Bridge blocks if it has any. Names as in Hugging Face configs."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope: RopeConfig
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...] = ()  # a layer each; None sees everything before it
    eos_token_ids: tuple[int, ...] = ()
    bridge: BridgeConfig | None = None
    lora: LoraConfig | None = None  # of files beside config.json (clause 9.13)

    def without_bridge(self) -> "ModelConfig":
        """The plain host."""
        return replace(self, bridge=None)

    def without_lora(self) -> "ModelConfig":
        """The same with its matrices as they are, or with their updates added to them."""
        return replace(self, lora=None)


def read_config(path: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Parse a `config.json`; also gives its raw object, whose own keys a writer keeps."""
    try:
        raw = read_object(path)
    except FileNotFoundError:
        raise BridgeError(f"{path}: no such file; a checkpoint needs a config.json") from None
    return parse_config(raw, str(path)), raw


def parse_config(raw: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """Validate and normalise a Hugging Face config.

    Raises BridgeError, naming `source`, the key and the mend, for an unknown architecture, an
    unknown or unsupported setting, a value of the wrong type, and widths that disagree.
    """
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise BridgeError(
            f"{source}: model_type {show(family)} is not supported (known: {', '.join(FAMILIES)})"
        )
    refuse_unknown(raw, family, source)
    given = {**DEFAULTS[family], **{k: v for k, v in raw.items() if v is not None}}
    if "sliding_window" in raw and raw["sliding_window"] is None:
        given.pop("sliding_window", None)
    for key in SIZES:
        if key not in given:
            raise BridgeError(f"{source}: {key} is missing")
    given.setdefault("num_key_value_heads", given["num_attention_heads"])
    for key in (*SIZES, "num_key_value_heads", "max_position_embeddings"):
        _positive_int(given[key], key, source)
    if given["num_hidden_layers"] > MAX_LAYERS:
        raise BridgeError(f"{source}: num_hidden_layers must be at most {MAX_LAYERS}")
    heads, kv_heads = given["num_attention_heads"], given["num_key_value_heads"]
    if "head_dim" not in given:
        if given["hidden_size"] % heads:
            raise BridgeError(
                f"{source}: hidden_size {given['hidden_size']} is not a multiple of "
                f"num_attention_heads {heads}; set head_dim"
            )
        given["head_dim"] = given["hidden_size"] // heads
    _positive_int(given["head_dim"], "head_dim", source)
    if given["head_dim"] % 2:
        raise BridgeError(f"{source}: head_dim {given['head_dim']} must be even for rope")
    if heads % kv_heads:
        raise BridgeError(
            f"{source}: num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {kv_heads}"
        )
    attention_bias = _flag(given, "attention_bias", source)
    parse_quantization(raw, source)  # says how weights are stored, not what is computed
    return ModelConfig(
        model_type=family,
        **{key: given[key] for key in SIZES},
        num_key_value_heads=kv_heads,
        head_dim=given["head_dim"],
        max_position_embeddings=given["max_position_embeddings"],
        rms_norm_eps=_positive_float(given.get("rms_norm_eps", 1e-6), "rms_norm_eps", source),
        tie_word_embeddings=_flag(given, "tie_word_embeddings", source),
        rope=parse_rope(raw, given["max_position_embeddings"], source),
        qkv_bias=family == "qwen2" or attention_bias,
        o_bias=attention_bias,
        mlp_bias=_flag(given, "mlp_bias", source),
        qk_norm=family == "qwen3",
        sliding_windows=_sliding_windows(given, family, source),
        eos_token_ids=_eos(given.get("eos_token_id"), given["vocab_size"], source),
        bridge=parse_bridge(given.get("bridge"), given["num_hidden_layers"], source),
    )


def parse_bridge(raw: Any, num_layers: int, source: str = "config.json") -> BridgeConfig | None:
    """Validate the `bridge` object; None where the config has none."""
    if raw is None:
        return None
    where = f"{source}: bridge"
    if not isinstance(raw, Mapping):
        raise BridgeError(f"{where} must be an object")
    names = {"spec_version", "kind", "num_heads", "head_dim", "layers", "norm_eps"}
    if missing := sorted(names - raw.keys()):
        raise BridgeError(f"{where}.{missing[0]} is missing")
    if unknown := sorted(raw.keys() - names):
        raise BridgeError(f"{where}.{one_line(unknown[0])} is not known to spec {SPEC_VERSION}")
    if raw["spec_version"] != SPEC_VERSION:
        version = show(raw["spec_version"])
        raise BridgeError(f"{where}.spec_version is {version}, need {SPEC_VERSION!r}")
    if raw["kind"] not in ("attention", "mlp"):
        raise BridgeError(f"{where}.kind must be 'attention' or 'mlp', not {show(raw['kind'])}")
    layers = raw["layers"]
    if not isinstance(layers, list) or not all(type(i) is int for i in layers):
        raise BridgeError(f"{where}.layers must be a list of layer numbers")
    if layers != sorted(set(layers)) or any(not 0 <= i < num_layers for i in layers):
        raise BridgeError(
            f"{where}.layers must be ascending, without repeats, and within 0..{num_layers - 1}"
        )
    return BridgeConfig(
        kind=raw["kind"],
        num_heads=_positive_int(raw["num_heads"], "bridge.num_heads", source),
        head_dim=_positive_int(raw["head_dim"], "bridge.head_dim", source),
        layers=tuple(layers),
        norm_eps=_positive_float(raw["norm_eps"], "bridge.norm_eps", source),
    )


def _sliding_windows(given: Mapping[str, Any], family: str, source: str) -> tuple[int | None, ...]:
    layers = given["num_hidden_layers"]
    window = given.get("sliding_window")
    if family in ("qwen2", "qwen3"):
        window = window or 4096
        if not _flag(given, "use_sliding_window", source):
            window = None
    if window is not None:
        _positive_int(window, "sliding_window", source)
    kinds = given.get("layer_types")
    if kinds is None or family == "mistral":
        first = given.get("max_window_layers", 28) if family != "mistral" else 0
        if type(first) is not int:
            raise BridgeError(f"{source}: max_window_layers must be an integer, not {show(first)}")
        return tuple(window if i >= first else None for i in range(layers))
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise BridgeError(f"{source}: layer_types must list {layers} layers")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise BridgeError(f"{source}: layer_types has unknown kind {show(kind)}")
        if kind == "sliding_attention" and window is None:
            raise BridgeError(f"{source}: layer_types has sliding_attention but no sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _eos(value: Any, vocab_size: int, source: str) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for i in ids:
        if type(i) is not int or not 0 <= i < vocab_size:
            raise BridgeError(
                f"{source}: eos_token_id {show(i)} is not a token of the vocabulary "
                f"0..{vocab_size - 1}"
            )
    return tuple(ids)


def _positive_int(value: Any, key: str, source: str) -> int:
    if type(value) is not int or not 1 <= value <= MAX_SIZE:
        raise BridgeError(f"{source}: {key} must be an integer in 1..{MAX_SIZE}, not {show(value)}")
    return value


def _positive_float(value: Any, key: str, source: str) -> float:
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise BridgeError(f"{source}: {key} must be a positive number, not {show(value)}")
    return float(value)


def _flag(given: Mapping[str, Any], key: str, source: str) -> bool:
    value = given.get(key, False)
    if not isinstance(value, bool):
        raise BridgeError(f"{source}: {key} must be true or false, not {show(value)}")
    return value
