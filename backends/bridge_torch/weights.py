"""The weights of a model in the form that is needed: a module that learns, or packed for decoding.

There is one of them. Packing empties the module layer by layer, and whoever is to learn has it
filled again: no copy can be stale, and memory is that of one model. That ends when the module is
lent, since whoever has it may write to its parameters in ways that leave no trace (`.data`, NumPy):
from then on the module stays whole, and is packed anew each time. On CPUs, in the dtypes that have
a blocked layout, that takes about as long as reading a hundred tokens, and the memory of a second
model for as long as something decodes. Elsewhere it takes no memory, and a decoder under way reads
what is written in place.

The module stays whole too where a part of it alone is trained, and where it has low-rank updates,
which a packed form has within its matrices. What changes is told then, and only that is packed
anew: the host of blocks that learn is packed once.
"""

import ctypes
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from bridge.checkpoints.packing import Packed as Stored
from bridge.config import ModelConfig
from bridge.decoding.inputs import check_whole
from bridge_torch.fused import serves
from bridge_torch.model import Transformer
from bridge_torch.narrow import activations, holding
from bridge_torch.packed import Packed, Part
from bridge_torch.packing import fill, pack

EMBEDDING = "model.embed_tokens"


def give_back() -> None:
    """Memory that is free goes back to the system: glibc keeps what lies between pieces in use."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


class Weights:
    """Takes a module over; whoever has it besides should have it lent."""

    def __init__(
        self,
        module: Transformer,
        narrow: str | None = None,
        stored: Mapping[str, Stored] | None = None,
    ) -> None:
        """`narrow`: `int8` or `int4`, what its matrices are made for good (clause 10.5). `stored`:
        the matrices of a checkpoint in 4 bits, which stay so until the module is asked for."""
        self._module, self._lent, self._whole = module, False, module.config.lora is not None
        self._packed: Packed | None = None
        self._changed: set[str] | None = None  # since it was packed, by module; None: nothing
        self.narrow, self._stored = narrow, dict(stored or {})
        if narrow is not None:
            self.packed()

    @property
    def config(self) -> ModelConfig:
        """The model's."""
        return self._module.config

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self._module.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What they are in."""
        return self._module.model.embed_tokens.weight.dtype

    def lend(self) -> Transformer:
        """The module, to keep and to change at any time and in any way."""
        module, self._lent = self.module(), True
        self._packed = None
        return module

    def module(self) -> Transformer:
        """The module, whole, for as long as nothing is packed. Raises BridgeError where its
        matrices were made narrow."""
        check_whole(self.narrow)
        self._stored = {}
        if self._packed is not None and not self._whole:
            parts, packed = self._packed.emptied(), weakref.ref(self._packed)
            self._packed = None
            under_way = packed() is not None  # a decoder goes on with what it began with
            try:
                self._fill(parts, under_way)
            except BaseException:  # a Ctrl-C
                self._fill(parts, under_way)
                raise
        return self._module

    @torch.inference_mode(False)
    @torch.no_grad()
    def _fill(self, parts: list[Part], copy: bool) -> None:
        fill(self._module, parts, copy=copy)
        if copy:
            for name in ("model.embed_tokens.weight", "model.norm.weight"):
                self._module.put(name, self._module.get_parameter(name).clone())

    def train(self, names: Collection[str]) -> Transformer:
        """The module, of which these are to be trained; where they are the smaller part of it, it
        stays whole from now on, beside what is packed."""
        module = self.module()
        sizes = {name: tensor.numel() for name, tensor in module.state_dict().items()}
        if not self._whole and 2 * sum(sizes[name] for name in names) < sum(sizes.values()):
            self._whole = True
        return module

    def changed(self, names: Collection[str]) -> None:
        """These tensors of the module have been written to."""
        modules = {name.partition(".lora_")[0].removesuffix(".weight") for name in names}
        modules = {name.removesuffix(".bias") for name in modules}
        self._changed = modules | (self._changed or set())

    def packed(self) -> Packed:
        """What decoding reads, as the weights are now."""
        before, changed = self._packed, self._changed
        if before is not None and not changed:
            return before
        device = self.device.type
        dtype = activations(self.dtype, serves(device, torch.float32))
        packed = pack(
            self._module,
            dtype=dtype,
            fused=serves(device, dtype),
            consume=not (self._lent or self._whole),
            hold=holding(self.dtype, dtype, self.narrow, self._stored),
            **_unchanged(before, changed or set()),
        )
        if not self._lent:
            self._packed, self._changed = packed, None
            if self.narrow is not None or dtype != self.dtype:
                give_back()  # what was emptied has other sizes than what is held: gaps stay
        return packed

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by checkpoint name, in canonical order, in the plain layout."""
        if self._packed is not None and not self._whole:
            return self._packed.parts()
        return iter(self._module.state_dict().items())


def _unchanged(before: Packed | None, changed: set[str]) -> dict[str, Any]:
    """Of what was packed before, what packing can take over."""
    if before is None:
        return {}
    hosts = (part for layer in before.layers for part in layer.host())
    kept = {part.names: part for part in (*hosts, before.head) if not changed & {*part.names}}
    return {"kept": kept, "embed": None if EMBEDDING in changed else before.embed}
