"""The backend `torch`: CPUs and CUDA devices, in float32, bfloat16, float16 or float64.

NumPy arrays at its borders, torch inside. A model is a `Transformer`, an `nn.Module` with the
checkpoint's names, or while it decodes the same weights packed; what it can do is in the modules
beside this one, with the same names as in the other backends.
"""

from collections.abc import Iterator, Mapping, Sequence

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from bridge.checkpoints.packing import Packed, take_packed
from bridge.config import ModelConfig, lora_names, tensor_shapes
from bridge.contract import AdamW, Batch, Objective
from bridge.decoding.inputs import (
    check_block,
    check_device_and_dtype,
    check_swap,
    check_trainable,
    check_weights,
    take_tensor,
)
from bridge.decoding.rows import only_active
from bridge.decoding.targets import by_cell
from bridge_torch.decode import Decoder
from bridge_torch.model import Transformer
from bridge_torch.narrow import can_hold_int4
from bridge_torch.pieces import Pieces
from bridge_torch.train import Trainer, logprobs, loss_and_grads
from bridge_torch.weights import Weights

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class TorchBackend:
    """See `bridge.contract.Backend`."""

    name = "torch"

    def devices(self) -> list[str]:
        """CUDA devices first, then the CPU."""
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())] + ["cpu"]

    def dtypes(self, device: str) -> list[str]:
        """float32 first on a CPU, bfloat16 on CUDA."""
        if device == "cpu":
            return ["float32", "bfloat16", "float16", "float64"]
        return ["bfloat16", "float32", "float16", "float64"]

    def weights(self, device: str) -> list[str]:
        """What matrices can be made; 4 bits on CPUs that ATen has a kernel for."""
        return ["int8", "int4"] if device == "cpu" and can_hold_int4() else ["int8"]

    def load(
        self,
        config: ModelConfig,
        tensors: Mapping[str, np.ndarray],
        *,
        device: str,
        dtype: str,
        weights: str | None = None,
    ) -> "TorchModel":
        """A model on `device` in `dtype`; `tensors` are read one at a time. What they hold as 4-bit
        integers stays so on CPUs, in bfloat16, which is as exact as ATen's kernel, or if asked for.
        Narrow `weights` are those of matrices with their low-rank updates, which are gone then.
        Raises BridgeError for an unknown device, dtype or weights, and for a tensor that is missing
        or has another shape."""
        check_device_and_dtype(self.name, device, self.devices(), dtype, DTYPES)
        check_weights(self.name, device, weights, self.weights(device))
        if device != "cpu":
            add_up_in_float32()
        shapes = tensor_shapes(config)

        merged = {name.partition(".lora_")[0] + ".weight" for name in lora_names(config)}
        keep = device == "cpu" and (weights or dtype) in ("int4", "bfloat16") and can_hold_int4()
        stored: dict[str, Packed] = {}

        def get(name: str) -> Tensor:
            as_it_is = keep and name not in merged
            packed = take_packed(tensors, name, shapes[name], dtype) if as_it_is else None
            if packed is not None and packed.bits == 4:
                stored[name] = packed
            tensor = from_numpy(take_tensor(tensors, name, shapes[name], dtype))
            return tensor.to(device, DTYPES[dtype])

        module = Transformer.read(config, get)
        if weights is not None and config.lora is not None:
            module.merge_updates()
        return TorchModel(Weights(module, weights, stored))


class TorchModel:
    """See `bridge.contract.BackendModel` for what each method promises."""

    def __init__(self, weights: Weights) -> None:
        self.weights, self.config = weights, weights.config

    @property
    def device(self) -> str:
        """Where it runs."""
        return str(self.weights.device)

    @property
    def dtype(self) -> str:
        """Its own: what decoding computes in is that, or wider."""
        return str(self.weights.dtype).removeprefix("torch.")

    @property
    def transformer(self) -> Transformer:
        """The model as a module, to change in any way that torch knows. From now on each call
        that reads its weights packed packs them anew, since they may have changed."""
        return self.weights.lend()

    @torch.inference_mode()
    def block(
        self, layer: int, hidden: np.ndarray, groups: np.ndarray, active: np.ndarray
    ) -> np.ndarray:
        """The Bridge block of one layer: `hidden [B, S, D]` in, updated residual out."""
        check_block(self.config, layer)
        weights = self.weights.packed()
        block = weights.layers[layer].block
        assert block is not None
        cells = weights.cells(groups, active, np.zeros(active.shape, np.int64))
        h = from_numpy(hidden).to(weights.like)
        return to_numpy(block(h, cells.grid, cells.active).to(self.weights.dtype))

    @torch.inference_mode()
    def logits(
        self, tokens: np.ndarray, groups: np.ndarray, active: np.ndarray, positions: np.ndarray
    ) -> np.ndarray:
        """Teacher-forced logits `[B, S, V]` in float32, or float64 for a float64 model."""
        weights = self.weights.packed()
        cells = weights.cells(groups, active, positions)
        return to_numpy(weights.logits(weights.read(self._ids(tokens, active), cells)))

    @torch.inference_mode()
    def norm_ratios(
        self, tokens: np.ndarray, groups: np.ndarray, active: np.ndarray, positions: np.ndarray
    ) -> np.ndarray:
        """How much each block adds to what it reads (clause 3.9), one a block, wide."""
        weights = self.weights.packed()
        where = (tokens, groups, active, positions)
        return to_numpy(
            weights.norm_ratios(Pieces.of(self.config, weights.rope, weights.like, *where))
        )

    def _ids(self, tokens: np.ndarray, active: np.ndarray) -> Tensor:
        ids = only_active(tokens, active).astype(np.int64)
        return torch.from_numpy(ids).to(self.weights.device)

    def prefill(
        self,
        prompts: Sequence[np.ndarray],
        widths: Sequence[int],
        max_new_tokens: int,
        prompt_ids: Sequence[int] | None = None,
    ) -> Decoder:
        """Read each prompt once, and start `widths[g]` rows from prompt g (clause 4.2)."""
        return Decoder(self.weights.packed(), prompts, widths, max_new_tokens, prompt_ids)

    def free_bytes(self) -> int | None:
        """What the device can still give: to anyone, and what torch holds of it unused."""
        device = self.weights.device
        if device.type != "cuda":
            return None
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)

    def loss_and_grads(
        self, batch: Batch, objective: Objective, trainable: Sequence[str]
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Metrics with `loss`, and the gradient of each tensor named in `trainable`, wide."""
        module = self.weights.module()
        check_trainable(dict(module.named_parameters()), trainable)
        metrics, grads = loss_and_grads(module, trainable, batch, objective)
        return metrics, {name: to_numpy(grad) for name, grad in grads.items()}

    def logprobs(self, batch: Batch, temperature: float = 1.0) -> np.ndarray:
        """The log-probability of each target, `[B, S]` wide; 0 where there is none."""
        weights = self.weights
        model = weights.module() if weights.narrow is None else weights.packed()
        found = to_numpy(logprobs(model, batch, temperature))
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
        how = (checkpoint_activations, loss_chunk)
        return Trainer(self.weights, objective, optimizer, trainable, *how)

    def swap(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute with these in the place of the model's own of the same names, and give those that
        were there (clause 7.16). BridgeError, and nothing changed, for a name that it lacks,
        another shape, and a model whose matrices are integers."""
        given = check_swap(self.config, tensors, self.dtype, self.weights.narrow)
        own = self.weights.module().state_dict()
        before = {name: to_numpy(own[name]).copy() for name in given}
        for name, array in given.items():
            own[name].copy_(from_numpy(array))
        self.weights.changed(given)
        return before

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor by its Hugging Face name, in canonical order, in the model's dtype."""
        for name, part in self.weights.parts():
            yield name, to_numpy(part).copy()


def add_up_in_float32() -> None:
    """Keep CUDA's products of bfloat16 and float16 from rounding parts of a sum before they are
    added, as they may by default: over many cells a gradient would not add up (clause 7.9)."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def from_numpy(array: np.ndarray) -> Tensor:
    """A tensor with memory of its own; bfloat16 too, which NumPy knows through ml_dtypes."""
    array = np.array(array, order="C")
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: Tensor) -> np.ndarray:
    """The same numbers on the host, in the same dtype."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
