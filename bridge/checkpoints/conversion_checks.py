"""What `bridge convert` refuses: options that do not go together, or not with what is converted.

Everything here is looked at before any tensor is read; each refusal is one line with the mend.
"""

from pathlib import Path

from bridge import remote_code as code
from bridge.checkpoints.forms import PackedPlace
from bridge.checkpoints.lora import DIRECTORY
from bridge.checkpoints.reading import Checkpoint
from bridge.config.quantization import GROUP_SIZES
from bridge.errors import BridgeError, show

BITS = (4, 8)  # to quantise to; more are read


def check_options(
    to: str,
    quantize: int | None,
    group_size: int,
    adapter: bool,
    merge: str | Path | None,
    remote_code: bool,
    quantize_blocks: bool,
) -> None:
    """Refuse what does not go together, before anything is read."""
    if adapter and merge is not None:
        raise BridgeError("adapter and merge exclude each other: blocks alone, or with their host")
    if adapter and remote_code:
        raise BridgeError("remote_code: an adapter carries no code; leave one of the two out")
    if remote_code and to not in code.FILES:
        raise BridgeError(f"remote_code: there is none for the form {to!r}; use --to torch or mlx")
    if quantize is None:
        if quantize_blocks:
            raise BridgeError("quantize_blocks needs quantize; give its bits")
        return
    if to != "mlx":
        raise BridgeError(f"quantize: the form {to!r} stores no quantised weights; use --to mlx")
    if quantize not in BITS or type(quantize) is not int:
        raise BridgeError(f"quantize: bits must be 4 or 8, not {show(quantize)}")
    if group_size not in GROUP_SIZES:
        known = ", ".join(map(str, GROUP_SIZES))
        raise BridgeError(f"group_size must be one of {known}, not {show(group_size)}")
    if adapter and not quantize_blocks:
        raise BridgeError("quantize: blocks are left as they are; add --quantize-blocks")


def check_updates(
    opened: Checkpoint,
    to: str,
    quantize: int | None,
    adapter: bool,
    remote_code: bool,
    merge_lora: bool,
) -> None:
    """Refuse what does not go together with low-rank updates, or needs some."""
    where, sources = opened.path, opened.tensors.sources.items()
    if opened.config.lora is None:
        if merge_lora:
            raise BridgeError(f"{where}: has no updates to merge (no {DIRECTORY}); leave it out")
    elif adapter and merge_lora:
        raise BridgeError(
            "merge_lora: an adapter leaves the host as it is; leave one of the two out"
        )
    elif merge_lora and to == "mlx" and any(isinstance(s, PackedPlace) for _, s in sources):
        raise BridgeError(
            f"{where}: is quantised, and merging would do so twice; convert it --to torch, where "
            "merging gives whole matrices, and quantise those"
        )
    elif quantize is not None and not merge_lora and not adapter:
        raise BridgeError(f"{where}: has updates of what would be quantised; add --merge-lora")
    elif remote_code and not merge_lora:
        raise BridgeError(
            f"{where}: has updates, which other libraries' code of the blocks does not read; add "
            "--merge-lora"
        )


def keep_apart(dst: Path, other: Path) -> None:
    """Refuse to write into, or over, what is read."""
    target, source = dst.resolve(), other.resolve()
    if target == source:
        raise BridgeError(f"{dst}: is what is converted; choose another name")
    if source in target.parents:
        raise BridgeError(f"{dst}: lies inside of {other}, which is read; choose a place beside it")
    if target in source.parents:
        raise BridgeError(f"{dst}: holds {other}, which is read; choose another name")
