"""One backend under test in one dtype, and the comparisons that checks make.

A trial loads the model of a case in the backend, in the reference in the same dtype, and in the
reference in float64, all from the same numbers; and in float64 from nudged ones (clause 10.2). A
comparison that fails raises `Nonconformance`, which names clause, case, worst element and
allowance.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from hypothesis.errors import UnsatisfiedAssumption

from bridge.config import ModelConfig
from bridge.contract import Backend, BackendModel
from bridge_conformance.memory import Memory, Remembered
from bridge_conformance.tolerance import DTYPES, NUDGES, allowance, error, proxy, ulp
from bridge_ref.backend import Reference


@dataclass(frozen=True)
class Worst:
    """The element that is furthest from what it should be."""

    what: str
    index: tuple[int, ...]
    got: float
    want: float
    error: float
    ulps: float  # of the dtype under test, at the largest magnitude compared (clause 10.2)
    allowances: float  # the error in multiples of what is allowed


class Nonconformance(AssertionError):
    """A backend breaks a clause of the spec. `message` is its one line without clause and case."""

    def __init__(self, text: str, message: str, worst: Worst | None = None) -> None:
        super().__init__(text)
        self.message, self.worst = message, worst


class Unsuited(UnsatisfiedAssumption):
    """A case proves nothing in this dtype; Hypothesis passes it over."""


@dataclass(frozen=True)
class Target:
    """What is tested: a backend, one of its devices, a dtype; and the clause in question.

    `memory` is shared by the checks that run on the same case; None: every trial has its own.
    """

    backend: Backend
    device: str
    dtype: str
    clause: str = ""
    memory: Memory | None = None


class Trial:
    """A target on one model: a `cases.ModelCase`, or what stands for one."""

    def __init__(self, target: Target, case: Any):
        self.target, self.case = target, case
        self.dtype = target.dtype
        self.memory = target.memory or Memory()

    def _once(self, what: str, make: Callable[[], Any]) -> Any:
        # The case is kept as well, so that no other has its id while this memory lives.
        return self.memory.once((what, id(self.case)), lambda: (self.case, make()))[1]

    @cached_property
    def tensors(self) -> dict[str, np.ndarray]:
        """The case's tensors in the dtype under test."""
        return self._once("tensors", lambda: self.case.tensors(self.dtype))

    def load(
        self, config: ModelConfig | None = None, tensors: dict[str, np.ndarray] | None = None
    ) -> BackendModel:
        """A new model in the backend under test: of the case, where not said otherwise."""
        of: ModelConfig = self.case.config if config is None else config
        tensors = self.tensors if tensors is None else tensors
        target = self.target
        return target.backend.load(of, tensors, device=target.device, dtype=self.dtype)

    @cached_property
    def model(self) -> BackendModel:
        """The case's model in the backend under test; not to be trained."""
        return self._once("model", self.load)

    @cached_property
    def exact(self) -> Any:
        """The case's model in the float64 reference; not to be trained."""
        return self._once("exact", lambda: Remembered(self._exact()))

    @cached_property
    def rounded(self) -> Any:
        """The case's model in the reference, in the dtype that shows the error of `dtype`."""
        return self._once("rounded", lambda: Remembered(self._rounded()))

    @cached_property
    def nudged(self) -> list[Any]:
        """The float64 reference, its every weight moved by an ulp of `dtype`, up or down:
        `NUDGES` times."""
        return self._once("nudged", lambda: [Remembered(model) for model in self._nudged()])

    def references(self) -> list[BackendModel]:
        """New models of the reference: exact, rounded, and all that are nudged."""
        return [self._exact(), self._rounded(), *self._nudged()]

    def _exact(self) -> BackendModel:
        return self._reference("float64", self.tensors)

    def _rounded(self) -> BackendModel:
        return self._reference(proxy(self.dtype), self.tensors)

    def _nudged(self) -> Iterator[BackendModel]:
        rng = np.random.default_rng(self.case.seed)
        unit = ulp(self.dtype)
        for _ in range(NUDGES):
            moved = {
                name: array * (1 + unit * rng.choice([-1.0, 1.0], size=array.shape))
                for name, array in self.tensors.items()
            }
            yield self._reference("float64", moved)

    def _reference(self, dtype: str, tensors: dict[str, np.ndarray]) -> BackendModel:
        tensors = {name: array.astype(DTYPES[dtype]) for name, array in tensors.items()}
        reference = Reference()
        device = reference.devices()[0]
        return reference.load(self.case.config, tensors, device=device, dtype=dtype)

    def allowance(self, run: Callable[[Any], np.ndarray], cells: Any = ...) -> tuple[Any, float]:
        """What `run` gives on the float64 reference at `cells`, and the allowance around it.

        Weights of extreme magnitudes can make a result hang on the last place of every number. Such
        a case proves nothing and is left out: where moving weights by an ulp of the dtype does more
        than twice what the reference's own rounding did.
        """
        exact, own = run(self.exact)[cells], run(self.rounded)[cells]
        nudged = [run(model)[cells] for model in self.nudged]
        allowed = self.allowed(exact, own, nudged)
        if self.case.magnitudes != "plain" and allowed > 2 * allowance(exact, own, self.dtype):
            raise Unsuited
        return exact, allowed

    def allowed(
        self,
        exact: np.ndarray,
        own: np.ndarray,
        nudged: Sequence[np.ndarray],
        largest: float | None = None,
    ) -> float:
        """The allowance around `exact`, as `tolerance.allowance` has it. A case in which the
        reference itself leaves the range of the dtype says nothing of it, and is left out."""
        allowed = allowance(exact, own, self.dtype, nudged=nudged, largest=largest)
        if not np.isfinite(allowed):
            raise Unsuited
        return allowed

    def same(self, got: np.ndarray, want: np.ndarray, allowed: float, what: str, case: Any) -> None:
        """Refuse `got` where it is further than `allowed` from `want`; 0 means bit for bit."""
        if got.shape != want.shape:
            raise self.failure(f"{what}: shape {got.shape}, not {want.shape}", case)
        worst = error(got, want)
        if allowed:
            self.memory.errors.append(worst / allowed)
        if worst <= allowed:
            return
        with np.errstate(invalid="ignore"):
            difference = np.abs(got.astype(np.float64) - want.astype(np.float64))
        at = np.unravel_index(
            np.argmax(np.where(np.isfinite(difference), difference, np.inf)), got.shape
        )
        index, multiples = tuple(map(int, at)), worst / allowed if allowed else np.inf
        finite = np.abs(want.astype(np.float64))[np.isfinite(want.astype(np.float64))]
        unit = ulp(self.dtype) * float(finite.max(initial=0))
        ulps = worst / unit if unit else np.inf
        found = Worst(what, index, float(got[at]), float(want[at]), worst, ulps, multiples)
        near = f"allowance {allowed:.3g}" if allowed else "must agree bit for bit"
        raise self.failure(
            f"{what}: worst at {index}, {got[at]} against {want[at]}, {worst:.3g} apart; {near}",
            case,
            found,
        )

    def failure(self, message: str, case: Any, worst: Worst | None = None) -> Nonconformance:
        """The exception that says what was broken, by which target, on which case."""
        target = self.target
        text = (
            f"clause {target.clause}, backend {target.backend.name} on {target.device} "
            f"in {target.dtype}: {message}\ncase: {case}"
        )
        return Nonconformance(text, message, worst)
