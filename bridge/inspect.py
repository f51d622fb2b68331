"""What a checkpoint is, from its config and its files' headers alone: sizes, share, memory.

Give it what `open_checkpoint(path, headers_only=True)` opens, and no tensor is ever read.
"""

from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

from bridge.checkpoint import FLOATS, Checkpoint
from bridge.config import tensor_shapes
from bridge.safetensors_io import CODES

WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}  # bytes of an element


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


@dataclass
class TensorGroup:
    """Tensors of one part of the model, over all layers."""

    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    dtypes: list[str] = field(default_factory=list)  # as stored, in order of appearance


@dataclass(frozen=True)
class Summary:
    """Sizes of a checkpoint; parameters count a tied embedding once."""

    checkpoint: Checkpoint
    host_parameters: int
    bridge_parameters: int
    bytes: int  # of all tensors, an adapter's base included
    disk_bytes: int  # of the weight files in the checkpoint's own directory
    groups: dict[str, TensorGroup]  # embedding, attention, FFN, norms, Bridge, head; those there

    @property
    def share(self) -> float:
        """Bridge parameters as a fraction of the host's."""
        return self.bridge_parameters / self.host_parameters

    def memory(self, width: int, prompt: int, new_tokens: int, dtype: str | None = None) -> Memory:
        """For one prompt of `prompt` tokens and `width` rows of `new_tokens` each (clause 4.2).

        `dtype`: float64, float32, bfloat16 or float16, to compute in; None is as stored. Bridge
        blocks keep nothing of past timesteps, so they add nothing to the caches.
        """
        config = self.checkpoint.config
        size = WIDTHS[dtype or self.checkpoint.dtype]
        parameters = self.host_parameters + self.bridge_parameters
        weights = self.bytes if dtype is None else parameters * size
        token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * size
        return Memory(weights, token * prompt, token * width * new_tokens)

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
            "dtype": opened.dtype,
            "bytes": self.bytes,
            "disk_bytes": self.disk_bytes,
            "groups": {name: asdict(group) for name, group in self.groups.items()},
            "adapter_base": str(base.path) if base else None,
        }


def summarise(checkpoint: Checkpoint) -> Summary:
    """Reads no tensor. Raises OSError where a weight file has gone meanwhile."""
    host = tensor_shapes(checkpoint.config.without_bridge())
    both = tensor_shapes(checkpoint.config)
    host_parameters = sum(prod(shape) for shape in host.values())
    groups: dict[str, TensorGroup] = {}
    for name, spec in checkpoint.specs.items():
        group = groups.setdefault(_part(name), TensorGroup())
        group.tensors += 1
        group.parameters += prod(spec.shape)
        group.bytes += spec.nbytes
        if (dtype := FLOATS[CODES[spec.dtype]]) not in group.dtypes:
            group.dtypes.append(dtype)
    files = {file.path for file in checkpoint.tensors.files.values()}
    own = [file for file in files if file.parent == checkpoint.path]
    return Summary(
        checkpoint,
        host_parameters,
        sum(prod(shape) for shape in both.values()) - host_parameters,
        sum(spec.nbytes for spec in checkpoint.specs.values()),
        sum(file.stat().st_size for file in own),
        groups,
    )


def _part(name: str) -> str:
    """The part of the model that a tensor belongs to."""
    for part, mark in (("Bridge", ".bridge."), ("attention", ".self_attn."), ("FFN", ".mlp.")):
        if mark in name:
            return part
    if name == "model.embed_tokens.weight":
        return "embedding"
    return "head" if name == "lm_head.weight" else "norms"
