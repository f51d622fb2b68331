"""Which files of a checkpoint directory hold its tensors (clauses 9.4, 9.5 and 9.10).

A directory goes in; what comes out are the files by the names of the tensors stored in them, once
the index, if there is one, and the files agree. Nothing outside of the directory is named.
"""

from pathlib import Path

from bridge.checkpoints.safetensors_io import DAMAGED, SafetensorsFile
from bridge.errors import BridgeError, show
from bridge.files.opening import exists
from bridge.files.strict_json import read_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BLOCKS = "bridge.safetensors"  # beside a host in the mlx form; alone in an adapter
ADAPTER = "bridge_adapter.json"


def is_adapter(path: Path) -> bool:
    """Whether a checkpoint directory holds blocks alone (clause 9.5)."""
    return exists(path / ADAPTER)


def find_tensors(path: Path) -> dict[str, SafetensorsFile]:
    """The file of every tensor in a directory, by its stored name (clauses 9.4 and 9.10).

    The files are those of the index, or else `model.safetensors`; and `bridge.safetensors`.
    """
    single, index, blocks = path / SINGLE, path / INDEX, path / BLOCKS
    weight_map = _read_index(index) if exists(index) else {}
    shards = sorted(set(weight_map.values()))
    if exists(single) and SINGLE not in shards:
        if exists(index):
            raise BridgeError(f"{path}: has both {SINGLE} and {INDEX}; remove one of the two")
        shards.append(SINGLE)
    if exists(blocks) and BLOCKS not in shards:
        shards.append(BLOCKS)
    if not shards:
        lacking = f"no {BLOCKS}" if is_adapter(path) else f"neither {SINGLE} nor {INDEX}"
        raise BridgeError(f"{path}: has {lacking}; copy the weights there")
    indexed = set(weight_map.values())
    found: dict[str, SafetensorsFile] = {}
    for shard in shards:
        file = SafetensorsFile(path / shard)
        for name in file:
            if name in found:
                other = found[name].path.name
                raise BridgeError(f"{path}: tensor {show(name)} is in {other} and in {shard}")
            if shard in indexed and weight_map.get(name) != shard:
                raise BridgeError(f"{path / shard}: tensor {show(name)} is not where {INDEX} says")
            found[name] = file
    for name, shard in weight_map.items():
        if name not in found:
            raise BridgeError(
                f"{path / shard}: lacks tensor {show(name)}, which {INDEX} puts there"
            )
    return found


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = read_object(index)["weight_map"]
        shards = set(weight_map.values())
    except (OSError, KeyError, TypeError, AttributeError):
        raise BridgeError(f"{index}: must be JSON with a weight_map; {DAMAGED}") from None
    for shard in shards:
        plain = isinstance(shard, str) and shard == Path(shard).name and "\\" not in shard
        plain = plain and len(shard) < 256  # as long as a file's name may be
        if not plain or not shard.isprintable() or not shard.endswith(".safetensors"):
            raise BridgeError(
                f"{index}: weight_map names {show(shard)}; it must be a .safetensors file in the "
                "same directory"
            )
    return weight_map
