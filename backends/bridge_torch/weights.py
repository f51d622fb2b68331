"""The weights of a model in the form that is needed: a module that learns, or packed for decoding.

There is one of them. Packing empties the module layer by layer, and whoever is to learn has it
filled again: no copy can be stale, and memory is that of one model. That ends when the module is
lent, since whoever has it may write to its parameters in ways that leave no trace (`.data`, NumPy):
from then on the module stays whole, and is packed anew each time. On CPUs, in the dtypes that have
a blocked layout, that takes about as long as reading a hundred tokens, and the memory of a second
model for as long as something decodes. Elsewhere it takes no memory, and a decoder under way reads
what is written in place.
"""

import ctypes
import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress

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
        self._module, self._packed, self._lent = module, None, False
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
        self._lent = True
        return self.module()

    def module(self) -> Transformer:
        """The module, whole, for as long as nothing is packed. Raises BridgeError where its
        matrices were made narrow."""
        check_whole(self.narrow)
        self._stored = {}
        if self._packed is not None:
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

    def packed(self) -> Packed:
        """What decoding reads, as the weights are now."""
        if self._packed is not None:
            return self._packed
        device = self.device.type
        dtype = activations(self.dtype, serves(device, torch.float32))
        packed = pack(
            self._module,
            dtype=dtype,
            fused=serves(device, dtype),
            consume=not self._lent,
            hold=holding(self.dtype, dtype, self.narrow, self._stored),
        )
        if not self._lent:
            self._packed = packed
            if self.narrow is not None or dtype != self.dtype:
                give_back()  # what was emptied has other sizes than what is held: gaps stay
        return packed

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by checkpoint name, in canonical order, in the plain layout."""
        if self._packed is not None:
            return self._packed.parts()
        return iter(self._module.state_dict().items())
