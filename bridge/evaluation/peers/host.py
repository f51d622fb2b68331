"""The host of a checkpoint as other engines read it: a Hugging Face directory without blocks."""

from pathlib import Path

from bridge.checkpoints.forms import plain_config
from bridge.checkpoints.older_rope import with_older_rope
from bridge.checkpoints.reading import Checkpoint
from bridge.checkpoints.tensors import merged
from bridge.checkpoints.writing import write_checkpoint
from bridge.config import tensor_shapes


def write_host(opened: Checkpoint, out: Path) -> None:
    """Write it as `out`, each tensor in its stored dtype; what is quantised, dequantised, and
    updates added to their matrices (clause 9.13)."""
    config = opened.config.without_bridge().without_lora()
    plain = {k: v for k, v in plain_config(opened.raw_config).items() if k != "bridge"}
    raw = with_older_rope({"rms_norm_eps": config.rms_norm_eps, **plain})  # as mlx-lm wants it
    specs = {name: opened.specs[name] for name in tensor_shapes(config)}
    tensors = ((name, merged(opened.tensors, name, opened.config.lora)) for name in specs)
    write_checkpoint(out, raw, specs, tensors, assets=opened.assets)
