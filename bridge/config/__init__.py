"""Configurations: Hugging Face's `config.json` in, one normalised frozen dataclass out.

What follows from one alone is here too: the shape of every tensor (`shapes`), and the bytes that
work takes (`sizes`). Reads no tensor, and knows no form of a checkpoint.
"""

from bridge.config.families import DEFAULTS, FAMILIES
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
from bridge.config.shapes import bridge_shapes, tensor_shapes

__all__ = [
    "DEFAULTS",
    "FAMILIES",
    "MAX_LAYERS",
    "MAX_SIZE",
    "SPEC_VERSION",
    "BridgeConfig",
    "ModelConfig",
    "Quantization",
    "bridge_shapes",
    "parse_bridge",
    "parse_config",
    "parse_quantization",
    "read_config",
    "tensor_shapes",
]
