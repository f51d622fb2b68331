"""What a checkpoint is, from its config and its files' headers alone: sizes, share, memory.

No tensor is ever read, and a config without weights is enough: what blocks would add to a host is a
matter of shapes. Whatever the form, sizes on disk are those of the files, packed where they are.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from bridge.checkpoints.forms import BLOCK, LORA, PackedPlace, parts_of
from bridge.checkpoints.initialise import parse_layers
from bridge.checkpoints.reading import Checkpoint, open_checkpoint
from bridge.checkpoints.safetensors_io import InMemory
from bridge.checkpoints.shards import ADAPTER
from bridge.checkpoints.tensor_specs import CODES, FLOATS
from bridge.config import (
    BridgeConfig,
    ModelConfig,
    lora_names,
    parse_config,
    read_config,
    tensor_shapes,
)
from bridge.config.sizes import WIDTHS, token_bytes
from bridge.errors import BridgeError
from bridge.registry import ALIASES

# What the paper's blocks add to its hosts, DeepSeek-R1-Distill Qwen-1.5B, Qwen-7B and Llama-8B.
PAPER_SHARES = (0.028, 0.051)


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
    dtypes: list[str] = field(default_factory=list)  # as stored, such as 4-bit, as they appear


@dataclass(frozen=True)
class Summary:
    """Sizes of a checkpoint, or of what a config calls for; a tied embedding counts once."""

    path: Path
    config: ModelConfig
    dtype: str  # of most of what is stored; of a config alone what it says, or else float32
    host_parameters: int
    bridge_parameters: int
    lora_parameters: int  # of low-rank updates (clause 5.10)
    bytes: int  # of all tensors, an adapter's base included
    disk_bytes: int  # of the weight files in the checkpoint's own directory
    groups: dict[str, TensorGroup]  # embedding, attention, FFN, norms, Bridge, LoRA, head: if any
    tensors: dict[str, dict[str, Any]]  # dtype and shape by name; bits and group_size if packed
    checkpoint: Checkpoint | None = None  # None: a config alone
    planned: bool = False  # whether the blocks are such as could be added

    @property
    def share(self) -> float:
        """Bridge parameters as a fraction of the host's."""
        return self.bridge_parameters / self.host_parameters

    def memory(self, width: int, prompt: int, new_tokens: int, dtype: str | None = None) -> Memory:
        """For one prompt of `prompt` tokens and `width` rows of `new_tokens` each (clause 4.2).

        `dtype`: float64, float32, bfloat16 or float16, to compute in with all weights unpacked;
        None is as stored, packed weights as they are. Bridge blocks keep nothing of past timesteps,
        so they add nothing to the caches.
        """
        parameters = self.host_parameters + self.bridge_parameters + self.lora_parameters
        weights = self.bytes if dtype is None else parameters * WIDTHS[dtype]
        token = token_bytes(self.config, dtype or self.dtype)
        return Memory(weights, token * prompt, token * width * new_tokens)

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        config, opened = self.config, self.checkpoint
        quantization = opened.quantization if opened else None
        return {
            "path": str(self.path),
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
            "lora": asdict(config.lora) if config.lora else None,
            "host_parameters": self.host_parameters,
            "bridge_parameters": self.bridge_parameters,
            "lora_parameters": self.lora_parameters,
            "share": self.share,
            "paper_shares": list(PAPER_SHARES),
            "config_alone": opened is None,
            "planned": self.planned,
            "form": opened.form if opened else None,
            "dtype": self.dtype,
            "quantization": quantization.to_json() if quantization else None,
            "bytes": self.bytes,
            "disk_bytes": self.disk_bytes,
            "groups": {name: asdict(group) for name, group in self.groups.items()},
            "adapter_base": str(opened.base.path) if opened and opened.base else None,
        }


def inspect(
    path: Path,
    base: Path | None = None,
    *,
    heads: int | None = None,
    head_dim: int | None = None,
    kind: str | None = None,
    layers: str | Sequence[int] | None = None,
) -> Summary:
    """A checkpoint directory of any form; or a config alone, as a file or a directory without
    weights, with the blocks that are asked for, or else its own, or else those of `bridge init`.

    `base`: the host of an adapter. Raises BridgeError for what does not fit, and for blocks asked
    of a checkpoint that has weights.
    """
    asked = (heads, head_dim, kind, layers) != (None,) * 4
    if not _is_config_alone(path):
        if asked:
            raise BridgeError(
                f"{path}: has weights, whose blocks are as they are; to see what others would add, "
                f"inspect {path / 'config.json'}"
            )
        return summarise(open_checkpoint(path, base, headers_only=True))
    if base is not None:
        raise BridgeError(f"{path}: is a config alone, so it takes no base")
    where = path / "config.json" if path.is_dir() else path
    config, raw = read_config(where)
    if planned := asked or config.bridge is None:
        chosen = BridgeConfig(
            kind=kind or "attention",
            num_heads=8 if heads is None else heads,
            head_dim=64 if head_dim is None else head_dim,
            layers=parse_layers("all" if layers is None else layers, config.num_hidden_layers),
            norm_eps=config.rms_norm_eps,
        )
        config = parse_config({**raw, "bridge": chosen.to_json()}, str(where))
    said = raw.get("dtype") or raw.get("torch_dtype")
    dtype = ALIASES.get(said, said) if isinstance(said, str) else None
    summary = _config_alone(path, config, dtype if dtype in WIDTHS else "float32")
    return replace(summary, planned=planned)


def summarise(checkpoint: Checkpoint) -> Summary:
    """Of an opened checkpoint. Raises OSError where a weight file has gone meanwhile."""
    tensors: dict[str, dict[str, Any]] = {}
    stored: list[tuple[str, int, str]] = []
    for name, source in checkpoint.tensors.sources.items():
        spec, nbytes = checkpoint.specs[name], checkpoint.tensors.nbytes(name)
        tensors[name] = {"dtype": CODES[spec.dtype], "shape": list(spec.shape)}
        dtype = FLOATS[CODES[spec.dtype]]
        if isinstance(source, PackedPlace):
            tensors[name] |= {"bits": source.how.bits, "group_size": source.how.group_size}
            dtype = f"{source.how.bits}-bit"
        stored.append((name, nbytes, dtype))
    sources = checkpoint.tensors.sources.values()
    files = (place.file for source in sources for place in parts_of(source))
    on_disk = {file.path for file in files if not isinstance(file, InMemory)}
    own = {path for path in on_disk if checkpoint.path in path.parents}
    disk_bytes = sum(file.stat().st_size for file in own)
    summary = _config_alone(checkpoint.path, checkpoint.config, checkpoint.dtype)
    return replace(
        summary,
        bytes=sum(nbytes for _, nbytes, _ in stored),
        disk_bytes=disk_bytes,
        groups=_groups(summary.config, stored),
        tensors=tensors,
        checkpoint=checkpoint,
    )


def _config_alone(path: Path, config: ModelConfig, dtype: str) -> Summary:
    """What a config calls for, stored in `dtype`; nothing is on disk."""
    shapes = tensor_shapes(config)
    size = WIDTHS[dtype]
    plain = config.without_lora()
    host = sum(prod(shape) for shape in tensor_shapes(plain.without_bridge()).values())
    both = sum(prod(shape) for shape in tensor_shapes(plain).values())
    updates = sum(prod(shapes[name]) for name in lora_names(config))
    code = next(code for code, name in FLOATS.items() if name == dtype)
    return Summary(
        path,
        config,
        dtype,
        host_parameters=host,
        bridge_parameters=both - host,
        lora_parameters=updates,
        bytes=(both + updates) * size,
        disk_bytes=0,
        groups=_groups(config, ((name, prod(s) * size, dtype) for name, s in shapes.items())),
        tensors={name: {"dtype": code, "shape": list(shape)} for name, shape in shapes.items()},
    )


def _groups(config: ModelConfig, stored: Iterable[tuple[str, int, str]]) -> dict[str, TensorGroup]:
    """Tensors by part of the model; `stored` gives name, bytes and dtype."""
    shapes = tensor_shapes(config)
    groups: dict[str, TensorGroup] = {}
    for name, nbytes, dtype in stored:
        group = groups.setdefault(_part(name), TensorGroup())
        group.tensors += 1
        group.parameters += prod(shapes[name])
        group.bytes += nbytes
        if dtype not in group.dtypes:
            group.dtypes.append(dtype)
    return groups


def _is_config_alone(path: Path) -> bool:
    """Whether there is a config and no weights. What names weights, of any kind, has them."""
    if path.is_file():
        return path.suffix == ".json"
    if not (path / "config.json").is_file() or (path / ADAPTER).exists():
        return False
    return not any(path.glob("*.safetensors*"))


def _part(name: str) -> str:
    """The part of the model that a tensor belongs to."""
    marks = {"Bridge": BLOCK, "LoRA": LORA, "attention": ".self_attn.", "FFN": ".mlp."}
    for part, mark in marks.items():
        if mark in name:
            return part
    if name == "model.embed_tokens.weight":
        return "embedding"
    return "head" if name == "lm_head.weight" else "norms"
