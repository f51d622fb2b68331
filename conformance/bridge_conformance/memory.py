"""What the checks that run on one case share, so that each thing is computed once.

Loading a model and running the reference is most of the work of a check, and compiling is for some
backends. A `Memory` lives as long as a case does; it also keeps how near every comparison came to
its allowance.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import numpy as np

from bridge.contract import BackendModel

Result = TypeVar("Result")


class Memory:
    """Results by key, and the errors of all comparisons in multiples of what was allowed."""

    def __init__(self) -> None:
        self._kept: dict[Any, Any] = {}
        self.errors: list[float] = []

    def once(self, key: Any, make: Callable[[], Result]) -> Result:
        """What `make` gives, made the first time that `key` is asked for."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


class Remembered:
    """A model of the reference that computes no result twice. Trainers change a model's tensors,
    so it makes none."""

    def __init__(self, model: BackendModel) -> None:
        self.model, self.memory = model, Memory()
        self.config, self.device, self.dtype = model.config, model.device, model.dtype

    def block(self, *arguments: Any) -> np.ndarray:
        """As `BackendModel.block`; the array is read-only."""
        return self._once(self.model.block, arguments)

    def logits(self, *arguments: Any) -> np.ndarray:
        """As `BackendModel.logits`; the array is read-only."""
        return self._once(self.model.logits, arguments)

    def norm_ratios(self, *arguments: Any) -> np.ndarray:
        """As `BackendModel.norm_ratios`; the array is read-only."""
        return self._once(self.model.norm_ratios, arguments)

    def loss_and_grads(self, *arguments: Any) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """As `BackendModel.loss_and_grads`."""
        return self._once(self.model.loss_and_grads, arguments)

    def logprobs(self, *arguments: Any) -> np.ndarray:
        """As `BackendModel.logprobs`; the array is read-only."""
        return self._once(self.model.logprobs, arguments)

    def _once(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        def make() -> Any:
            result = function(*arguments)
            if isinstance(result, np.ndarray):
                result.setflags(write=False)
            return result

        return self.memory.once((function.__name__, content(arguments)), make)


def content(value: Any) -> Any:
    """A key that is equal for equal arrays, and for dataclasses and sequences of them."""
    if isinstance(value, np.ndarray):
        return value.dtype.name, value.shape, value.tobytes()
    if is_dataclass(value) and not isinstance(value, type):
        return type(value).__name__, *(content(getattr(value, f.name)) for f in fields(value))
    if isinstance(value, Mapping):
        return tuple((key, content(item)) for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(content(item) for item in value)
    return value
