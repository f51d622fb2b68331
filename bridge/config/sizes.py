"""The bytes that work takes, as far as they follow from a config alone."""

from collections.abc import Sequence

from bridge.config.model import ModelConfig

WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}  # bytes of an element


def token_bytes(config: ModelConfig, dtype: str) -> int:
    """Keys and values of a token over all layers (clause 4.2)."""
    heads = config.num_hidden_layers * config.num_key_value_heads
    return 2 * heads * config.head_dim * WIDTHS[dtype]


def kept_bytes(config: ModelConfig, cells: int, dtype: str) -> int:
    """What a forward pass keeps for the backward one at least: one vector a cell and layer."""
    return config.num_hidden_layers * cells * config.hidden_size * WIDTHS[dtype]


def decoding_bytes(
    config: ModelConfig, dtype: str, prompts: Sequence[int], widths: Sequence[int], new_tokens: int
) -> int:
    """Of a batch that is decoded at once: its prompts' caches and its rows', logits, and the scores
    of each two rows of a group (clause 3.4). `prompts`: tokens of each."""
    rows = sum(widths)
    caches = len(prompts) * max(prompts, default=0) + rows * (new_tokens - 1)
    logits = 4 * rows * config.vocab_size
    blocks = config.bridge
    attend = blocks is not None and blocks.kind == "attention" and blocks.layers
    scores = 4 * blocks.num_heads * max(widths, default=0) ** 2 if blocks and attend else 0
    return caches * token_bytes(config, dtype) + logits + scores
