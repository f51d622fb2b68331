"""Code that a checkpoint carries, so that other libraries run its blocks (`convert --remote-code`).

The files beside this one are copied, never imported: each needs its own framework alone, and
`bridge` none. A checkpoint of the form `torch` names its code in `auto_map`, for transformers, and
its class in `architectures`, by which trainers choose what they load from a path; one of the form
`mlx` names its code in `model_file`, for mlx-lm.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridge.errors import BridgeError
from bridge.files.atomic import new_file

FILES = {"torch": "modeling_bridge.py", "mlx": "bridge_mlx_lm.py"}
MODULE = Path(FILES["torch"]).stem
OURS = "Bridge"  # before the name of a host's class


def add(directory: Path, raw_config: Mapping[str, Any], form: str) -> dict[str, Any]:
    """Write the code of a form into `directory`; gives the config with the key that names it.

    Raises BridgeError for a form that no library reads with code, and for a plain host.
    """
    if form not in FILES:
        raise BridgeError(f"remote code: none is for the form {form!r}; use {' or '.join(FILES)}")
    if raw_config.get("bridge") is None:
        raise BridgeError(
            "remote code: the checkpoint has no blocks, so it needs none; leave it out"
        )
    name = FILES[form]
    with (Path(__file__).parent / name).open("rb") as source, new_file(directory / name) as target:
        shutil.copyfileobj(source, target)
    if form == "mlx":
        return {**raw_config, "model_file": name}
    ours = OURS + class_of(raw_config)
    classes = {"AutoModelForCausalLM": f"{MODULE}.{ours}"}
    return {**raw_config, "auto_map": classes, "architectures": [ours]}


def without(raw_config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without what `add` put there, the host's class named again (clause 9.12). Code of
    others stays."""
    kept, keys = dict(raw_config), list(raw_config)
    classes = kept.get("auto_map")
    if isinstance(classes, dict) and all(str(c).startswith(MODULE + ".") for c in classes.values()):
        del kept["auto_map"]
    if kept.get("model_file") == FILES["mlx"]:
        del kept["model_file"]
    if kept.get("architectures") == [OURS + class_of(kept)]:
        kept["architectures"] = [class_of(kept)]
        if keys[-2:] == ["auto_map", "architectures"]:  # `add` found none
            del kept["architectures"]
    return kept


def class_of(raw_config: Mapping[str, Any]) -> str:
    """transformers' name for the class of a host."""
    return f"{raw_config['model_type'].capitalize()}ForCausalLM"
