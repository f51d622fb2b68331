"""Checks of training as it is made to fit: timesteps that rows share computed once, logits a part
at a time, and the policy at the start in the place of the present one (clauses 7.14 to 7.16).

What each gives is what all rows give one by one, whole, by a model of its own: the reference's way.
"""

from collections.abc import Mapping

import numpy as np

from bridge_conformance.cases import TrainCase
from bridge_conformance.checks_decode import must_refuse
from bridge_conformance.checks_model import (
    logits_are_within_the_numerics_rule,
    norm_ratios_are_within_the_numerics_rule,
)
from bridge_conformance.checks_train import (
    OPTIMIZER,
    in_range,
    log_probabilities_are_those_of_the_loss,
    loss_and_gradients_are_within_the_numerics_rule,
    same_updates,
    start,
)
from bridge_conformance.tolerance import FACTOR, FLOOR_ULPS, ulp
from bridge_conformance.trial import Target, Trial

Named = Mapping[str, np.ndarray]
CHUNKS = (1, 2, 5, 7)  # targets whose logits are there at once; in other checks they all are


def shared_timesteps_change_no_gradient(target: Target, case: TrainCase) -> None:
    """Clause 7.14: metrics and gradients of groups that begin alike are those of all their rows."""
    loss_and_gradients_are_within_the_numerics_rule(target, case)


def shared_timesteps_change_no_forward_pass(target: Target, case: TrainCase) -> None:
    """Clause 7.14: so are log-probabilities, logits, and norm ratios, where a shared cell counts
    once a row."""
    log_probabilities_are_those_of_the_loss(target, case)
    logits_are_within_the_numerics_rule(target, case.rows)
    norm_ratios_are_within_the_numerics_rule(target, case.rows)


def logits_in_parts_make_the_same_update(target: Target, case: TrainCase) -> None:
    """Clause 7.15: of whatever size the parts are; and none is of nothing."""
    trial, batch = start(target, case)
    same_updates(trial, case, batch, [batch], loss_chunk=CHUNKS[case.seed % len(CHUNKS)])
    model = trial.load()

    def none() -> None:
        model.trainer(case.objective, OPTIMIZER, case.trainable, loss_chunk=0)

    must_refuse(trial, case, "a loss_chunk of 0", none)


def the_start_stands_in_for_what_was_learnt(target: Target, case: TrainCase) -> None:
    """Clause 7.16: swapped tensors are computed with everywhere, masters stay, and what was there
    comes back whole, by another swap or by the next update."""
    trial, batch = start(target, case)
    in_range(trial, case, batch)
    model = trial.load()
    trainer = model.trainer(case.objective, OPTIMIZER, case.trainable)
    first = {name: trial.tensors[name] for name in case.trainable}

    def scores() -> tuple[np.ndarray, np.ndarray]:
        prompt = np.arange(4) % case.rows.model.config.vocab_size
        return model.logprobs(batch, case.temperature), model.prefill([prompt], [2], 1).logits()

    at_start = scores()
    trainer.step(batch)
    learnt, state, now = dict(model.tensors()), trainer.state(), scores()
    there = model.swap(first)
    _same_tensors(trial, case, there, {name: learnt[name] for name in first}, "what swap gives")
    _same_tensors(trial, case, dict(model.tensors()), learnt | first, "tensors after a swap")
    _same_scores(trial, case, scores(), at_start, "by the tensors of the start")
    _same_tensors(trial, case, trainer.state(), state, "the state after a swap")
    model.swap(there)
    _same_tensors(trial, case, dict(model.tensors()), learnt, "tensors swapped back")
    _same_scores(trial, case, scores(), now, "by tensors swapped back")
    name = case.trainable[0]
    for what, wrong in (
        ("a swap of no tensor of the model", {"model.nothing.weight": first[name]}),
        ("a swap of another shape", {case.trainable[-1]: first[case.trainable[-1]][None]}),
    ):
        must_refuse(trial, case, what, lambda wrong=wrong: model.swap({name: first[name]} | wrong))
        _same_tensors(trial, case, dict(model.tensors()), learnt, f"tensors after {what}")
    model.swap(first)
    trainer.step(batch, lr=0.0)  # by which no master moves, whatever the gradient is of
    _same_tensors(trial, case, dict(model.tensors()), learnt, "tensors after the next update")


def _same_tensors(trial: Trial, case: TrainCase, got: Named, want: Named, what: str) -> None:
    if list(got) != list(want):
        raise trial.failure(f"{what}: {sorted(got)}, not {sorted(want)}", case)
    for name, array in want.items():
        trial.same(np.asarray(got[name]), np.asarray(array), 0, f"{what}: {name}", case)


def _same_scores(
    trial: Trial,
    case: TrainCase,
    got: tuple[np.ndarray, np.ndarray],
    want: tuple[np.ndarray, np.ndarray],
    what: str,
) -> None:
    """Weights may be laid out anew; a rounding of logits is all that may come of it."""
    largest = max(1.0, *(float(np.abs(array).max()) for array in want))
    allowed = FACTOR * FLOOR_ULPS * ulp(trial.dtype) * largest
    for name, given, array in zip(("log-probabilities", "next logits"), got, want, strict=True):
        trial.same(given, array, allowed, f"{name} {what}", case)
