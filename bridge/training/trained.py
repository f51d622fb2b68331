"""What of a checkpoint a run trains, and the low-rank updates that it begins with (clause 8.3).

Settings and an opened checkpoint go in; the checkpoint as the run sees it comes out, and the names
of the tensors that move. Updates that are there already are trained on; others are refused.
"""

from dataclasses import replace

from bridge.checkpoints.forms import LORA, Place
from bridge.checkpoints.initialise import fresh_lora
from bridge.checkpoints.lora import DIRECTORY
from bridge.checkpoints.reading import Checkpoint
from bridge.checkpoints.safetensors_io import InMemory
from bridge.checkpoints.tensor_specs import float_dtype
from bridge.checkpoints.tensors import CheckpointTensors
from bridge.config import TARGETS, LoraConfig, ModelConfig, tensor_shapes
from bridge.errors import BridgeError, show
from bridge.model import trainable_names
from bridge.numbers.rounding import rounded
from bridge.training.settings import Settings

MERGE = "or merge them first: bridge convert --merge-lora"


def with_updates(opened: Checkpoint, settings: Settings) -> Checkpoint:
    """The checkpoint with the fresh updates that are asked for, if any, made by the run's seed.

    Raises BridgeError where it has others already.
    """
    rank, alpha, there = settings.lora_rank, settings.lora_alpha, opened.config.lora
    targets = tuple(name for name in TARGETS if name in (settings.lora_targets or TARGETS))
    if there is None:
        if rank is not None:
            lora = LoraConfig(rank, 2.0 * rank if alpha is None else alpha, targets)
            return _with_fresh(opened, lora, settings.seed)
        if alpha is not None or settings.lora_targets:
            raise BridgeError("lora_alpha and lora_targets are of updates; give lora_rank too")
        return opened
    asked = {
        "rank": there.rank if rank is None else rank,
        "alpha": there.alpha if alpha is None else alpha,
        "targets": targets if settings.lora_targets else there.targets,
    }
    for name, value in asked.items():
        if value != (has := getattr(there, name)):
            raise BridgeError(
                f"lora_{name}: {opened.path} has updates already, with {show(has)}; to train those "
                f"on leave lora_{name} out, {MERGE}"
            )
    return opened


def trained_names(config: ModelConfig, settings: Settings) -> list[str]:
    """The names of what is trained. Raises BridgeError for all of a model with updates, and for
    updates that nothing trains."""
    asked = settings.trained
    if config.lora and asked == "all":
        raise BridgeError(
            f"trainable: the checkpoint has low-rank updates, so train bridge, {MERGE}"
        )
    blocks = config.lora or settings.kind == "sft"
    names = trainable_names(config, asked or ("bridge" if blocks else "all"))
    if settings.lora_rank is not None and not any(LORA in name for name in names):
        raise BridgeError("trainable names no update, so lora_rank is of no use; leave one out")
    return names


def _with_fresh(opened: Checkpoint, lora: LoraConfig, seed: int) -> Checkpoint:
    """A checkpoint without updates, with fresh ones in the dtype of most of its numbers, which are
    in memory until it is saved."""
    config = replace(opened.config, lora=lora)
    dtype = float_dtype(opened.dtype)[1]
    fresh = {n: rounded(array, dtype, n) for n, array in fresh_lora(config, seed).items()}
    held = InMemory(opened.path / DIRECTORY, fresh)
    sources = {**opened.tensors.sources, **{name: Place(held, name) for name in fresh}}
    ordered = {name: sources[name] for name in tensor_shapes(config)}
    return replace(opened, config=config, tensors=CheckpointTensors(ordered))
