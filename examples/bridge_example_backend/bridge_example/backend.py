"""The backend `example`: plain NumPy in float32, on any CPU.

Everything of `bridge.contract` in a few hundred lines, to be read from `block.py` on and copied. It
imports NumPy and `bridge` alone: a port is written against the spec and the contract, never
against another implementation.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from bridge.config import ModelConfig, tensor_shapes
from bridge.contract import AdamW, Batch, Objective
from bridge.decoding.inputs import check_loss_chunk, check_swap, take_tensor
from bridge.errors import BridgeError

from bridge_example.block import Grid, block
from bridge_example.decode import Decoder
from bridge_example.model import Transformer
from bridge_example.tape import Array, Var
from bridge_example.train import Trainer, logprobs, loss_and_grads


class ExampleBackend:
    """See `bridge.contract.Backend`."""

    name = "example"

    def devices(self) -> list[str]:
        return ["cpu"]

    def dtypes(self, device: str) -> list[str]:
        return ["float32"]

    def load(
        self, config: ModelConfig, tensors: Mapping[str, Array], *, device: str, dtype: str
    ) -> "ExampleModel":
        """A model from its tensors, read one at a time. Raises BridgeError for another device or
        dtype, and for a tensor that is missing or has another shape."""
        if device not in self.devices():
            raise BridgeError(f"backend example: no device {device!r}; use cpu")
        if dtype not in self.dtypes(device):
            raise BridgeError(f"backend example: no dtype {dtype!r}; use float32")
        weights = {
            name: Var(np.array(take_tensor(tensors, name, shape, dtype), np.float32))
            for name, shape in tensor_shapes(config).items()
        }
        return ExampleModel(Transformer(config, weights), device, dtype)


class ExampleModel:
    """See `bridge.contract.BackendModel` for what each method promises."""

    def __init__(self, transformer: Transformer, device: str, dtype: str) -> None:
        self.transformer, self.device, self.dtype = transformer, device, dtype
        self.config = transformer.config

    def block(self, layer: int, hidden: Array, groups: Array, active: Array) -> Array:
        bridge = self.config.bridge
        if bridge is None or layer not in bridge.layers:
            raise BridgeError(f"layer {layer} has no Bridge block")
        weights, prefix = self.transformer.weights, f"model.layers.{layer}.bridge"
        h = Var(hidden.astype(np.float32))
        return block(h, weights, prefix, bridge, Grid(groups), active).value

    def logits(self, tokens: Array, groups: Array, active: Array, positions: Array) -> Array:
        h = self.transformer.teacher_forced(tokens, groups, active, positions)
        return self.transformer.logits(h).value

    def norm_ratios(self, tokens: Array, groups: Array, active: Array, positions: Array) -> Array:
        return self.transformer.norm_ratios(tokens, groups, active, positions)

    def prefill(
        self,
        prompts: Sequence[Array],
        widths: Sequence[int],
        max_new_tokens: int,
        prompt_ids: Sequence[int] | None = None,
    ) -> Decoder:
        return Decoder(self.transformer, prompts, widths, max_new_tokens, prompt_ids)

    def free_bytes(self) -> None:
        """None: a CPU has the machine's memory."""

    def loss_and_grads(
        self, batch: Batch, objective: Objective, trainable: Sequence[str]
    ) -> tuple[dict[str, float], dict[str, Array]]:
        return loss_and_grads(self.transformer, batch, objective, trainable)

    def logprobs(self, batch: Batch, temperature: float = 1.0) -> Array:
        return logprobs(self.transformer, batch, temperature)

    def trainer(
        self,
        objective: Objective,
        optimizer: AdamW,
        trainable: Sequence[str],
        *,
        checkpoint_activations: bool = False,
        loss_chunk: int | None = None,
    ) -> Trainer:
        """All logits of targets are made at once here, and a part may be of any size (clause 7.15):
        `loss_chunk` is only looked at."""
        check_loss_chunk(loss_chunk)
        return Trainer(self.transformer, objective, optimizer, trainable, checkpoint_activations)

    def swap(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """Clause 7.16. Arrays are replaced, never written to, so those that were there stay."""
        given = check_swap(self.config, tensors, self.dtype)
        weights = self.transformer.weights
        new = {name: Var(np.array(array, np.float32)) for name, array in given.items()}
        self.transformer.weights = {**weights, **new}
        return {name: weights[name].value.copy() for name in given}

    def tensors(self) -> Iterator[tuple[str, Array]]:
        for name, weight in self.transformer.weights.items():  # in canonical order, as loaded
            yield name, weight.value.copy()
