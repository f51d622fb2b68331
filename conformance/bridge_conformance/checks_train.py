"""Checks of losses, gradients and training steps (chapter 7).

The gradients of a model are one vector: the allowance of each tensor is that of the whole, since a
gradient that is exactly zero in theory need not be so in floating point (clause 10.2).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from itertools import product
from typing import Any

import numpy as np

from bridge.contract import AdamW, Batch
from bridge.errors import BridgeError
from bridge_conformance.cases import TrainCase
from bridge_conformance.tolerance import DTYPES, FACTOR, FLOOR_ULPS, ulp
from bridge_conformance.trial import Target, Trial, Unsuited

Named = Mapping[str, np.ndarray]
Metrics = Mapping[str, float]

# A large eps keeps a step a smooth function of its gradients: without it the first step is their
# sign, which rounding can flip where a gradient is nearly zero.
OPTIMIZER = AdamW(lr=0.1, betas=(0.8, 0.95), eps=0.1, weight_decay=0.2, max_grad_norm=0.5)
RATES = (None, 0.05)  # of the updates: None is the optimizer's


def start(target: Target, case: TrainCase) -> tuple[Trial, Batch]:
    """The trial, and the batch around the exact model's policy."""
    trial = Trial(target, case.rows.model)
    return trial, case.batch(trial.exact.logits(*case.rows.arguments))


def loss_and_gradients_are_within_the_numerics_rule(target: Target, case: TrainCase) -> None:
    """Clauses 7.1 to 7.5: every metric and every gradient, against the exact backward."""
    trial, batch = start(target, case)
    arguments = (batch, case.objective, case.trainable)
    measured = [reference.loss_and_grads(*arguments) for reference in references(trial)]
    metrics, grads = trial.model.loss_and_grads(*arguments)
    same_metrics(trial, case, metrics, [values for values, _ in measured])
    if set(grads) != set(case.trainable):
        raise trial.failure(f"gradients of {sorted(grads)}, not of {case.trainable}", case)
    exact, *others = (gradients for _, gradients in measured)
    allowed = allowed_of_vector(trial, exact, others)
    for name, want in exact.items():
        trial.same(grads[name], want, allowed, f"gradient of {name}", case)


def log_probabilities_are_those_of_the_loss(target: Target, case: TrainCase) -> None:
    """Clause 7.12: of every target at the objective's temperature, and 0 where there is none."""
    trial, batch = start(target, case)
    got = trial.model.logprobs(batch, case.temperature)
    exact, own, *nudged = (
        reference.logprobs(batch, case.temperature) for reference in references(trial)
    )
    # A log-probability is a difference of logits and a logarithm: near 1 at least.
    largest = max(1.0, float(np.abs(exact).max()))
    allowed = trial.allowed(exact, own, nudged, largest)
    trial.same(got, exact, allowed, "log-probabilities of targets", case)
    none = ~batch.target_mask
    trial.same(got[none], exact[none], 0, "log-probabilities where there is no target", case)


def references(trial: Trial) -> list[Any]:
    """The models that measure: exact, rounded, and all that are nudged. Not to be trained."""
    return [trial.exact, trial.rounded, *trial.nudged]


def same_metrics(
    trial: Trial, case: TrainCase, metrics: Metrics, measured: Sequence[Metrics]
) -> None:
    """The metrics of a loss against the exact ones; `measured` as `references` give them."""
    if set(metrics) != set(measured[0]):
        raise trial.failure(f"metrics {sorted(metrics)}, not {sorted(measured[0])}", case)
    for name, got in metrics.items():
        want, own, *nudged = (np.array([values[name]]) for values in measured)
        # A log-probability is a difference of logits and a logarithm: near 1 at least.
        allowed = trial.allowed(want, own, nudged, max(1.0, float(np.abs(want[0]))))
        trial.same(np.array([got]), want, allowed, f"metric {name}", case)


def allowed_of_vector(trial: Trial, exact: Named, others: Sequence[Named]) -> float:
    """One allowance for all tensors of a training result, as a single vector; `others` are those
    of the rounded reference, then of the nudged ones."""
    want, own, *nudged = (vector(tensors, exact) for tensors in (exact, *others))
    return trial.allowed(want, own, nudged)


def vector(tensors: Named, names: Iterable[str]) -> np.ndarray:
    """The tensors of these names, end to end."""
    return np.concatenate([tensors[name].astype(np.float64).ravel() for name in sorted(names)])


def training_steps_are_within_the_numerics_rule(target: Target, case: TrainCase) -> None:
    """Clauses 7.7 to 7.9: masters and moments after two clipped steps, and the model's tensors."""
    trial, batch = start(target, case)
    same_updates(trial, case, batch, [batch])


def accumulated_batches_are_one_update(target: Target, case: TrainCase) -> None:
    """Clause 7.10: group after group gives what all rows at once give; no group comes twice."""
    trial, batch = start(target, case)
    same_updates(trial, case, batch, batches_by_group(batch))
    try:
        trial.load().trainer(case.objective, OPTIMIZER, case.trainable).step([batch, batch])
    except BridgeError:
        return
    raise trial.failure("an update takes a group that is split over two batches", case)


def computing_layers_again_changes_no_update(target: Target, case: TrainCase) -> None:
    """Clause 7.11: a trainer that checkpoints activations makes the same updates."""
    trial, batch = start(target, case)
    same_updates(trial, case, batch, [batch], checkpoint_activations=True)


def batches_by_group(batch: Batch) -> list[Batch]:
    """One batch a group; groups without a target go with the first, since a batch needs one."""
    learnt = np.unique(batch.groups[batch.target_mask.any(axis=1)])
    home = np.where(np.isin(batch.groups, learnt), batch.groups, learnt[0])
    return [take_rows(batch, home == group) for group in learnt]


def take_rows(batch: Batch, rows: np.ndarray) -> Batch:
    """The batch of `rows` (indices or a mask) alone."""
    arrays: dict[str, Any] = {f.name: getattr(batch, f.name) for f in fields(batch)}
    given = {name: array[rows] for name, array in arrays.items() if array is not None}
    return replace(batch, **given)


def same_updates(
    trial: Trial,
    case: TrainCase,
    batch: Batch,
    batches: Sequence[Batch],
    optimizer: AdamW = OPTIMIZER,
    **options: Any,
) -> None:
    """Two updates of the backend by `batches` against two exact ones by `batch`: the first one's
    metrics, the state, and the model's tensors, which are the masters rounded."""
    model = trial.load()
    trainer = model.trainer(case.objective, optimizer, case.trainable, **options)
    for update, lr in enumerate(RATES):
        metrics = trainer.step(batches if len(batches) > 1 else batches[0], lr=lr)
        if update == 0:
            same_first_metrics(trial, case, batch, metrics)
    got = trainer.state()
    exact, rounded, *nudged = reference_updates(trial, case, batch, optimizer)
    if set(got) != set(exact):
        raise trial.failure(f"state has {sorted(set(got) ^ set(exact))[0]}, or lacks it", case)
    for kind in ("step", "master.", "exp_avg.", "exp_avg_sq."):
        names = [name for name in exact if name.startswith(kind)]
        want, own, *moved = ({n: state[n] for n in names} for state in (exact, rounded, *nudged))
        allowed = allowed_of_vector(trial, want, [own, *moved])
        for name in names:
            trial.same(got[name], exact[name], allowed, name, case)
        # Even where rounding to the dtype is within the allowance, it is not what a state is for.
        if fits({n: got[n] for n in names}, trial.dtype) > fits(own, trial.dtype):
            raise trial.failure(f"{kind}* hold nothing that {trial.dtype} does not", case)
        if len({got[name].dtype for name in names}) > 1:
            raise trial.failure(f"{kind}* are of more than one dtype", case)
    for name, array in got.items():
        trial.same(trainer.array(name), array, 0, f"{name} read alone", case)
    for name, tensor in model.tensors():
        rounded_master = got.get(f"master.{name}", trial.tensors[name]).astype(tensor.dtype)
        trial.same(tensor, rounded_master, 0, f"{name} of the model", case)


def same_first_metrics(trial: Trial, case: TrainCase, batch: Batch, metrics: Metrics) -> None:
    """Clauses 7.7 and 7.10: those of the loss of all rows, and the norm of the whole gradient."""
    arguments = (batch, case.objective, case.trainable)
    measured = [reference.loss_and_grads(*arguments) for reference in references(trial)]
    of_loss = {name: value for name, value in metrics.items() if name != "grad_norm"}
    same_metrics(trial, case, of_loss, [values for values, _ in measured])
    want, *others = (vector(gradients, gradients) for _, gradients in measured)
    if not want.any():  # a rounding of nothing would be a whole step of AdamW
        raise Unsuited
    # A norm moves by no more than the norm of what moves.
    norm = np.array([np.linalg.norm(want)])
    own, *nudged = (norm + np.linalg.norm(other - want) for other in others)
    allowed = trial.allowed(norm, own, nudged)
    trial.same(np.array([metrics["grad_norm"]]), norm, allowed, "metric grad_norm", case)


def fits(tensors: Named, dtype: str) -> bool:
    """Whether every number is one of `dtype`, as masters and moments are not (clause 7.9)."""
    return all(np.array_equal(array, array.astype(DTYPES[dtype])) for array in tensors.values())


def reference_updates(
    trial: Trial, case: TrainCase, batch: Batch, optimizer: AdamW = OPTIMIZER
) -> list[Named]:
    """The states after the same updates: of the exact, the rounded and the nudged references."""

    def states() -> list[Named]:
        trainers = [
            model.trainer(case.objective, optimizer, case.trainable) for model in trial.references()
        ]
        with np.errstate(invalid="ignore", over="ignore"):  # where a dtype is too narrow
            for trainer, lr in product(trainers, RATES):
                trainer.step(batch, lr=lr)
        return [trainer.state() for trainer in trainers]

    return trial.memory.once(("updates", id(case), optimizer), states)


def in_range(trial: Trial, case: TrainCase, batch: Batch) -> None:
    """Leave out a case whose updates leave the range of the dtype in the reference itself, such as
    float16's (clause 10.2): nothing is asked of what is not finite."""
    _, rounded, *_ = reference_updates(trial, case, batch)
    if not all(np.isfinite(array).all() for array in rounded.values()):
        raise Unsuited


def gradients_stay_within_a_group(target: Target, case: TrainCase) -> None:
    """Clauses 3.8 and 7.3: what other groups say, with no target there, moves no gradient."""
    trial, batch = start(target, case)
    mine = batch.groups == batch.groups[np.nonzero(batch.target_mask)[0][0]]
    batch = replace(batch, target_mask=batch.target_mask & mine[:, None])
    other = np.where(mine[:, None], batch.tokens, (batch.tokens + 1) % trial.case.config.vocab_size)
    _, want = trial.model.loss_and_grads(batch, case.objective, case.trainable)
    _, got = trial.model.loss_and_grads(
        replace(batch, tokens=other), case.objective, case.trainable
    )
    largest = max(float(np.abs(g).max()) for g in want.values())
    # The embedding sums cells in an order of its own; a rounding of it is all that may move.
    allowed = FACTOR * FLOOR_ULPS * ulp(target.dtype) * largest
    for name, grad in want.items():
        trial.same(got[name], grad, allowed, f"gradient of {name}", case)


def a_restored_trainer_goes_on_as_if_never_stopped(target: Target, case: TrainCase) -> None:
    """Clause 7.9: the state is all that a training step depends on beside the model's weights."""
    trial, batch = start(target, case)
    in_range(trial, case, batch)
    model = trial.load()
    through = model.trainer(case.objective, OPTIMIZER, case.trainable)
    through.step(batch)
    other = trial.load()
    resumed = other.trainer(case.objective, OPTIMIZER, case.trainable)
    resumed.restore(through.state())
    for (name, want), (_, got) in zip(model.tensors(), other.tensors(), strict=True):
        trial.same(got, want, 0, f"{name} of the restored model", case)
    for trainer in (through, resumed):
        trainer.step(batch)
    want, got = through.state(), resumed.state()
    for name, array in want.items():
        trial.same(got[name], array, 0, name, case)


def a_model_computes_with_what_it_learnt(target: Target, case: TrainCase) -> None:
    """Clause 7.9: after an update, a model is the one that its tensors give when loaded anew."""
    trial, batch = start(target, case)
    in_range(trial, case, batch)
    model = trial.load()
    model.logits(*case.rows.arguments)  # what it keeps from this must not outlive the update
    model.trainer(case.objective, OPTIMIZER, case.trainable).step(batch)
    got = model.logits(*case.rows.arguments)
    want = trial.load(tensors=dict(model.tensors())).logits(*case.rows.arguments)
    where = case.rows.active
    # The two may lay weights out differently; a rounding of logits is all that may come of it.
    allowed = FACTOR * FLOOR_ULPS * ulp(target.dtype) * float(np.abs(want[where]).max())
    trial.same(got[where], want[where], allowed, "logits after an update", case)
