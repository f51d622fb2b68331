"""The reference as a backend (chapter 10): what all others are compared with.

Runs anywhere NumPy does, in float64 by default. A model is a config and a dict of arrays; all that
it can do is a function of the modules beside this one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from bridge.config import ModelConfig, tensor_shapes
from bridge.contract import AdamW, Batch, Objective, Sampling
from bridge.decoding.inputs import (
    check_block,
    check_loss_chunk,
    check_swap,
    check_weights,
    check_whole,
    take_tensor,
)
from bridge.errors import BridgeError
from bridge_ref.block import bridge_block
from bridge_ref.decode import CachedDecoder
from bridge_ref.linear import stands_for
from bridge_ref.losses import Metrics
from bridge_ref.model import block_weights, forward, norm_ratios
from bridge_ref.narrow import NarrowTensors
from bridge_ref.precision import DTYPES
from bridge_ref.trace import Watched, watch
from bridge_ref.train import ReferenceTrainer, logprobs, loss_and_grads


class Reference:
    """The backend `numpy`."""

    name = "numpy"

    def devices(self) -> list[str]:
        """Only the CPU."""
        return ["cpu"]

    def dtypes(self, device: str) -> list[str]:
        """All that the spec knows, float64 first."""
        return list(DTYPES)

    def weights(self, device: str) -> list[str]:
        """What matrices can be made (clause 10.5)."""
        return ["int8", "int4"]

    def load(
        self,
        config: ModelConfig,
        tensors: Mapping[str, np.ndarray],
        *,
        device: str,
        dtype: str,
        weights: str | None = None,
    ) -> "ReferenceModel":
        """A model in `dtype`, with arrays of its own, read one at a time. Raises BridgeError for
        an unknown device, dtype or weights, and for a tensor that is missing or has another
        shape."""
        if device not in self.devices():
            raise BridgeError(f"backend numpy: no device {device!r}; use cpu")
        if dtype not in DTYPES:
            raise BridgeError(f"backend numpy: no dtype {dtype!r}; use one of {', '.join(DTYPES)}")
        check_weights(self.name, device, weights, self.weights(device))
        own = {
            name: take_tensor(tensors, name, shape, dtype).astype(DTYPES[dtype])
            for name, shape in tensor_shapes(config).items()
        }
        return ReferenceModel(
            config, own if weights is None else NarrowTensors(own, weights), dtype
        )


class ReferenceModel:
    """A loaded model: see `bridge.contract.BackendModel` for what each method promises."""

    device = "cpu"

    def __init__(self, config: ModelConfig, tensors: dict[str, np.ndarray], dtype: str) -> None:
        """`tensors` in canonical order, all in `dtype`."""
        self.config, self.dtype, self._tensors = config, dtype, tensors
        self._narrow = tensors.weights if isinstance(tensors, NarrowTensors) else None

    def block(
        self, layer: int, hidden: np.ndarray, groups: np.ndarray, active: np.ndarray
    ) -> np.ndarray:
        """Clauses 3.2 to 3.6 and 8.1: `hidden [B, S, D]` in, updated residual out."""
        check_block(self.config, layer)
        bridge = self.config.bridge
        assert bridge is not None
        weights = block_weights(self.config, self._tensors, layer)
        h = hidden.astype(DTYPES[self.dtype])
        return bridge_block(h, groups, active, weights, bridge)[0]

    def logits(
        self, tokens: np.ndarray, groups: np.ndarray, active: np.ndarray, positions: np.ndarray
    ) -> np.ndarray:
        """Teacher-forced logits `[B, S, V]` in float32, or float64 for a float64 model."""
        return forward(self.config, self._tensors, tokens, groups, active, positions)[0]

    def norm_ratios(
        self, tokens: np.ndarray, groups: np.ndarray, active: np.ndarray, positions: np.ndarray
    ) -> np.ndarray:
        """How much each block adds to what it reads (clause 3.9), one a block, wide."""
        return norm_ratios(self.config, self._tensors, tokens, groups, active, positions)

    def watch(
        self,
        tokens: np.ndarray,
        groups: np.ndarray,
        active: np.ndarray,
        positions: np.ndarray,
        drawn: np.ndarray,
        sampling: Sampling,
        progress: Callable[[int, int], None] = lambda done, of: None,
    ) -> Watched:
        """Of the reference alone, and not of the contract: attention weights, norm ratios and
        entropies of a teacher-forced pass, as `bridge_ref.trace.watch` says."""
        return watch(
            self.config, self._tensors, tokens, groups, active, positions, drawn, sampling, progress
        )

    def prefill(
        self,
        prompts: Sequence[np.ndarray],
        widths: Sequence[int],
        max_new_tokens: int,
        prompt_ids: Sequence[int] | None = None,
    ) -> CachedDecoder:
        """Read each prompt once, and start `widths[g]` rows from prompt g (clause 4.2)."""
        return CachedDecoder(
            self.config, self._tensors, prompts, widths, max_new_tokens, prompt_ids
        )

    def free_bytes(self) -> None:
        """None: a CPU has the machine's memory."""

    def loss_and_grads(
        self, batch: Batch, objective: Objective, trainable: Sequence[str]
    ) -> tuple[Metrics, dict[str, np.ndarray]]:
        """Metrics with `loss`, and the gradient of each tensor named in `trainable`, wide."""
        check_whole(self._narrow)
        return loss_and_grads(self.config, self._tensors, batch, objective, trainable)

    def logprobs(self, batch: Batch, temperature: float = 1.0) -> np.ndarray:
        """The log-probability of each target, `[B, S]`, wide; 0 where there is none."""
        return logprobs(self.config, self._tensors, batch, temperature)

    def trainer(
        self,
        objective: Objective,
        optimizer: AdamW,
        trainable: Sequence[str],
        *,
        checkpoint_activations: bool = False,
        loss_chunk: int | None = None,
    ) -> ReferenceTrainer:
        """A trainer that updates this model's `trainable` tensors. It keeps every activation and
        all logits, and computes none again: neither `checkpoint_activations` nor `loss_chunk`
        changes anything here (clauses 7.11 and 7.15)."""
        check_whole(self._narrow)
        check_loss_chunk(loss_chunk)
        return ReferenceTrainer(self.config, self._tensors, objective, optimizer, trainable)

    def swap(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute with these, and give those of the same names that were there (clause 7.16)."""
        given = check_swap(self.config, tensors, self.dtype, self._narrow)
        before = {name: self._tensors[name].copy() for name in given}
        for name, array in given.items():
            self._tensors[name] = array.astype(DTYPES[self.dtype])
        return before

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor by its Hugging Face name, in canonical order, in the model's dtype."""
        for name in tensor_shapes(self.config):
            held = self._tensors
            narrow = isinstance(held, NarrowTensors)
            yield name, stands_for(self.config, held, name) if narrow else held[name].copy()
