"""The backend `mlx`: Metal and CUDA devices, and CPUs, in float32, bfloat16 or float16.

NumPy arrays at its borders, MLX inside. A model is a `Transformer`; what it can do is in the
modules beside this one, with the same names as in the other backends. What a method computes runs
on the model's device and on no other, and the process's default device is left as it was.
"""

from collections.abc import Iterator, Mapping, Sequence

import ml_dtypes
import mlx.core as mx
import numpy as np

from bridge.checkpoints.packing import take_packed
from bridge.config import ModelConfig, tensor_shapes
from bridge.contract import AdamW, Batch, Objective
from bridge.decoding.inputs import check_block, check_device_and_dtype, check_swap, take_tensor
from bridge.decoding.targets import by_cell
from bridge_mlx.block import Grid, Sharing
from bridge_mlx.decode import Decoder
from bridge_mlx.linear import Quantised, chosen, floats
from bridge_mlx.model import Transformer
from bridge_mlx.train import Trainer, choose, logprobs, loss_and_grads

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


class MlxBackend:
    """See `bridge.contract.Backend`."""

    name = "mlx"

    def devices(self) -> list[str]:
        """The GPU first where MLX has one (Metal or CUDA), then the CPU."""
        return ["gpu", "cpu"] if mx.metal.is_available() or mx.cuda.is_available() else ["cpu"]

    def dtypes(self, device: str) -> list[str]:
        """float32 first on a CPU, bfloat16 on a GPU."""
        if device == "cpu":
            return ["float32", "bfloat16", "float16"]
        return ["bfloat16", "float32", "float16"]

    def load(
        self, config: ModelConfig, tensors: Mapping[str, np.ndarray], *, device: str, dtype: str
    ) -> "MlxModel":
        """A model on `device` in `dtype`; `tensors` are read one at a time, and what they hold
        packed (`bridge.checkpoints.packing.HoldsPacked`) stays so. Raises BridgeError for an
        unknown device or dtype, and for a tensor that is missing, has another shape, or holds a
        number that is too large."""
        check_device_and_dtype(self.name, device, self.devices(), dtype, DTYPES)
        shapes = tensor_shapes(config)

        def get(name: str) -> mx.array | Quantised:
            packed = take_packed(tensors, name, shapes[name], dtype)
            if packed is None:
                tensor = take_tensor(tensors, name, shapes[name], dtype)
                return from_numpy(tensor, DTYPES[dtype])
            return Quantised(
                from_numpy(packed.weight, mx.uint32),
                from_numpy(packed.scales, DTYPES[dtype]),
                from_numpy(packed.biases, DTYPES[dtype]),
                packed.bits,
                packed.group_size,
            )

        place = mx.Device(mx.cpu if device == "cpu" else mx.gpu)
        with mx.stream(place):
            return MlxModel(Transformer(config, place, get), device, dtype)


class MlxModel:
    """See `bridge.contract.BackendModel` for what each method promises."""

    def __init__(self, transformer: Transformer, device: str, dtype: str) -> None:
        self.transformer, self.device, self.dtype = transformer, device, dtype
        self.config = transformer.config

    def block(
        self, layer: int, hidden: np.ndarray, groups: np.ndarray, active: np.ndarray
    ) -> np.ndarray:
        """The Bridge block of one layer: `hidden [B, S, D]` in, updated residual out."""
        check_block(self.config, layer)
        block = self.transformer.layers[layer].block
        assert block is not None
        B, S, D = hidden.shape
        with mx.stream(self.transformer.device):
            on = None if active.all() else mx.array(active)
            h = from_numpy(hidden, self.transformer.dtype).reshape(B * S, D)
            return to_numpy(block(h, Sharing.of(Grid.of(groups), on, S)).reshape(B, S, D))

    def logits(
        self, tokens: np.ndarray, groups: np.ndarray, active: np.ndarray, positions: np.ndarray
    ) -> np.ndarray:
        """Teacher-forced logits `[B, S, V]` in float32."""
        with mx.stream(self.transformer.device):
            cells = self.transformer.cells(tokens, groups, active, positions)
            return to_numpy(self.transformer.head(self.transformer.forward(cells)))[cells.places]

    def norm_ratios(
        self, tokens: np.ndarray, groups: np.ndarray, active: np.ndarray, positions: np.ndarray
    ) -> np.ndarray:
        """How much each block adds to what it reads (clause 3.9), one a block, float32."""
        with mx.stream(self.transformer.device):
            cells = self.transformer.cells(tokens, groups, active, positions)
            return to_numpy(self.transformer.norm_ratios(cells))

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
        """What a GPU can still give, with what MLX keeps to use again; None on a CPU."""
        if self.device == "cpu":
            return None
        info = mx.device_info(self.transformer.device)
        if "free_memory" in info:  # CUDA
            return int(info["free_memory"]) + mx.get_cache_memory()
        return max(0, int(info["max_recommended_working_set_size"]) - mx.get_active_memory())

    def loss_and_grads(
        self, batch: Batch, objective: Objective, trainable: Sequence[str]
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Metrics with `loss`, and the gradient of each tensor named in `trainable`, float32."""
        with mx.stream(self.transformer.device):
            leaves = choose(self.transformer, trainable)
            metrics, grads = loss_and_grads(self.transformer, leaves, batch, objective)
            return metrics, {name: to_numpy(grad) for name, grad in grads.items()}

    def logprobs(self, batch: Batch, temperature: float = 1.0) -> np.ndarray:
        """The log-probability of each target, `[B, S]` float32; 0 where there is none."""
        with mx.stream(self.transformer.device):
            found = to_numpy(logprobs(self.transformer, batch, temperature))
        return by_cell(found, batch.target_mask)

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
        return Trainer(
            self.transformer, objective, optimizer, trainable, checkpoint_activations, loss_chunk
        )

    def swap(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute with these in the place of the model's own, and give those that were there
        (clause 7.16). Raises BridgeError, and changes nothing, as `check_swap` says, and for a
        tensor that is packed."""
        taken = check_swap(self.config, tensors, self.dtype)
        with mx.stream(self.transformer.device):
            own = chosen(self.transformer.parts(), taken, "swap")
            before = {name: to_numpy(tensor) for name, tensor in own.items()}
            dtype = self.transformer.dtype
            self.transformer.update({n: from_numpy(x, dtype) for n, x in taken.items()})
        return before

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor by its Hugging Face name, in canonical order, in the model's dtype."""
        parts, ready = self.transformer.parts(), {}
        for name in tensor_shapes(self.config):
            with mx.stream(self.transformer.device):
                while name not in ready:  # the model keeps another order within a layer
                    found, part = next(parts)
                    ready[found] = part
                array = to_numpy(floats(ready.pop(name)))
            yield name, array  # not within: whoever reads this has a default device of their own


def from_numpy(array: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """An evaluated array with memory of its own; from bfloat16 too, as ml_dtypes gives it."""
    array = np.ascontiguousarray(array)
    if array.dtype == ml_dtypes.bfloat16:
        converted = mx.array(array.view(np.uint16)).view(mx.bfloat16).astype(dtype)
    else:
        converted = mx.array(array).astype(dtype)
    mx.eval(converted)
    return converted


def to_numpy(array: mx.array) -> np.ndarray:
    """The same numbers on the host, in the same dtype and in memory of their own."""
    if array.dtype == mx.bfloat16:
        return np.array(array.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.array(array)
