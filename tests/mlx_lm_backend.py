"""mlx-lm as a backend of conformance: a directory of the form `mlx` is written, mlx-lm loads it.

With blocks mlx-lm runs the code that the directory carries, without them its own. What it does not
compute is left out of the cases: `suited` says what.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
from mlx_lm.generate import PromptProcessingBatch

from bridge import remote_code
from bridge.checkpoints.packing import Packed, side_names
from bridge.checkpoints.safetensors_io import specs_of, write_safetensors
from bridge_mlx.backend import to_numpy


def write_mlx(
    path: Path,
    raw: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    packings: Mapping[str, Packed] | None = None,
    code: bool = True,
) -> Path:
    """A checkpoint of the form `mlx`, with the code for mlx-lm if `code`."""
    path.mkdir(exist_ok=True)
    stored: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        if (packed := (packings or {}).get(name)) is None:
            stored[name] = array
            continue
        parts = (packed.weight, packed.scales, packed.biases)
        stored |= zip((name, *side_names(name)), parts, strict=True)
        said = {"bits": packed.bits, "group_size": packed.group_size}
        raw = {"quantization": said, **raw}
    config = dict(raw)
    if code:
        config = remote_code.add(path, raw, "mlx")
    files = {"model.safetensors": False, "bridge.safetensors": True}
    for file, blocks in files.items():
        held = {name: array for name, array in stored.items() if (".bridge." in name) == blocks}
        if held:
            write_safetensors(path / file, specs_of(held), held.items(), {"format": "mlx"})
    (path / "config.json").write_text(json.dumps(config))
    return path


def suited(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The config without what mlx-lm lacks, all of which our code refuses by name; and without an
    EOS, since the rows of a case say any token and go on."""
    family = raw["model_type"]
    dropped = {"eos_token_id", "attention_bias" if family == "qwen3" else None}
    raw = {k: v for k, v in raw.items() if k not in dropped}
    if family == "qwen2" and "head_dim" in raw:
        raw["hidden_size"] = raw["num_attention_heads"] * raw.pop("head_dim")
    for key in ("rope_parameters", "rope_scaling"):
        if key in raw:
            beyond = ("attention_factor", "truncate")
            raw[key] = {k: v for k, v in raw[key].items() if k not in beyond}
    return raw


@dataclass
class MlxLm:
    """What conformance asks of a backend, as far as its checks of logits and decoding go."""

    raw: Mapping[str, Any]  # the parsed config does not say all that mlx-lm reads
    code: bool = True  # False: the host alone, by mlx-lm's own model
    name: str = "mlx-lm"

    def load(self, config: Any, tensors: Any, *, device: str, dtype: str) -> "Model":
        """`tensors` may hold some packed."""
        with tempfile.TemporaryDirectory() as path, mx.stream(mx.cpu):
            write_mlx(Path(path), self.raw, tensors, getattr(tensors, "packings", None), self.code)
            model, _ = mlx_lm.utils.load_model(Path(path), trust_remote_code=self.code)
        return Model(model, self.code)


@dataclass
class Model:
    """See `bridge.contract.BackendModel`; positions are those that mlx-lm gives by itself."""

    model: Any
    code: bool = True

    def logits(self, tokens: Any, groups: Any, active: Any, positions: Any) -> np.ndarray:
        """Teacher-forced, without a cache."""
        on = None if active.all() else mx.array(active.tolist())
        options = {"groups": np.asarray(groups).tolist(), "active": on} if self.code else {}
        with mx.stream(mx.cpu):
            out = self.model(mx.array(np.where(active, tokens, 0)), **options)
            return to_numpy(out.astype(mx.float32))

    def prefill(self, prompts: Any, widths: Any, max_new_tokens: int) -> "Decoder":
        """Every row reads its prompt."""
        return Decoder(self.model, prompts, widths)


class Decoder:
    """Rows of groups in mlx-lm's own batch of prompts, from which they are dropped as they end."""

    def __init__(self, model: Any, prompts: Any, widths: Any) -> None:
        self.model = model
        rows = [
            prompt.tolist() for prompt, N in zip(prompts, widths, strict=True) for _ in range(N)
        ]
        caches = [row for N in widths for row in model.make_group(int(N))]
        with mx.stream(mx.cpu):
            batch = PromptProcessingBatch(model, list(range(len(rows))), caches)
            batch.prompt([row[:-1] for row in rows])
        self.cache = batch.prompt_cache
        self.next = self.run([row[-1] for row in rows])

    def run(self, tokens: list[int]) -> np.ndarray:
        """Feeds every row left; which of them are a group, its cache knows."""
        with mx.stream(mx.cpu):
            out = self.model(mx.array(tokens)[:, None], self.cache)[:, -1]
            return to_numpy(out.astype(mx.float32))

    def logits(self) -> np.ndarray:
        """Of the rows left, for their next token."""
        return self.next

    def advance(self, tokens: Any, keep: Any = None) -> None:
        """As `bridge.contract.Decoder`."""
        rows = list(range(len(tokens))) if keep is None else np.flatnonzero(keep).tolist()
        with mx.stream(mx.cpu):
            for cache in self.cache:
                cache.filter(rows)
        self.next = self.run(np.asarray(tokens)[rows].tolist())
