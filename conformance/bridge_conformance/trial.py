"""One backend under test in one dtype, and the comparisons that checks make.

A trial loads the model of a case three times: in the backend, in the reference in the same dtype,
and in the reference in float64, all from the same numbers. A comparison that fails raises
`Nonconformance`, which names clause, case, worst element and allowance.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from bridge.config import ModelConfig
from bridge.contract import Backend, BackendModel
from bridge_conformance.cases import ModelCase
from bridge_conformance.tolerance import DTYPES, allowance, error, proxy, ulp
from bridge_ref.backend import Reference


class Nonconformance(AssertionError):
    """A backend breaks a clause of the spec."""


@dataclass(frozen=True)
class Target:
    """What is tested: a backend, one of its devices, a dtype; and the clause in question."""

    backend: Backend
    device: str
    dtype: str
    clause: str


class Trial:
    """A target on one model case."""

    def __init__(self, target: Target, case: ModelCase):
        self.target, self.case = target, case
        self.dtype = target.dtype

    @cached_property
    def tensors(self) -> dict[str, np.ndarray]:
        """The case's tensors in the dtype under test."""
        return self.case.tensors(self.dtype)

    def load(
        self, config: ModelConfig | None = None, tensors: dict[str, np.ndarray] | None = None
    ) -> BackendModel:
        """A model in the backend under test: of the case, where not said otherwise."""
        config = self.case.config if config is None else config
        tensors = self.tensors if tensors is None else tensors
        target = self.target
        return target.backend.load(config, tensors, device=target.device, dtype=self.dtype)

    @cached_property
    def model(self) -> BackendModel:
        """The case's model in the backend under test."""
        return self.load()

    @cached_property
    def exact(self) -> BackendModel:
        """The case's model in the float64 reference."""
        return self._reference("float64")

    @cached_property
    def rounded(self) -> BackendModel:
        """The case's model in the reference, in the dtype that shows the error of `dtype`."""
        return self._reference(proxy(self.dtype))

    @cached_property
    def nudged(self) -> BackendModel:
        """The float64 reference with every weight moved by half an ulp of `dtype`, up or down."""
        rng = np.random.default_rng(self.case.seed)
        half = ulp(self.dtype) / 2
        tensors = {
            name: array * (1 + half * rng.choice([-1.0, 1.0], size=array.shape))
            for name, array in self.tensors.items()
        }
        return self._reference("float64", tensors)

    def _reference(self, dtype: str, tensors: dict[str, np.ndarray] | None = None) -> BackendModel:
        tensors = self.tensors if tensors is None else tensors
        tensors = {name: array.astype(DTYPES[dtype]) for name, array in tensors.items()}
        reference = Reference()
        device = reference.devices()[0]
        return reference.load(self.case.config, tensors, device=device, dtype=dtype)

    def allowance(
        self, run: Callable[[BackendModel], np.ndarray], cells: Any = ...
    ) -> tuple[np.ndarray, float]:
        """What `run` gives on the float64 reference at `cells`, and the allowance around it."""
        exact = run(self.exact)[cells]
        return exact, allowance(exact, run(self.rounded)[cells], self.dtype)

    def same(self, got: np.ndarray, want: np.ndarray, allowed: float, what: str, case: Any) -> None:
        """Refuse `got` where it is further than `allowed` from `want`; 0 means bit for bit."""
        if got.shape != want.shape:
            raise self.failure(f"{what}: shape {got.shape}, not {want.shape}", case)
        worst = error(got, want)
        if worst <= allowed:
            return
        with np.errstate(invalid="ignore"):
            difference = np.abs(got.astype(np.float64) - want.astype(np.float64))
        at = np.unravel_index(
            np.argmax(np.where(np.isfinite(difference), difference, np.inf)), got.shape
        )
        raise self.failure(
            f"{what}: worst at {tuple(map(int, at))}, {got[at]} against {want[at]}, "
            f"{worst:.3g} apart; allowance {allowed:.3g}",
            case,
        )

    def failure(self, message: str, case: Any) -> Nonconformance:
        """The exception that says what was broken, by which target, on which case."""
        target = self.target
        return Nonconformance(
            f"clause {target.clause}, backend {target.backend.name} on {target.device} "
            f"in {target.dtype}: {message}\ncase: {case}"
        )
