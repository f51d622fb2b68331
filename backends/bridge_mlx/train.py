"""Losses and a whole training step (chapter 7), with `mx.value_and_grad` and `mlx.optimizers`.

The trained tensors are leaves that stand in for the model's own; whatever else the model holds is
frozen, shared, and not differentiated. Master weights and moments are float32, whatever the model's
dtype. A batch holds whole groups (clause 7.3): gradients flow across the rows of a group, so a
group may not be split over two batches of an update.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from jaxtyping import Float

from bridge.config import tensor_shapes
from bridge.contract import SFT, AdamW, Batch, Objective
from bridge.decoding.inputs import (
    add_metrics,
    check_batch,
    check_state,
    check_temperature,
    check_trainable,
    micro_batches,
    positions_of,
)
from bridge.decoding.targets import TargetCells
from bridge_mlx.block import compiled_on_gpu
from bridge_mlx.linear import embed, trained
from bridge_mlx.model import Transformer

Metrics = dict[str, float]
Leaves = dict[str, mx.array]


def choose(model: Transformer, trainable: Sequence[str]) -> dict[str, mx.array]:
    """The model's tensors of these names. Raises BridgeError for a name that it lacks, and for a
    tensor that it keeps packed."""
    check_trainable(tensor_shapes(model.config), trainable)
    return trained(model.parts(), trainable)


def loss_and_grads(
    model: Transformer,
    leaves: Mapping[str, mx.array],
    batch: Batch,
    objective: Objective,
    count: int | None = None,
    checkpoint_activations: bool = False,
) -> tuple[Metrics, dict[str, mx.array]]:
    """Clauses 7.1 to 7.5: metrics, and the gradient of the loss at each leaf, in float32.

    `leaves` stand in for the model's tensors of these names. `count`: see `loss`. Raises
    BridgeError for a batch whose shapes disagree, that has no target, or lacks what the objective
    reads.
    """
    check_batch(batch, objective, model.config.vocab_size)
    targets = TargetCells.of(batch)

    def run(leaves: dict[str, mx.array]) -> tuple[mx.array, dict[str, mx.array]]:
        recompute = leaves if checkpoint_activations else None
        logits = target_logits(model.substitute(leaves), batch, targets, recompute)
        return loss(logits, targets, objective, count)

    (_, metrics), grads = mx.value_and_grad(run)(dict(leaves))
    grads = {name: grad.astype(mx.float32) for name, grad in grads.items()}
    mx.eval(metrics, grads)
    return {name: float(x) for name, x in metrics.items()}, grads


def logprobs(model: Transformer, batch: Batch, temperature: float) -> Float[mx.array, " tokens"]:
    """Clause 7.12: lp of each target at the temperature, in the order of the mask."""
    check_batch(batch, SFT(), model.config.vocab_size)
    check_temperature(temperature)
    targets = TargetCells.of(batch)
    return at_targets(target_logits(model, batch, targets), targets, temperature)[1]


def target_logits(
    model: Transformer,
    batch: Batch,
    targets: TargetCells,
    recompute: dict[str, mx.array] | None = None,
) -> Float[mx.array, "tokens V"]:
    """Logits of the cells with a target. The head reads no other cell: a vocabulary is wide, and
    prompts have none."""
    cells = model.cells(batch.tokens, batch.groups, batch.active, positions_of(batch))
    h = model.forward(cells, recompute=recompute)
    places = cells.places[targets.rows, targets.timesteps]
    return model.head(embed(h, mx.array(places.astype(np.int32))))


def at_targets(
    logits: Float[mx.array, "tokens V"], targets: TargetCells, temperature: float
) -> tuple[Float[mx.array, "tokens V"], Float[mx.array, " tokens"]]:
    """log p of every token, and of the target (clause 7.1)."""
    logits = logits if temperature == 1 else logits / temperature
    z = logits - mx.stop_gradient(mx.max(logits, axis=-1, keepdims=True))
    logp = z - mx.log(mx.sum(mx.exp(z), axis=-1, keepdims=True))
    ids = mx.array(targets.targets, mx.int32)
    return logp, mx.take_along_axis(logp, ids[:, None], axis=-1)[:, 0]


def loss(
    logits: Float[mx.array, "tokens V"],
    targets: TargetCells,
    objective: Objective,
    count: int | None,
) -> tuple[mx.array, dict[str, mx.array]]:
    """The loss over target tokens, and its metrics, `loss` and `tokens` among them.

    `logits` are those of the cells with a target. `count` is the number of targets that sums are
    divided by: of the whole update, where the batch is one of several (clause 7.10); None: of this
    batch. SFT is clause 7.4: `loss = -sum(lp) / count` with lp = log p(target). GRPO is clause 7.5,
    with advantage A by row:

        rho  = exp(lp - old)
        gain = min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A)
        kl   = exp(ref - lp) - (ref - lp) - 1
        loss = -sum(gain - beta kl) / count
    """
    temperature = 1.0 if isinstance(objective, SFT) else objective.temperature
    logp, lp = at_targets(logits, targets, temperature)
    count = len(lp) if count is None else count
    tokens = mx.array(float(len(lp)))
    if isinstance(objective, SFT):
        value = -mx.sum(lp) / count
        return value, {"loss": value, "tokens": tokens}
    assert targets.advantages is not None
    A, old = _floats(targets.advantages), mx.stop_gradient(lp)
    if targets.old_logprobs is not None:
        old = _floats(targets.old_logprobs)
    rho = mx.exp(lp - old)
    clipped = mx.stop_gradient(mx.clip(rho, 1 - objective.eps_low, 1 + objective.eps_high))
    gain = mx.where(rho * A <= clipped * A, rho * A, clipped * A)
    metrics = {
        "tokens": tokens,
        "clip_fraction": mx.sum(rho * A > clipped * A) / count,
        "entropy": -mx.sum(mx.exp(logp) * logp) / count,
    }
    if targets.ref_logprobs is not None:
        difference = _floats(targets.ref_logprobs) - lp
        kl = mx.expm1(difference) - difference  # of a small difference, exp is 1 and no more
        gain = gain - objective.beta * kl
        metrics["kl"] = mx.sum(kl) / count
    value = -mx.sum(gain) / count
    return value, {"loss": value, **metrics}


def _floats(values: Float[np.ndarray, " tokens"]) -> Float[mx.array, " tokens"]:
    return mx.array(values.astype(np.float32))


def updating(
    adamw: optim.AdamW, limit: float | None
) -> Callable[[Leaves, Leaves], tuple[Leaves, mx.array]]:
    """What makes of gradients and masters the masters after an update, which moves the optimizer's
    state too, and the norm of the gradients before they were clipped (clauses 7.7 and 7.8).

    Batches differ in shape, so that to compile a loss would be to do so again and again. An update
    is the same each time, and nearly all of it is element by element.
    """

    def update(grads: Leaves, master: Leaves) -> tuple[Leaves, mx.array]:
        clipped, norm = optim.clip_grad_norm(grads, float("inf") if limit is None else limit)
        grads = grads if limit is None else clipped  # a norm of inf would make them NaN
        return adamw.apply_gradients(grads, master), norm

    return compiled_on_gpu(update, inputs=adamw.state, outputs=adamw.state)


class Trainer:
    """Updates a model's trainable tensors in place; see `bridge.contract.Trainer`."""

    def __init__(
        self,
        model: Transformer,
        objective: Objective,
        optimizer: AdamW,
        trainable: Sequence[str],
        checkpoint_activations: bool = False,
    ) -> None:
        """Masters start at the model's own values, moments at 0 (clause 7.9)."""
        self.model, self.objective, self.options = model, objective, optimizer
        self.checkpoint_activations = checkpoint_activations
        with mx.stream(model.device):
            leaves = choose(model, trainable)
            self.master = {name: leaf.astype(mx.float32) for name, leaf in leaves.items()}
            self.adamw = optim.AdamW(
                optimizer.lr,
                betas=list(optimizer.betas),
                eps=optimizer.eps,
                weight_decay=optimizer.weight_decay,
                bias_correction=True,  # off unless asked for; clause 7.8 asks
            )
            self.adamw.init(self.master)
            mx.eval(self.master, self.adamw.state)
        self._update = updating(self.adamw, optimizer.max_grad_norm)

    def step(self, batch: Batch | Sequence[Batch], *, lr: float | None = None) -> Metrics:
        """One update, of one batch or accumulated over several (clause 7.10); the loss's metrics,
        and `grad_norm` before clipping (clauses 7.7, 7.8)."""
        batches, count = micro_batches(batch, self.objective, self.model.config.vocab_size)
        with mx.stream(self.model.device):
            leaves = self._rounded()
            parts, grads = [], {}
            for part in batches:
                metrics, added = loss_and_grads(
                    self.model, leaves, part, self.objective, count, self.checkpoint_activations
                )
                parts.append(metrics)
                grads = {name: g + grads[name] if grads else g for name, g in added.items()}
                mx.eval(grads)
            self.adamw.learning_rate = self.options.lr if lr is None else lr
            # Nothing else holds the masters and moments before, so the new ones take their memory.
            self.master, norm = self._update(grads, self.master)
            mx.eval(norm, self.master, self.adamw.state)
            self._publish()
            return {**add_metrics(parts), "grad_norm": float(norm)}

    def state(self) -> dict[str, np.ndarray]:
        """`step`, and `master.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME` of each trained tensor."""
        arrays = {key: np.array(array) for key, array in self._arrays().items()}
        return {"step": np.array(self.adamw.step.item(), np.int64), **arrays}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` gave. Raises BridgeError, and changes nothing, where an array is
        missing, left over or has another shape."""
        check_state(self.model.config, self.master, state)
        with mx.stream(self.model.device):
            given = {key: mx.array(np.asarray(state[key], np.float32)) for key in self._arrays()}
            moments: dict[str, Any] = self.adamw.state
            moments["step"] = mx.array(int(state["step"]), mx.uint64)
            for name in self.master:
                self.master[name] = given[f"master.{name}"]
                moments[name] = {
                    "m": given[f"exp_avg.{name}"],
                    "v": given[f"exp_avg_sq.{name}"],
                }
            self._publish()

    def _arrays(self) -> dict[str, mx.array]:
        """What a state holds beside its step."""
        arrays = {f"master.{name}": master for name, master in self.master.items()}
        for kind, short in (("exp_avg", "m"), ("exp_avg_sq", "v")):
            arrays |= {f"{kind}.{name}": self.adamw.state[name][short] for name in self.master}
        return arrays

    def _rounded(self) -> dict[str, mx.array]:
        return {name: master.astype(self.model.dtype) for name, master in self.master.items()}

    def _publish(self) -> None:
        """The model computes with the master weights rounded to its dtype."""
        self.model.update(self._rounded())
