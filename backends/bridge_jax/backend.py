"""The backend `jax`: CPUs, CUDA devices and TPUs, in float32, bfloat16 or float16.

NumPy arrays at its borders, JAX inside. A model is a `Transformer`, a dict of parameters and a
config, that pure functions compute with; they are in the modules beside this one, with the same
names as in the other backends.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import jax
import ml_dtypes
import numpy as np

from bridge.config import BridgeConfig, ModelConfig, tensor_shapes
from bridge.contract import AdamW, Batch, Objective
from bridge.decoding.inputs import (
    check_block,
    check_device_and_dtype,
    check_loss_chunk,
    check_swap,
    take_tensor,
)
from bridge.decoding.targets import by_cell
from bridge_jax.adamw import start
from bridge_jax.block import Cells, Grid, Layout, block
from bridge_jax.compiled import bucket, compiled, keep, make_room
from bridge_jax.decode import Decoder
from bridge_jax.leaves import by_name, choose, swap
from bridge_jax.linear import LAYERS
from bridge_jax.model import Params, Transformer, logits, norm_ratios
from bridge_jax.pieces import STEPS
from bridge_jax.train import Trainer, logprobs, loss_and_grads

DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


class JaxBackend:
    """See `bridge.contract.Backend`."""

    name = "jax"

    def devices(self) -> list[str]:
        """Accelerators first, then the CPU."""
        return list(_devices())

    def dtypes(self, device: str) -> list[str]:
        """float32 first on a CPU, bfloat16 on an accelerator. float64 would be a switch of the
        whole process."""
        if device == "cpu":
            return ["float32", "bfloat16", "float16"]
        return ["bfloat16", "float32", "float16"]

    def load(
        self, config: ModelConfig, tensors: Mapping[str, np.ndarray], *, device: str, dtype: str
    ) -> "JaxModel":
        """A model on `device` in `dtype`; `tensors` are read one at a time. Raises BridgeError for
        an unknown device or dtype, and for a tensor that is missing or has another shape."""
        devices = _devices()
        check_device_and_dtype(self.name, device, devices, dtype, DTYPES)
        make_room()
        shapes = tensor_shapes(config)

        def get(name: str) -> np.ndarray:
            return take_tensor(tensors, name, shapes[name], dtype)

        transformer = Transformer(config, get, devices[device], DTYPES[dtype])
        if not transformer.quick:
            keep()
        return JaxModel(transformer, device, dtype)


class JaxModel:
    """See `bridge.contract.BackendModel` for what each method promises."""

    def __init__(self, transformer: Transformer, device: str, dtype: str) -> None:
        self.transformer, self.device, self.dtype = transformer, device, dtype
        self.config = transformer.config

    def block(
        self, layer: int, hidden: np.ndarray, groups: np.ndarray, active: np.ndarray
    ) -> np.ndarray:
        """The Bridge block of one layer: `hidden [B, S, D]` in, updated residual out."""
        check_block(self.config, layer)
        bridge, transformer = self.config.bridge, self.transformer
        assert bridge is not None
        layout = Layout.of(groups, transformer.floor, transformer.floor)
        S = hidden.shape[1]
        short = bucket(S, STEPS) - S
        stream = np.pad(layout.put(hidden.astype(DTYPES[self.dtype])), ((0, 0), (0, short), (0, 0)))
        on = np.pad(layout.put(np.asarray(active)), ((0, 0), (0, short)))
        weights = {k: p for k, p in transformer.params.items() if ".bridge." in k}
        got = block_of_layer(
            weights, layer, stream, layout.grid, on, bridge=bridge, quick=transformer.quick
        )
        return jax.device_get(got)[layout.places, :S]

    def logits(
        self, tokens: np.ndarray, groups: np.ndarray, active: np.ndarray, positions: np.ndarray
    ) -> np.ndarray:
        """Teacher-forced logits `[B, S, V]` in float32."""
        batch, places, table = self.transformer.batch(tokens, groups, active, positions)
        got = logits(
            self.transformer.params, batch, table, config=self.config, quick=self.transformer.quick
        )
        return jax.device_get(got)[places]

    def norm_ratios(
        self, tokens: np.ndarray, groups: np.ndarray, active: np.ndarray, positions: np.ndarray
    ) -> np.ndarray:
        """How much each block adds to what it reads (clause 3.9), one a block, float32."""
        if self.config.bridge is None or not self.config.bridge.layers:
            return np.zeros(0, np.float32)
        batch, _, table = self.transformer.batch(tokens, groups, active, positions)
        got = norm_ratios(
            self.transformer.params, batch, table, config=self.config, quick=self.transformer.quick
        )
        return jax.device_get(got)[list(self.config.bridge.layers)]

    def prefill(
        self,
        prompts: Sequence[np.ndarray],
        widths: Sequence[int],
        max_new_tokens: int,
        prompt_ids: Sequence[int] | None = None,
    ) -> Decoder:
        """Read each prompt once, and start `widths[g]` rows from prompt g (clause 4.2)."""
        return Decoder(self.transformer, prompts, widths, max_new_tokens, prompt_ids)

    def free_bytes(self) -> int | None:
        """What the device can still give; None on a CPU, whose memory is the machine's."""
        device = next(iter(self.transformer.home.device_set))
        stats = device.memory_stats() or {}
        if "bytes_limit" not in stats:
            return None
        return stats["bytes_limit"] - stats["bytes_in_use"]

    def loss_and_grads(
        self, batch: Batch, objective: Objective, trainable: Sequence[str]
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Metrics with `loss`, and the gradient of each tensor named in `trainable`, float32."""
        chosen = choose(self.config, trainable)
        own = {key: self.transformer.params[key] for key, _ in chosen}
        leaves = start(own, chosen=chosen, quick=self.transformer.quick).master
        metrics, grads = loss_and_grads(self.transformer, leaves, chosen, batch, objective)
        return metrics, by_name(grads, self.config, chosen)

    def logprobs(self, batch: Batch, temperature: float = 1.0) -> np.ndarray:
        """The log-probability of each target, `[B, S]` float32; 0 where there is none."""
        return by_cell(logprobs(self.transformer, batch, temperature), batch.target_mask)

    def trainer(
        self,
        objective: Objective,
        optimizer: AdamW,
        trainable: Sequence[str],
        *,
        checkpoint_activations: bool = False,
        loss_chunk: int | None = None,
    ) -> Trainer:
        """A trainer that updates this model's `trainable` tensors in place."""
        some, model = check_loss_chunk(loss_chunk), self.transformer
        return Trainer(model, objective, optimizer, trainable, checkpoint_activations, some)

    def swap(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute with these, and give those that were there (clause 7.16)."""
        given = check_swap(self.config, tensors, self.dtype)
        return swap(self.transformer.params, self.config, given)

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor by its Hugging Face name, in canonical order, in the model's dtype."""
        for name, array in self.transformer.weights.tensors(quick=self.transformer.quick):
            yield name, np.array(array)


@compiled(static_argnames="bridge")
def block_of_layer(
    weights: Params, layer: int, hidden: Any, grid: Grid, active: Any, *, bridge: BridgeConfig
) -> jax.Array:
    """`block` with the weights of one layer of the stack."""
    own = {key.removeprefix(LAYERS): stack[layer] for key, stack in weights.items()}
    stream, cells = hidden.reshape(-1, hidden.shape[-1]), Cells.of_rows(active, grid)
    return block(own, stream, cells, bridge).reshape(hidden.shape)


def _devices() -> dict[str, Any]:
    """This process's devices by name, accelerators first. JAX calls a CUDA device gpu."""
    if "torch" in sys.modules:
        # JAX would take three quarters of a GPU's memory at once, and torch find none. Read when it
        # first looks for devices; what the user says of it stands.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    found = {}
    for number, device in enumerate(jax.local_devices()):
        kind = "cuda" if device.platform == "gpu" else device.platform
        found.setdefault("cpu" if kind == "cpu" else f"{kind}:{number}", device)
    with suppress(RuntimeError):  # JAX_PLATFORMS may leave it out
        found.setdefault("cpu", jax.local_devices(backend="cpu")[0])
    return found
