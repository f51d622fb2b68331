"""Checks of a model's whole life: updates between decodings, states kept, restored and rewound.

What a case's program does is done to the backend and to the reference, in float64, in the dtype
under test and from nudged weights; whatever can be seen on the way is compared (clause 10.2).
"""

from dataclasses import dataclass, field

import numpy as np

from bridge.contract import SFT, BackendModel, Decoder, Sampling
from bridge.philox import uniforms
from bridge_conformance.cases_life import NEW, RATES, REQUESTS, Do, LifeCase
from bridge_conformance.checks_decode import acceptable_tokens, spoil
from bridge_conformance.checks_train import OPTIMIZER
from bridge_conformance.trial import Target, Trial

STATE = ("step", "master.", "exp_avg.", "exp_avg_sq.")


@dataclass
class Kept:
    """Arrays that were handed out, which are no longer the model's to change."""

    what: str
    arrays: dict[str, np.ndarray]
    before: dict[str, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        self.before = {name: array.copy() for name, array in self.arrays.items()}

    def changed(self) -> str | None:
        """The name of one that is not as it was."""
        pairs = ((name, array, self.before[name]) for name, array in self.arrays.items())
        return next((name for name, now, then in pairs if now.tobytes() != then.tobytes()), None)


class Lived:
    """A model that a program is done to; what was seen of it, by kind, in order."""

    def __init__(self, model: BackendModel, case: LifeCase) -> None:
        self.model, self.case = model, case
        self.trainer = model.trainer(SFT(), OPTIMIZER, case.trainable)
        self.decoders: dict[int, Decoder] = {}
        self.kept: list[Kept] = []
        self.states: list[dict[str, np.ndarray]] = []
        self.seen: list[tuple[str, str, np.ndarray]] = []  # kind, what, array
        for at, do in enumerate(case.program):
            self.do(at, do)

    def do(self, at: int, do: Do) -> None:
        """One thing of the program, the `at`-th."""
        case, what = self.case, f"after {at + 1} of the program, {do.what} {do.number}"
        if do.what == "prefill":
            (request,) = do.detail
            widths = REQUESTS[request].widths
            self.decoders[do.number] = self.model.prefill(case.prompts(request), widths, NEW)
            self.look(do, what)
        elif do.what == "advance":
            decoder = self.decoders[do.number]
            rows = len(decoder.logits())
            keep = ~np.isin(np.arange(rows), do.detail)
            decoder.advance(case.fed(at, rows), keep if do.detail else None)
            self.look(do, what)
        elif do.what == "step":
            self.trainer.step(case.batch, lr=RATES[do.number])
            self.decoders.clear()
        elif do.what == "restore":
            self.trainer.restore(self.states[do.number])
            self.decoders.clear()
        elif do.what == "read":
            active = case.rows.active
            logits = self.model.logits(*case.rows.arguments)
            self.seen.append(("logits", f"logits {what}", logits[active]))
        elif do.what == "score":
            self.seen.append(("logprobs", f"log-probabilities {what}", self.scores()))
        elif do.what == "save":
            state = self.trainer.state()
            self.states.append(state)
            self.kept.append(Kept(f"the state saved as number {len(self.states) - 1}", state))
            for name, array in sorted(state.items()):
                kind = next(kind for kind in STATE if name.startswith(kind))
                self.seen.append((kind, f"{name} {what}", np.array(array)))
        else:
            tensors = dict(self.model.tensors())
            self.kept.append(Kept("the tensors exported", tensors))
            for name, array in tensors.items():
                self.seen.append(("tensors", f"{name} {what}", np.array(array)))

    def scores(self) -> np.ndarray:
        """Log-probabilities of the batch's targets."""
        return self.model.logprobs(self.case.batch)[self.case.batch.target_mask]

    def look(self, do: Do, what: str) -> None:
        """Note a decoder's logits."""
        self.seen.append(("logits", f"logits {what}", self.decoders[do.number].logits()))


class Watched(Lived):
    """The backend's: its draws are held to the rule, and what it hands out is changed."""

    def __init__(self, trial: Trial, model: BackendModel, case: LifeCase) -> None:
        self.trial = trial
        self.rows: dict[int, tuple[np.ndarray, np.ndarray, int]] = {}  # numbers, prompts, step
        super().__init__(model, case)

    def do(self, at: int, do: Do) -> None:
        """One thing of the program; what it gives is given again, and that is written to."""
        super().do(at, do)
        given: dict[str, np.ndarray] = {}
        if do.what == "save":
            given = self.trainer.state()
        elif do.what == "export":
            given = dict(self.model.tensors())
        elif do.what == "score":
            _, given = self.model.loss_and_grads(self.case.batch, SFT(), self.case.trainable)
            spoil(self.model.logprobs(self.case.batch))
        for array in given.values():
            spoil(array)

    def look(self, do: Do, what: str) -> None:
        """Note a decoder's logits and draw from them."""
        super().look(do, what)
        self.rows[do.number] = self._rows(do)
        numbers, prompts, step = self.rows[do.number]
        decoder, logits = self.decoders[do.number], self.seen[-1][2]
        sampling = Sampling(temperature=1.0, seed=self.case.seed + do.number)
        spoil(decoder.logits())
        drawn = decoder.sample(sampling)
        u = uniforms(sampling.seed, step, numbers, prompts)
        if len(u) and not (acceptable_tokens(logits, u, sampling) == drawn).any(axis=0).all():
            message = f"draws {what}: {drawn.tolist()}"
            raise self.trial.failure(message, self.case)

    def _rows(self, do: Do) -> tuple[np.ndarray, np.ndarray, int]:
        if do.what == "prefill":
            widths = REQUESTS[do.detail[0]].widths
            numbers = np.concatenate([np.arange(width) for width in widths])
            return numbers, np.repeat(np.arange(len(widths)), widths), 0
        numbers, prompts, step = self.rows[do.number]
        stay = ~np.isin(np.arange(len(numbers)), do.detail)
        return numbers[stay], prompts[stay], step + 1


def a_models_life_is_the_references(target: Target, case: LifeCase) -> None:
    """Clauses 4.1, 4.3, 6.7, 7.8, 7.9 and 10.1: whatever is done to a model, in whatever order, it
    computes what the reference does; and what it handed out before stays as it was."""
    trial = Trial(target, case.model)
    exact, own, *nudged = (Lived(model, case).seen for model in trial.references())
    ours = Watched(trial, trial.load(), case)
    for kept in ours.kept:
        if name := kept.changed():
            raise trial.failure(f"{kept.what}: {name} changed as the model went on", case)
    for kind in dict.fromkeys(kind for kind, _, _ in exact):
        want, rounded, *moved = (
            np.concatenate([a.astype(np.float64).ravel() for k, _, a in seen if k == kind])
            for seen in (exact, own, *nudged)
        )
        # A log-probability is a difference of logits and a logarithm: near 1 at least.
        least = 1.0 if kind == "logprobs" else 0.0
        largest = max(least, float(np.abs(want).max(initial=0)))
        allowed = trial.allowed(want, rounded, moved, largest)
        for (_, _, right), (k, what, got) in zip(exact, ours.seen, strict=True):
            if k == kind:
                trial.same(got, right, allowed, what, case)
