"""Low-rank updates on disk, in the files and under the names that PEFT gives them (clause 9.13).

A directory with `adapter_config.json` and `adapter_model.safetensors` goes in, be it ours or saved
by PEFT; what comes out are a `LoraConfig` and the place of each tensor by our name. Every setting
under which PEFT would compute anything else than clause 5.10 is refused by its key.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bridge.checkpoints.forms import Place
from bridge.checkpoints.safetensors_io import SafetensorsFile
from bridge.checkpoints.tensor_specs import CODES, FLOATS
from bridge.config import TARGETS, LoraConfig, ModelConfig, lora_names, tensor_shapes
from bridge.errors import BridgeError, show
from bridge.files.opening import exists
from bridge.files.strict_json import among, read_object
from bridge.numbers.ranges import RANGES, Range

DIRECTORY = "lora"  # beside `config.json`
SETTINGS, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # before a tensor's name
MERGE = "merge it into the matrices with the library that made it"

# Settings of PEFT that say where an adapter is from, how it was trained or how it began.
FREE = (
    *("auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "lora_dropout"),
    *("megatron_core", "peft_version", "qalora_group_size", "revision", "task_type"),
)
READ = ("peft_type", "r", "lora_alpha", "target_modules", "exclude_modules")
# What else a setting may be, beside nothing at all. Other beginnings change the host's matrices.
PLAIN = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal")}
SIZES: dict[str, Range] = {"r": RANGES["lora_rank"], "lora_alpha": RANGES["lora_alpha"]}


class Update(NamedTuple):
    """Of one matrix: `a [r, in]`, `b [out, r]`, and what their product is multiplied by."""

    a: np.ndarray
    b: np.ndarray
    scale: float

    def added(self, rows: np.ndarray, first: int) -> np.ndarray:
        """Rows of the matrix from row `first` on, with their update: `[n, in]`, float64, so that
        the rounding that follows is the only one (clause 9.13)."""
        part = self.b[first : first + len(rows)].astype(np.float64)
        return rows.astype(np.float64) + self.scale * (part @ self.a.astype(np.float64))


@dataclass(frozen=True)
class Found:
    """Updates as they lie on disk."""

    config: LoraConfig
    places: dict[str, Place]  # by our names


def find_lora(path: Path, config: ModelConfig) -> Found | None:
    """The updates of a checkpoint directory; None where it has none.

    Raises BridgeError, naming file, key or tensor, for what `read_lora` refuses.
    """
    if not exists(path / DIRECTORY):
        return None
    if os.path.islink(path / DIRECTORY):
        raise BridgeError(f"{path / DIRECTORY}: is a link; copy the directory there")
    return read_lora(path / DIRECTORY, config)


def read_lora(directory: Path, config: ModelConfig) -> Found:
    """The updates in a directory that PEFT or `bridge` wrote, for the host that `config` describes.

    Raises BridgeError for a setting under which PEFT computes anything else than clause 5.10; for
    modules that are not the same on every layer; and for a tensor that is missing, not called for,
    of another shape or no float.
    """
    where = directory / SETTINGS
    try:
        raw = read_object(where)
    except FileNotFoundError:
        raise BridgeError(f"{where}: no such file; PEFT's save_pretrained writes one") from None
    lora = parse_lora(raw, config, str(where))
    file = SafetensorsFile(directory / TENSORS)
    shapes = tensor_shapes(replace(config, lora=lora))
    places: dict[str, Place] = {}
    for name in lora_names(replace(config, lora=lora)):
        stored = PREFIX + name
        if stored not in file:
            raise BridgeError(f"{file.path}: tensor {stored!r} is missing; {SETTINGS} calls for it")
        dtype, shape = file.specs[stored]
        if shape != shapes[name]:
            raise BridgeError(
                f"{file.path}: tensor {stored!r} is {list(shape)}, but {SETTINGS} and config.json "
                f"call for {list(shapes[name])}"
            )
        if CODES[dtype] not in FLOATS:
            raise BridgeError(
                f"{file.path}: tensor {stored!r} is {CODES[dtype]}; weights must be one of "
                f"{', '.join(FLOATS)}"
            )
        places[name] = Place(file, stored)
    if left := file.specs.keys() - {place.stored for place in places.values()}:
        raise BridgeError(
            f"{file.path}: tensor {show(min(left))} is not one that {SETTINGS} calls for; updates "
            "are of the host's linear maps alone (clause 5.10)"
        )
    return Found(lora, places)


def parse_lora(raw: Mapping[str, Any], config: ModelConfig, source: str) -> LoraConfig:
    """An `adapter_config.json` as clause 5.10 has it. Raises BridgeError, by the key, for what else
    PEFT would compute under it."""
    if raw.get("peft_type") != "LORA":
        raise BridgeError(
            f"{source}: peft_type {show(raw.get('peft_type'))} is not supported, LORA is"
        )
    for key, value in raw.items():
        if key in (*FREE, *READ) or value is None or among(value, PLAIN.get(key, ())):
            continue
        if key in PLAIN or value not in (False, "", [], {}):
            name = show(key).strip("'")
            raise BridgeError(
                f"{source}: {name} {show(value)} is not supported, since it changes what is "
                f"computed (clause 5.10); {MERGE}"
            )
    sizes = {key: _number(key, raw.get(key, 8), source) for key in SIZES}  # PEFT's default is 8
    targets = _targets(raw, config, source)
    return LoraConfig(sizes["r"], float(sizes["lora_alpha"]), targets)


def peft_config(lora: LoraConfig) -> dict[str, Any]:
    """The `adapter_config.json` of updates: PEFT finds by it the host's modules alone, whose names
    begin where those of blocks do not."""
    alpha = lora.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0,
        "target_modules": [_path(target) for target in lora.targets],
        "exclude_modules": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "use_rslora": False,
    }


def update_of(
    tensors: Mapping[str, np.ndarray], name: str, lora: LoraConfig | None
) -> Update | None:
    """The update of the matrix `name`, read from where it is; None for what has none."""
    stem, _, kind = name.rpartition(".")
    module = stem.split(".", 3)[-1]  # without model.layers.{i}
    if lora is None or kind != "weight" or module not in map(_path, lora.targets):
        return None
    return Update(tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"], lora.scale)


def _path(target: str) -> str:
    """Where in a layer a target is: `self_attn.q_proj`."""
    inside = "self_attn" if target in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    return f"{inside}.{target}"


def _number(key: str, value: Any, source: str) -> Any:
    """`r` or `lora_alpha`, in its range."""
    try:
        return SIZES[key].take(key, value)
    except BridgeError as error:
        raise BridgeError(f"{source}: {error}") from None


def _targets(raw: Mapping[str, Any], config: ModelConfig, source: str) -> tuple[str, ...]:
    """The modules of a layer that PEFT finds in the host, in the order of `TARGETS`."""
    said = raw.get("target_modules")
    if isinstance(said, str) and said.lower() == "all-linear":
        said = list(TARGETS)
    wanted = _names("target_modules", said, source)
    left_out = _names("exclude_modules", raw.get("exclude_modules") or [], source)

    def found(module: str) -> bool:
        suffixes = _suffixes(module)
        return not wanted.isdisjoint(suffixes) and left_out.isdisjoint(suffixes)

    for module in ("model.embed_tokens", "lm_head"):
        if found(module):
            raise BridgeError(
                f"{source}: target_modules finds {module}, which has no update in clause 5.10; "
                f"{MERGE}"
            )
    layers, chosen = config.num_hidden_layers, []
    for target in TARGETS:
        count = sum(found(f"model.layers.{i}.{_path(target)}") for i in range(layers))
        if 0 < count < layers:
            raise BridgeError(
                f"{source}: target_modules finds {target} in {count} of {layers} layers, and "
                f"clause 5.10 has it in all or none; {MERGE}"
            )
        chosen += [target] * (count > 0)
    if not chosen:
        raise BridgeError(
            f"{source}: target_modules finds no module of the host; it has {', '.join(TARGETS)}"
        )
    return tuple(chosen)


def _names(key: str, value: Any, source: str) -> set[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise BridgeError(
            f"{source}: {key} must be a list of modules' names, not {show(value)}; a pattern is "
            "not followed, so list what it finds"
        )
    return set(value)


def _suffixes(module: str) -> list[str]:
    """The names by which PEFT finds a module: its own, and what of it follows a dot."""
    parts = module.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]
