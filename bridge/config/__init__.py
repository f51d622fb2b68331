"""Configurations: Hugging Face's `config.json` in, one normalised frozen dataclass out.

What follows from one alone is here too: the shape of every tensor (`shapes`), and the bytes that
work takes (`sizes`). Reads no tensor, and knows no form of a checkpoint.
"""

from bridge.config.families import DEFAULTS, FAMILIES
from bridge.config.lora import TARGETS, LoraConfig
from bridge.config.model import (
    MAX_LAYERS,
    MAX_SIZE,
    SPEC_VERSION,
    BridgeConfig,
    ModelConfig,
    parse_bridge,
    parse_config,
    read_config,
)
from bridge.config.quantization import Quantization, parse_quantization
from bridge.config.shapes import bridge_shapes, lora_names, tensor_shapes

__all__ = [
    "DEFAULTS",
    "FAMILIES",
    "MAX_LAYERS",
    "MAX_SIZE",
    "SPEC_VERSION",
    "TARGETS",
    "BridgeConfig",
    "LoraConfig",
    "ModelConfig",
    "Quantization",
    "bridge_shapes",
    "lora_names",
    "parse_bridge",
    "parse_config",
    "parse_quantization",
    "read_config",
    "tensor_shapes",
]
