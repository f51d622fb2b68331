"""The bytes that work takes, as far as they follow from a config alone."""

from collections.abc import Sequence

from bridge.config.model import ModelConfig

WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}  # bytes of an element
# Bytes of a token of the vocabulary while a row draws: its logit and weight, their order, which is
# int64, the sums in that order, and a copy of each.
DRAWN = 32


def token_bytes(config: ModelConfig, dtype: str) -> int:
    """Keys and values of a token over all layers (clause 4.2)."""
    heads = config.num_hidden_layers * config.num_key_value_heads
    return 2 * heads * config.head_dim * WIDTHS[dtype]


def kept_bytes(config: ModelConfig, cells: int, dtype: str) -> int:
    """What a forward pass keeps for the backward one at least: one vector a cell and layer."""
    return config.num_hidden_layers * cells * config.hidden_size * WIDTHS[dtype]


def cache_bytes(
    config: ModelConfig, dtype: str, prompts: Sequence[int], widths: Sequence[int], new_tokens: int
) -> int:
    """Of groups that are decoded at once, keys and values of prompts and of rows' own timesteps,
    where each has the room of the longest. `prompts`: tokens of each."""
    slots = len(prompts) * max(prompts, default=0) + sum(widths) * (new_tokens - 1)
    return slots * token_bytes(config, dtype)


def step_bytes(config: ModelConfig, dtype: str, rows: int, widest: int, length: int) -> int:
    """What a timestep of so many rows computes in passing, in groups of at most `widest` and after
    at most `length` tokens: a layer, and logits and what draws from them."""
    blocks = config.bridge
    attend = blocks is not None and blocks.kind == "attention" and blocks.layers
    between = blocks.num_heads * widest if blocks and attend else 0  # scores (clause 3.4)
    scores = 2 * _wide(dtype) * rows * (config.num_attention_heads * length + between)
    return _layer_bytes(config, dtype, rows) + scores + DRAWN * rows * config.vocab_size


def prefill_bytes(config: ModelConfig, dtype: str, prompts: int, longest: int) -> int:
    """What so many prompts that are read together compute in passing: a layer, and logits. Scores
    of self-attention are taken to come in tiles, so that of those no more is there at once."""
    return _layer_bytes(config, dtype, prompts * longest) + DRAWN * prompts * config.vocab_size


def _layer_bytes(config: ModelConfig, dtype: str, cells: int) -> int:
    """Some ten vectors of the model's width a cell, and three of the FFN's."""
    return cells * (10 * config.hidden_size + 3 * config.intermediate_size) * WIDTHS[dtype]


def _wide(dtype: str) -> int:
    """Bytes of a number that is computed in float32 or wider."""
    return max(4, WIDTHS[dtype])
