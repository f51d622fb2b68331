"""Checks of updates of any subset of the tensors, without a limit, and of many batches.

What is trained is given by name, and any names will do: a part of what a backend keeps as one
matrix, some layers of what it keeps as one stack, a tensor that serves twice.
"""

from dataclasses import replace

import numpy as np

from bridge.contract import GRPO, Batch
from bridge_conformance.cases import TrainCase
from bridge_conformance.checks_train import (
    OPTIMIZER,
    allowed_of_vector,
    references,
    same_updates,
    start,
    vector,
)
from bridge_conformance.tolerance import FACTOR, ulp
from bridge_conformance.trial import Target

UNLIMITED = replace(OPTIMIZER, max_grad_norm=None)
MANY = 16  # batches of an update; a power of two, by which a division rounds nothing


def a_common_token_learns_from_all_its_cells(target: Target, case: TrainCase) -> None:
    """Clause 7.9: over the cells of a batch, too, gradients add up in float32 or wider.

    All targets are one token, so that what the cells say of a weight is of one sign: a sum in a
    narrow dtype ends where it is some hundreds of times what is added.
    """
    trial, batch = start(target, case)
    batch = replace(batch, targets=np.where(batch.target_mask, 7, batch.targets))
    arguments = (batch, case.objective, case.trainable)
    (_, exact), *others = (model.loss_and_grads(*arguments) for model in references(trial))
    _, got = trial.model.loss_and_grads(*arguments)
    allowed = allowed_of_vector(trial, exact, [grads for _, grads in others])
    for name, want in exact.items():
        trial.same(got[name], want, allowed, f"gradient of {name}", case)


def any_subset_is_updated_alone(target: Target, case: TrainCase) -> None:
    """Clauses 7.7 to 7.9: whatever is trained moves, by all of its gradient where there is no
    limit; nothing else does."""
    trial, batch = start(target, case)
    same_updates(trial, case, batch, [batch], UNLIMITED)


def is_long(case: TrainCase) -> bool:
    """Whether a case has cells enough to show how gradients add up over them."""
    return int(case.rows.active.sum()) >= 512


def is_short(case: TrainCase) -> bool:
    """Whether it has not: then it shows the rest."""
    return not is_long(case)


def many_batches_add_up_in_float32(target: Target, case: TrainCase) -> None:
    """Clauses 7.9 and 7.10: batches add up in float32 or wider, however narrow the dtype is.

    Many equal batches are divided by as many times the targets; with as many times the advantages
    each one's gradient is that of one batch alone, to the bit, and only how they are added differs.
    """
    trial, batch = start(target, case)
    objective = GRPO(0.2, 0.28, 0.0, case.temperature)
    assert batch.advantages is not None
    more = replace(batch, advantages=MANY * batch.advantages)
    states, norms = [], []
    for batches in ([batch], [_renumbered(more, number) for number in range(MANY)]):
        trainer = trial.load().trainer(objective, UNLIMITED, case.trainable)
        norms.append(trainer.step(batches)["grad_norm"])
        states.append(trainer.state())
    one, many = states
    unit = FACTOR * MANY * ulp("float64" if target.dtype == "float64" else "float32")
    for kind, times in (("exp_avg.", MANY), ("exp_avg_sq.", MANY**2)):
        names = [name for name in one if name.startswith(kind)]
        allowed = unit * times * float(np.abs(vector(one, names)).max())
        for name in names:
            want = times * one[name]
            trial.same(many[name], want, allowed, f"{name} of {MANY} equal batches", case)
    want, got = MANY * np.array([norms[0]]), np.array([norms[1]])
    trial.same(got, want, unit * float(want[0]), f"grad_norm of {MANY} equal batches", case)


def _renumbered(batch: Batch, number: int) -> Batch:
    """The batch with groups of other numbers, which mean nothing else (clause 2.2)."""
    return replace(batch, groups=batch.groups + number * (int(np.ptp(batch.groups)) + 1))
