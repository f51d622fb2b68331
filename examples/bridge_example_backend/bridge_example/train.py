"""Losses, gradients and a whole training step (chapter 7).

Trained tensors are put in place of the model's own, and the tape finds their gradients. A batch
holds whole groups: gradients flow across the rows of a group, and of that group alone.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from bridge.contract import SFT, AdamW, Batch, Objective
from bridge.decoding.inputs import (
    add_metrics,
    check_batch,
    check_state,
    check_temperature,
    check_trainable,
    default_positions,
    micro_batches,
    state_shapes,
)

from bridge_example.model import Transformer
from bridge_example.tape import Array, Var, backward, log_softmax, where

Metrics = dict[str, float]
Arrays = dict[str, Array]


def loss_and_grads(
    model: Transformer,
    batch: Batch,
    objective: Objective,
    trainable: Sequence[str],
    count: int | None = None,
    checkpoint_activations: bool = False,
) -> tuple[Metrics, Arrays]:
    """Metrics, and the gradient of the loss at each tensor named in `trainable`.

    `count`: the targets of the whole update, where the batch is one of several (clause 7.10).
    Raises BridgeError for a batch that `bridge.decoding.inputs` refuses, and for a name of no
    tensor.
    """
    check_trainable(model.weights.keys(), trainable)
    check_batch(batch, objective, model.config.vocab_size)
    leaves = {name: Var(model.weights[name].value, trained=True) for name in trainable}
    training = Transformer(model.config, {**model.weights, **leaves})
    logits = target_logits(training, batch, checkpoint_activations)
    value, metrics = loss(logits, batch, objective, count)
    backward(value, np.ones((), np.float32))
    # A tensor that the loss does not read at all has a gradient of zero.
    grads = {n: np.zeros_like(v.value) if v.grad is None else v.grad for n, v in leaves.items()}
    return metrics, grads


def target_logits(model: Transformer, batch: Batch, checkpoint_activations: bool = False) -> Var:
    """Logits of the cells with a target, `[targets, V]`, in the order of the mask."""
    positions = default_positions(batch.active) if batch.positions is None else batch.positions
    h = model.teacher_forced(
        batch.tokens, batch.groups, batch.active, positions, checkpoint_activations
    )
    return model.logits(h[batch.target_mask])


def logprobs(model: Transformer, batch: Batch, temperature: float) -> Array:
    """Clause 7.12: the log-probability of each target, `[B, S]`; 0 where there is none."""
    check_batch(batch, SFT(), model.config.vocab_size)
    check_temperature(temperature)
    logp = log_softmax(target_logits(model, batch) * (1 / temperature)).value
    mask, out = batch.target_mask, np.zeros(batch.target_mask.shape, np.float32)
    out[mask] = logp[np.arange(len(logp)), batch.targets[mask]]
    return out


def loss(
    logits: Var, batch: Batch, objective: Objective, count: int | None = None
) -> tuple[Var, Metrics]:
    """Clauses 7.4 and 7.5, from the logits at the cells with a target, `[targets, V]`."""
    mask = batch.target_mask
    temperature = 1.0 if isinstance(objective, SFT) else objective.temperature
    logp = log_softmax(logits * (1 / temperature))
    lp = logp[np.arange(len(logp.value)), batch.targets[mask]]
    tokens = len(lp.value)
    count = tokens if count is None else count
    if isinstance(objective, SFT):
        value = lp.sum() * (-1 / count)
        return value, {"loss": float(value.value), "tokens": tokens}

    def at_targets(values: Array) -> Array:  # what lies elsewhere is not read: it may be NaN
        return values[mask].astype(np.float32)

    assert batch.advantages is not None
    A = at_targets(np.broadcast_to(batch.advantages[:, None], mask.shape))
    old = lp.value if batch.old_logprobs is None else at_targets(batch.old_logprobs)
    rho = (lp - old).exp()
    clipped = np.clip(rho.value, 1 - objective.eps_low, 1 + objective.eps_high) * A
    free = rho.value * A <= clipped  # also where they are equal: the gradient is that of rho A
    gain = where(free, rho * A) + np.where(free, 0, clipped)
    metrics: Metrics = {
        "tokens": tokens,
        "clip_fraction": float((~free).sum() / count),
        "entropy": float(-(np.exp(logp.value) * logp.value).sum() / count),
    }
    if batch.ref_logprobs is not None:
        difference = lp * -1.0 + at_targets(batch.ref_logprobs)
        kl = difference.exp() - difference - 1.0
        gain = gain - kl * objective.beta
        metrics["kl"] = float(kl.value.sum() / count)
    value = gain.sum() * (-1 / count)
    return value, {"loss": float(value.value), **metrics}


class Trainer:
    """Updates a model's trainable tensors; see `bridge.contract.Trainer`.

    A model in float32 computes with its masters. One in bfloat16 would be given them rounded after
    each update, and would take gradients at the rounded ones (clause 7.9).
    """

    def __init__(
        self,
        model: Transformer,
        objective: Objective,
        optimizer: AdamW,
        trainable: Sequence[str],
        checkpoint_activations: bool = False,
    ) -> None:
        """Masters start at the model's own values, moments at 0."""
        check_trainable(model.weights.keys(), trainable)
        self.model, self.objective, self.optimizer = model, objective, optimizer
        self.checkpoint_activations = checkpoint_activations
        self.steps = 0
        self.master = {name: model.weights[name].value for name in trainable}
        self.exp_avg = {name: np.zeros_like(master) for name, master in self.master.items()}
        self.exp_avg_sq = {name: np.zeros_like(master) for name, master in self.master.items()}

    def step(self, batch: Batch | Sequence[Batch], *, lr: float | None = None) -> Metrics:
        """One update, of one batch or accumulated over several (clause 7.10)."""
        batches, count = micro_batches(batch, self.objective, self.model.config.vocab_size)
        parts: list[Metrics] = []
        total = {name: np.zeros_like(master) for name, master in self.master.items()}
        for part in batches:
            metrics, grads = loss_and_grads(
                self.model,
                part,
                self.objective,
                list(self.master),
                count,
                self.checkpoint_activations,
            )
            parts.append(metrics)
            total = {name: total[name] + grad for name, grad in grads.items()}
        norm = sum(float(np.square(grad, dtype=np.float64).sum()) for grad in total.values()) ** 0.5
        limit = self.optimizer.max_grad_norm
        scale = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))  # clause 7.7
        self.steps += 1
        for name, grad in total.items():
            self._update(name, grad * scale, self.optimizer.lr if lr is None else lr)
        self._publish()
        return {**add_metrics(parts), "grad_norm": norm}

    def _update(self, name: str, g: Array, lr: float) -> None:
        """AdamW on one tensor (clause 7.8). Arrays are replaced, never written to."""
        o, (beta1, beta2) = self.optimizer, self.optimizer.betas
        p, m, v = self.master[name], self.exp_avg[name], self.exp_avg_sq[name]
        p = p - lr * o.weight_decay * p
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        m_hat, v_hat = m / (1 - beta1**self.steps), v / (1 - beta2**self.steps)
        p = p - lr * m_hat / (np.sqrt(v_hat) + o.eps)
        self.master[name], self.exp_avg[name], self.exp_avg_sq[name] = p, m, v

    def _publish(self) -> None:
        """The model computes with the masters from now on."""
        trained = {name: Var(master) for name, master in self.master.items()}
        self.model.weights = {**self.model.weights, **trained}

    def state(self) -> Arrays:
        """`step`, and `master.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME` of each trained tensor."""
        return {key: self.array(key) for key in state_shapes(self.model.config, self.master)}

    def array(self, key: str) -> Array:
        """One array of `state`, alone."""
        kind, _, name = key.partition(".")
        return getattr(self, kind)[name].copy() if name else np.array(self.steps, np.int64)

    def restore(self, state: Mapping[str, Array]) -> None:
        """Go on from what `state` gave. Raises BridgeError, and changes nothing, where an array is
        missing, left over or has another shape."""
        check_state(self.model.config, self.master, state)
        self.steps = int(state["step"])
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            given = {name: np.array(state[f"{kind}.{name}"], np.float32) for name in self.master}
            setattr(self, kind, given)
        self._publish()
