"""The most memory that training takes at once, by parts, from a config and sizes alone.

No weight is read and nothing is run, so a host of any size on a device of any size can be asked
about. What is counted is what clauses 7.11, 7.14 and 7.15 leave to keep: cells that are computed,
of each layer the tensors that its backward pass reads, and logits of a chunk of targets. A backend
that keeps more, or a framework's own memory, comes on top.
"""

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from math import prod

from bridge.config import ModelConfig, bridge_shapes, tensor_shapes
from bridge.config.sizes import WIDTHS, cache_bytes, step_bytes
from bridge.decoding.targets import LOSS_CHUNK

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Load:
    """What a run computes at once, as far as its memory depends on it."""

    cells: int  # computed, of a micro-batch
    alone: int  # of them, those that rows have for themselves
    targets: int  # of a micro-batch
    micro_batches: int = 1  # of an update
    checkpoint_activations: bool = False
    loss_chunk: int = LOSS_CHUNK
    temperature: float = 1.0
    prompts: tuple[int, ...] = ()  # that are decoded at once: tokens of each; (): none is
    width: int = 1
    new_tokens: int = 1
    packed: bool = False  # whether decoding reads a copy of the weights, as it does on CPUs


@dataclass(frozen=True)
class Peak:
    """Bytes at once. `kept` is there all the time; of `rollout` and `update` one at a time."""

    kept: dict[str, int] = field(default_factory=dict)
    rollout: dict[str, int] = field(default_factory=dict)
    update: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """The most at once."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        """What the total is the sum of."""
        passing = max(self.rollout, self.update, key=lambda parts: sum(parts.values()))
        return {name: value for name, value in {**self.kept, **passing}.items() if value}

    def to_json(self) -> dict[str, dict[str, int]]:
        """For machines."""
        return asdict(self)


def peak(config: ModelConfig, dtype: str, trained: Collection[str], load: Load) -> Peak:
    """Of a run that trains the tensors named in `trained`, on a device that computes in `dtype`."""
    shapes = tensor_shapes(config)
    narrow, wide = WIDTHS[dtype], max(4, WIDTHS[dtype])
    weights = narrow * sum(map(prod, shapes.values()))
    learnt = sum(prod(shapes[name]) for name in trained)
    kept = {
        "weights": weights,
        "packed weights": weights if load.packed and load.prompts else 0,
        "masters": wide * learnt,
        "moments": 2 * wide * learnt,
    }
    rollout = {}
    if load.prompts:
        widths = (load.width,) * len(load.prompts)
        length = max(load.prompts) + load.new_tokens
        rollout = {
            "keys and values": cache_bytes(config, dtype, load.prompts, widths, load.new_tokens),
            "a decoding step": step_bytes(config, dtype, sum(widths), load.width, length),
        }
    return Peak(kept, rollout, _update(config, dtype, trained, load))


def _update(
    config: ModelConfig, dtype: str, trained: Collection[str], load: Load
) -> dict[str, int]:
    """Of an update, the moment that takes most: that of the loss, with all activations there and
    the gradients of what is as wide as the vocabulary; the beginning of the backward pass; or its
    end, with all gradients there."""
    shapes, wide = tensor_shapes(config), max(4, WIDTHS[dtype])
    ends = [n for n in (EMBEDDING, HEAD) if n in trained]
    if config.tie_word_embeddings or load.micro_batches > 1:
        first = trained if load.micro_batches > 1 else ends
    else:
        first = [n for n in ends if n == HEAD]
    early, late = (wide * sum(prod(shapes[n]) for n in names) for names in (first, trained))
    activations, layer = _activations(config, dtype, trained, load)
    passing = WIDTHS[dtype] * load.cells * (2 * config.hidden_size + 2 * config.intermediate_size)
    moments = (
        {
            "gradients": early,
            "activations": activations,
            "logits": _logits(config, dtype, load, ends),
        },
        {"gradients": early, "activations": activations + layer, "a layer in passing": passing},
        {"gradients": late, "activations": layer, "a layer in passing": passing},
    )
    return max(moments, key=lambda parts: sum(parts.values()))


def _logits(config: ModelConfig, dtype: str, load: Load, ends: Collection[str]) -> int:
    """A chunk's logits and their log-softmax, wide, and as the head gave them; or the gradient of
    logits and, in a narrow dtype, of the head before it is added up."""
    narrow, wide, V = WIDTHS[dtype], max(4, WIDTHS[dtype]), config.vocab_size
    chunk = min(load.loss_chunk, load.targets)
    forward = 2 * wide + (narrow if narrow < wide else 0) + (wide if load.temperature != 1 else 0)
    head = HEAD in ends or (config.tie_word_embeddings and EMBEDDING in ends)
    product = narrow * V * config.hidden_size if head and narrow < wide else 0
    return max(forward * chunk * V, narrow * chunk * V + product)


def _activations(
    config: ModelConfig, dtype: str, trained: Collection[str], load: Load
) -> tuple[int, int]:
    """What the layers keep for the backward pass, and what is computed again of one of them at a
    time. Nothing is kept below the first layer that learns."""
    narrow, D = WIDTHS[dtype], config.hidden_size
    asked, kept, largest = set(trained), 0, 0
    below = EMBEDDING in asked
    for i in range(config.num_hidden_layers):
        blocks = bridge_shapes(config, i)
        host = any(n.startswith(f"model.layers.{i}.") and n not in blocks for n in asked)
        own = _layer(config, host) * load.cells if below or host else 0
        if blocks and (below or host or not asked.isdisjoint(blocks)):
            assert config.bridge is not None
            E = config.bridge.inner
            own += load.cells * (2 * D + E) + load.alone * 4 * E
        below |= bool(own)
        kept += load.cells * D if load.checkpoint_activations and own else own
        largest = max(largest, own)
    ends = 3 * load.cells * D  # what the layers read and give, and the gradient that goes back
    again = largest if load.checkpoint_activations else 0
    return narrow * (kept + ends), narrow * again


def _layer(config: ModelConfig, learns: bool) -> int:
    """Numbers that a host layer keeps a cell: what its norms, attention and FFN read; and if its
    matrices learn, what these read too."""
    D, F, d = config.hidden_size, config.intermediate_size, config.head_dim
    attention = 2 * d * (config.num_attention_heads + config.num_key_value_heads)
    return attention + (4 * D + 3 * F if learns else 2 * D + 2 * F)


def first_to_lower(parts: dict[str, int], dtype: str, load: Load, host_learns: bool) -> str:
    """The setting that brings the most of a peak's `parts` down, and how; "" where none does."""
    learning = sum(parts.get(name, 0) for name in ("masters", "moments", "gradients"))
    passing = parts.get("activations", 0) + parts.get("a layer in passing", 0)
    decoding = parts.get("keys and values", 0) + parts.get("a decoding step", 0)
    mend = "micro_batch_tokens" if load.checkpoint_activations else "checkpoint_activations = true"
    choices = {
        mend: passing,
        "loss_chunk": parts.get("logits", 0),
        "max_rows": decoding,
        "trainable = bridge": learning if host_learns else 0,
        "dtype = bfloat16": parts["weights"] if WIDTHS[dtype] > 2 else 0,
    }
    best = max(choices, key=lambda name: choices[name])
    return best if choices[best] else ""
