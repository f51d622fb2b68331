"""What a checkpoint is, from its config and its files' headers alone: sizes, share, memory."""

from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import Any

from bridge.checkpoint import Checkpoint
from bridge.config import tensor_shapes
from bridge.safetensors_io import CODES


@dataclass(frozen=True)
class Memory:
    """Bytes at a width: weights, the prompt's keys and values once, and each row's own."""

    weights: int
    prompt_cache: int
    row_caches: int

    @property
    def total(self) -> int:
        """All of it, without what a step computes in passing."""
        return self.weights + self.prompt_cache + self.row_caches


@dataclass(frozen=True)
class Summary:
    """Sizes of a checkpoint; parameters count a tied embedding once."""

    checkpoint: Checkpoint
    host_parameters: int
    bridge_parameters: int
    bytes: int
    dtypes: dict[str, int]  # tensors by stored dtype

    @property
    def share(self) -> float:
        """Bridge parameters as a fraction of the host's."""
        return self.bridge_parameters / self.host_parameters

    def memory(self, width: int, prompt: int, new_tokens: int) -> Memory:
        """For one prompt of `prompt` tokens and `width` rows of `new_tokens` each, as stored."""
        config = self.checkpoint.config
        itemsize = self.checkpoint.specs["model.embed_tokens.weight"].dtype.itemsize
        token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        return Memory(self.bytes, token * prompt * itemsize, token * width * new_tokens * itemsize)

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        opened = self.checkpoint
        config, base = opened.config, opened.base
        return {
            "path": str(opened.path),
            "model_type": config.model_type,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.max_position_embeddings,
            "rope_type": config.rope.rope_type,
            "tie_word_embeddings": config.tie_word_embeddings,
            "bridge": config.bridge.to_json() if config.bridge else None,
            "host_parameters": self.host_parameters,
            "bridge_parameters": self.bridge_parameters,
            "share": self.share,
            "bytes": self.bytes,
            "dtypes": self.dtypes,
            "adapter_base": str(base.path) if base else None,
        }


def summarise(checkpoint: Checkpoint) -> Summary:
    """Reads no tensor."""
    host = tensor_shapes(checkpoint.config.without_bridge())
    both = tensor_shapes(checkpoint.config)
    host_parameters = sum(prod(shape) for shape in host.values())
    return Summary(
        checkpoint,
        host_parameters,
        sum(prod(shape) for shape in both.values()) - host_parameters,
        sum(spec.nbytes for spec in checkpoint.specs.values()),
        dict(Counter(CODES[spec.dtype] for spec in checkpoint.specs.values())),
    )
