"""Whether an opened checkpoint is what its files say, by readers that are not Bridge's.

Shapes come from the raw config.json, bytes from the safetensors library. Used on what Bridge has
accepted, so the oracle may fail loudly on what it cannot read itself: that is a fault too.
"""

import json
import re
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import deserialize

from bridge.checkpoints.reading import Checkpoint

Arrays = dict[str, np.ndarray]
PEFT = "base_model.model."  # before the names of updates
DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "U32": np.uint32,
}


def disagreement(checkpoint: Checkpoint) -> str | None:
    """What differs, if anything does, between what was opened and what is there."""
    raw = json.loads((checkpoint.path / "config.json").read_text())
    wanted = _shapes(raw)
    stored = _stored(checkpoint)
    if set(checkpoint.tensors) != set(checkpoint.specs):
        return "names of tensors and of specs differ"
    if missing := wanted.keys() - set(checkpoint.tensors):
        return f"config.json wants {sorted(missing)[0]}, which was not given"
    if wrong := _lora_differs(checkpoint, stored):
        return wrong
    for name in checkpoint.tensors:
        array, spec = checkpoint.tensors[name], checkpoint.specs[name]
        if (array.dtype, array.shape) != (spec.dtype, spec.shape):
            return f"{name} is {array.dtype} {array.shape}, but its spec is {spec}"
        if name in wanted and array.shape != wanted[name]:
            return f"{name} is {array.shape}, but config.json says {wanted[name]}"
        if not np.isfinite(array.astype(np.float64)).all():
            return f"{name} is not finite"
        there = _logical(name, raw, stored)
        if there is None:
            return f"{name} is in no file by the safetensors library"
        if (array.dtype, array.shape) != (there.dtype, there.shape):
            return f"{name} is {array.dtype} {array.shape}, not {there.dtype} {there.shape}"
        if array.tobytes() != there.tobytes():
            return f"{name} has other numbers than its file"
    return None


def _stored(checkpoint: Checkpoint) -> Arrays:
    """Every array of the directory, and of the base's, as the safetensors library reads it."""
    found: Arrays = {}
    directories = [checkpoint.path] + ([checkpoint.base.path] if checkpoint.base else [])
    directories += [path / "lora" for path in directories]
    for path in sorted({file.path for file in checkpoint.tensors.files.values()}):
        assert path.parent in directories, f"{path} is outside of {directories}"
        for name, entry in deserialize(path.read_bytes()):
            if entry["dtype"] in DTYPES:
                flat = np.frombuffer(bytes(entry["data"]), DTYPES[entry["dtype"]])
                found[name] = flat.reshape(entry["shape"])
    return found


def _lora_differs(checkpoint: Checkpoint, stored: Arrays) -> str | None:
    """What of the updates is not as PEFT's two files say, by what PEFT does with them."""
    names = {PEFT + name for name in checkpoint.tensors if ".lora_" in name}
    where, lora = checkpoint.path / "lora" / "adapter_config.json", checkpoint.config.lora
    if not where.exists():
        return "there are updates, and no lora" if names or lora else None
    raw = json.loads(where.read_text())
    if lora is None or names != {name for name in stored if name.startswith(PEFT)}:
        return "updates that were given are not those of the file"
    if (lora.rank, lora.alpha) != (raw.get("r", 8), raw.get("lora_alpha", 8)):
        return f"adapter_config.json says r {raw.get('r')} and {raw.get('lora_alpha')}, not {lora}"
    for key in ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern"):
        if raw.get(key):
            return f"adapter_config.json has {key}, which is not what was opened"
    found = [n.rsplit(".lora_A", 1)[0].removeprefix(PEFT) for n in names if ".lora_A." in n]
    wanted = raw["target_modules"]
    if isinstance(wanted, list) and not all(
        any(f".{module}".endswith(f".{name}") for name in wanted) for module in found
    ):
        return f"target_modules {wanted} does not find all of {found}"
    return None


def _logical(name: str, raw: dict[str, Any], stored: Arrays) -> np.ndarray | None:
    """A tensor by its Hugging Face name, wherever it lies: by itself, in a stack, or packed."""
    if ".lora_" in name:
        return stored.get(PEFT + name)
    if (array := _place(name, raw, stored)) is None or array.dtype != np.uint32:
        return array
    path = name.removesuffix(".weight")
    scales, biases = (_place(f"{path}.{side}", raw, stored) for side in ("scales", "biases"))
    assert scales is not None and biases is not None
    inputs = _shapes(raw)[name][1]
    bits = array.shape[1] * 32 // inputs
    stream = np.unpackbits(array.view(np.uint8), axis=1, bitorder="little")
    digits = stream.reshape(len(array), inputs, bits).astype(np.float32)
    q = (digits * 2.0 ** np.arange(bits, dtype=np.float32)).sum(-1, dtype=np.float32)
    q = q.reshape(*scales.shape, -1)
    wide = [side.astype(np.float32)[..., None] for side in (scales, biases)]
    return (q * wide[0] + wide[1]).reshape(len(array), inputs).astype(scales.dtype)


def _place(name: str, raw: dict[str, Any], stored: Arrays) -> np.ndarray | None:
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    if name in stored or found is None:
        return stored.get(name)
    layers = raw["bridge"]["layers"] if ".bridge." in name else range(raw["num_hidden_layers"])
    stack = stored.get(f"model.layers.*.{found[2]}")
    return None if stack is None else stack[list(layers).index(int(found[1]))]


def _shapes(raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors that every family has, by Hugging Face's definition of the config's keys."""
    D, F, layers = (raw[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    heads = raw["num_attention_heads"]
    defaults = {"llama": heads, "qwen2": 32, "qwen3": 32, "mistral": 8}
    kv_heads = raw.get("num_key_value_heads")
    kv_heads = defaults[raw["model_type"]] if kv_heads is None else kv_heads
    width = raw.get("head_dim")
    if width is None:
        width = 128 if raw["model_type"] == "qwen3" else D // heads
    shapes = {"model.embed_tokens.weight": (raw["vocab_size"], D), "model.norm.weight": (D,)}
    if not raw.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (raw["vocab_size"], D)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "self_attn.q_proj.weight"] = (heads * width, D)
        shapes[prefix + "self_attn.k_proj.weight"] = (kv_heads * width, D)
        shapes[prefix + "self_attn.v_proj.weight"] = (kv_heads * width, D)
        shapes[prefix + "self_attn.o_proj.weight"] = (D, heads * width)
        shapes[prefix + "mlp.gate_proj.weight"] = shapes[prefix + "mlp.up_proj.weight"] = (F, D)
        shapes[prefix + "mlp.down_proj.weight"] = (D, F)
    bridge = raw.get("bridge")
    if not bridge:
        return shapes
    for layer in bridge["layers"]:
        prefix, E = f"model.layers.{layer}.bridge.", bridge["num_heads"] * bridge["head_dim"]
        if bridge["kind"] == "attention":
            shapes[prefix + "q_proj.weight"], shapes[prefix + "o_proj.weight"] = (E, D), (D, E)
        else:
            shapes[prefix + "up_proj.weight"] = (2 * E, D)
    return shapes
