"""Checks of sampling where its options end (chapter 6): temperatures near 0 and far above 1, top-p
at exactly a cumulative sum, min-p of 1, top-k of the whole vocabulary.

Their logits are exact (`cases_ends`), so that a threshold is met or not and nothing is rounding,
wherever an exponential of a whole power of two is exact; that is asked of the backend first.
"""

from math import inf, log

import numpy as np

from bridge.contract import Decoder, Sampling
from bridge.philox import uniforms
from bridge_conformance.cases_ends import D, EndsCase
from bridge_conformance.checks_decode import acceptable_tokens
from bridge_conformance.trial import Target, Trial

HALVES = 1 / log(2)  # the temperature at which a logit of -1 has half the weight of 0
WIDTH = 4  # rows of a prompt
SEEDS = (0, 2**32, 2**64 - 1)  # and three that the case gives


def above(value: float) -> float:
    """The next float32."""
    return float(np.nextafter(np.float32(value), np.float32(inf)))


def below(value: float) -> float:
    """The float32 before."""
    return float(np.nextafter(np.float32(value), np.float32(-inf)))


def samplings_at_their_ends(vocab_size: int) -> list[Sampling]:
    """Without seeds; those that hang on an exact sum are not among them."""
    V = vocab_size
    return [
        *(Sampling(t) for t in (1e-50, 1e-40, 1e-30, 1e-6, 1e-4, 1e-3, 1e4, 1e39)),
        *(Sampling(1e-6, top_k=k) for k in (1, 3, V)),
        *(Sampling(1e-6, top_p=p) for p in (1e-6, 0.5, 1.0)),
        *(Sampling(1e-6, min_p=p) for p in (1e-6, 1.0)),
        *(Sampling(4.0, top_k=k) for k in (1, V - 1, V, V + 1, 2**40)),
        *(Sampling(4.0, top_p=p) for p in (1e-30, 1e-6, below(1), 1.0)),
        *(Sampling(4.0, min_p=p) for p in (0.0, 1e-30, below(1), 1.0)),
        Sampling(4.0, top_k=V, top_p=1.0, min_p=1.0),
        Sampling(4.0, top_k=V, top_p=1.0, min_p=0.0),
        Sampling(4.0, top_k=2**40, top_p=1e-6, min_p=1.0),
    ]


class Drawing:
    """A decoder of `WIDTH` rows after each kind of token, all at step 0."""

    def __init__(self, trial: Trial, case: EndsCase) -> None:
        self.trial, self.case = trial, case
        prompts = [np.array([kind]) for kind in range(D)]
        self.decoder: Decoder = trial.model.prefill(prompts, [WIDTH] * D, 1)
        self.logits = self.decoder.logits()
        self.rows, self.prompts = np.tile(np.arange(WIDTH), D), np.repeat(np.arange(D), WIDTH)
        rng = np.random.default_rng([case.seed, 1])
        self.seeds = [*SEEDS, *rng.integers(0, 2**63, size=3).tolist()]

    def draw(self, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
        """Of every seed and row: tokens and uniforms, `[seeds, R]`."""
        drawn, uniform = [], []
        for seed in self.seeds:
            options = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
            drawn.append(self.decoder.sample(Sampling(*options, seed=seed)))
            uniform.append(uniforms(seed, 0, self.rows, self.prompts))
        return np.stack(drawn), np.stack(uniform)

    def follows(self, sampling: Sampling, exact: bool = False) -> None:
        """Hold draws to the rule. `exact`: thresholds of filters may not be a rounding off."""
        drawn, uniform = self.draw(sampling)
        logits = np.tile(self.logits, (len(self.seeds), 1))
        accepted = acceptable_tokens(logits, uniform.ravel(), sampling, filters=not exact)
        wrong = ~(accepted == drawn.ravel()).any(axis=0)
        if wrong.any():
            at = int(np.flatnonzero(wrong)[0])
            seed, row = self.seeds[at // len(self.rows)], at % len(self.rows)
            raise self.trial.failure(
                f"{sampling} with seed {seed}: row {row} drew {drawn.ravel()[at]}, not "
                f"{accepted[0, at]}, from logits {self.logits[row].tolist()}",
                self.case,
            )

    def weighs(self, weight: float, logit: float) -> bool:
        """Whether a token of that logit after the first kind has exactly that weight: min-p keeps
        it at its weight, and no longer a float32 above."""
        tokens = np.flatnonzero(self.case.levels[0] == logit)
        mine = self.prompts == 0
        kept, cut = (
            np.isin(self.draw(Sampling(HALVES, min_p=p))[0][:, mine], tokens).any()
            for p in (weight, above(weight))
        )
        return bool(kept and not cut)


def samplings_hold_at_their_ends(target: Target, case: EndsCase) -> None:
    """Chapter 6: temperature near 0 and far above 1, top-p at exactly a sum and at 1, min-p at 1,
    top-k of the whole vocabulary."""
    trial = Trial(target, case)
    drawing = Drawing(trial, case)
    want = np.repeat(case.levels, WIDTH, axis=0)
    got = drawing.logits - drawing.logits.max(-1, keepdims=True)
    if not np.array_equal(got.astype(np.float32), want):
        raise trial.failure(f"logits {drawing.logits.tolist()} are no whole numbers", case)
    for sampling in samplings_at_their_ends(case.vocab_size):
        drawing.follows(sampling)
    exact = drawing.weighs(0.5, -1) and drawing.weighs(0.25, -2)
    for total in (0.5, 0.75):
        for top_p in (below(total), total, above(total)):
            drawing.follows(Sampling(HALVES, top_p=top_p), exact)
            drawing.follows(Sampling(HALVES, top_k=case.vocab_size, top_p=top_p, min_p=0.2), exact)
