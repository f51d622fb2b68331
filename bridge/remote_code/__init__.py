"""Code that a checkpoint carries, so that other libraries run its blocks (`convert --remote-code`).

The files beside this one are copied, never imported: each needs its own framework alone, and
`bridge` none. A checkpoint of the form `torch` names its code in `auto_map`, for transformers; one
of the form `mlx` in `model_file`, for mlx-lm.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridge.atomic import new_file
from bridge.errors import BridgeError

FILES = {"torch": "modeling_bridge.py", "mlx": "bridge_mlx_lm.py"}


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
    family = raw_config["model_type"].capitalize()
    classes = {"AutoModelForCausalLM": f"{Path(name).stem}.Bridge{family}ForCausalLM"}
    return {**raw_config, "auto_map": classes}
