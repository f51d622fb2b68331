"""Checks of long texts, and of windows over prompts and rows that leave (chapters 4 to 6).

A decoder is driven once through all timesteps of a case. Its logits are held to the reference's
teacher forcing, since the backend's own could share a fault, such as a table that ends too early.
"""

from dataclasses import dataclass

import numpy as np

from bridge.contract import BackendModel, Sampling
from bridge.philox import uniforms
from bridge_conformance.cases import DecodeCase
from bridge_conformance.checks_decode import acceptable_tokens, decode, prefill
from bridge_conformance.trial import Target, Trial

SAMPLING = Sampling(temperature=1.0, top_k=12, seed=2**64 - 1)  # one: tables of draws are used up


@dataclass(frozen=True)
class Driven:
    """What a decoder gave: at the live cells `[steps, R]` of a case, in order."""

    logits: np.ndarray  # [cells, V]
    tokens: np.ndarray  # [cells]


def drive(trial: Trial, case: DecodeCase) -> Driven:
    """A decoder through all of a case, on a model that has read one token before: what it made for
    that must not be all that it has."""

    def run() -> Driven:
        model = trial.load()
        model.prefill([case.prompts[0][:1]], [1], 1)
        decoder = prefill(model, case)
        logits, tokens = [], []
        for _ in decode(decoder, case):
            logits.append(decoder.logits())
            tokens.append(decoder.sample(SAMPLING))
        return Driven(np.concatenate(logits), np.concatenate(tokens))

    return trial.memory.once(("driven", id(case)), run)


def long_texts_are_decoded_as_they_are_read(target: Target, case: DecodeCase) -> None:
    """Clauses 4.1, 4.3, 5.4 to 5.6: hundreds of timesteps, short prompts beside long ones, and
    windows while rows and whole prompts leave in turn: logits are the reference's, and so are those
    of teacher forcing behind padding, where a mask is as long as the text."""
    trial = Trial(target, case.model)
    rows, first = case.teacher_forced(2)
    timestep, every = first + np.arange(case.steps)[:, None], np.arange(len(first))

    def run(model: BackendModel) -> np.ndarray:
        return model.logits(*rows.arguments)[every, timestep]

    exact, allowed = trial.allowance(run, case.alive)
    read = run(trial.model)[case.alive]
    trial.same(read, exact, 2 * allowed, "logits of teacher forcing, behind padding", case)
    got = drive(trial, case).logits
    for step, cells in enumerate(cells_by_step(case)):
        what = f"logits at step {step}"
        trial.same(got[cells], exact[cells], 2 * allowed, what, case)


def long_texts_are_drawn_by_the_rule(target: Target, case: DecodeCase) -> None:
    """Clauses 6.2 and 6.7: hundreds of draws under one seed, as rows and prompts leave in turn."""
    trial = Trial(target, case.model)
    driven = drive(trial, case)
    steps, rows = np.nonzero(case.alive)
    u = uniforms(SAMPLING.seed, steps, case.row_number[rows], case.row_prompt[rows])
    accepted = acceptable_tokens(driven.logits, u, SAMPLING)
    wrong = ~(accepted == driven.tokens).any(axis=0)
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        raise trial.failure(
            f"{SAMPLING}: row {rows[at]} drew {driven.tokens[at]} at step {steps[at]}, not "
            f"{accepted[0, at]}",
            case,
        )


def cells_by_step(case: DecodeCase) -> list[slice]:
    """Where the cells of each step lie among all live ones."""
    ends = np.cumsum(case.alive.sum(axis=1))
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
