"""Gradients and a whole training step (chapter 7), by `mx.value_and_grad` and `mlx.optimizers`.

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
    check_loss_chunk,
    check_state,
    check_temperature,
    check_trainable,
    micro_batches,
    positions_of,
    state_shapes,
)
from bridge.decoding.targets import LOSS_CHUNK, TargetCells
from bridge_mlx.block import compiled_on_gpu
from bridge_mlx.linear import chosen, embed
from bridge_mlx.losses import log_probability, loss_in_parts, parts
from bridge_mlx.model import EMBEDDING, Transformer

Metrics = dict[str, float]
Leaves = dict[str, mx.array]


def choose(model: Transformer, trainable: Sequence[str]) -> dict[str, mx.array]:
    """The model's tensors of these names. Raises BridgeError for a name that it lacks, and for a
    tensor that it keeps packed."""
    check_trainable(tensor_shapes(model.config), trainable)
    return chosen(model.parts(), trainable, "trainable")


def loss_and_grads(
    model: Transformer,
    leaves: Mapping[str, mx.array],
    batch: Batch,
    objective: Objective,
    count: int | None = None,
    checkpoint_activations: bool = False,
    loss_chunk: int = LOSS_CHUNK,
) -> tuple[Metrics, dict[str, mx.array]]:
    """Clauses 7.1 to 7.5: metrics, and the gradient of the loss at each leaf, in float32.

    `leaves` stand in for the model's tensors of these names. `count`: see `losses.loss`; None: the
    targets of this batch. Raises BridgeError for a batch whose shapes disagree, that has no target,
    or lacks what the objective reads.
    """
    check_batch(batch, objective, model.config.vocab_size)
    targets = TargetCells.of(batch)
    count = len(targets.rows) if count is None else count
    at_head = {name: leaf for name, leaf in leaves.items() if name in model.head.names()}
    trunk = {
        name: leaf for name, leaf in leaves.items() if name == EMBEDDING or name not in at_head
    }

    def run(trunk: Leaves) -> tuple[mx.array, Any]:
        recompute = trunk if checkpoint_activations else None
        h = at_target_cells(model.substitute(trunk), batch, targets, recompute)
        metrics, at_h, grads = loss_in_parts(
            model.head, at_head, mx.stop_gradient(h), targets, objective, count, loss_chunk
        )
        # Its gradient at h is the loss's, which is known by now.
        return mx.sum(h.astype(mx.float32) * at_h.astype(mx.float32)), (metrics, grads)

    if trunk:
        (_, (metrics, grads)), of_trunk = mx.value_and_grad(run)(trunk)
    else:
        (_, (metrics, grads)), of_trunk = run({}), {}
    for name, grad in of_trunk.items():  # a tied embedding has both
        grads[name] = grad.astype(mx.float32) + grads.get(name, 0)
    mx.eval(metrics, grads)
    return {name: float(x) for name, x in metrics.items()}, {name: grads[name] for name in leaves}


def logprobs(model: Transformer, batch: Batch, temperature: float) -> Float[mx.array, " tokens"]:
    """Clause 7.12: lp of each target at the temperature, in the order of the mask."""
    check_batch(batch, SFT(), model.config.vocab_size)
    check_temperature(temperature)
    targets = TargetCells.of(batch)
    h = at_target_cells(model, batch, targets)
    found = []
    for some, own in parts(targets, LOSS_CHUNK):
        found.append(log_probability(model.head(h[some]), own.targets, temperature)[-1])
        mx.eval(found[-1])
    return mx.concatenate(found)


def at_target_cells(
    model: Transformer,
    batch: Batch,
    targets: TargetCells,
    recompute: Mapping[str, mx.array] | None = None,
) -> Float[mx.array, "tokens D"]:
    """Hidden states of the cells with a target. The head reads no other cell: a vocabulary is wide,
    and prompts have none."""
    cells = model.cells(batch.tokens, batch.groups, batch.active, positions_of(batch))
    places = cells.places[targets.rows, targets.timesteps]
    h = model.forward(cells, recompute=recompute)
    return embed(h, mx.array(places.astype(np.int32)))


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
        loss_chunk: int | None = None,
    ) -> None:
        """Masters start at the model's own values, moments at 0 (clause 7.9)."""
        self.model, self.objective, self.options = model, objective, optimizer
        self.checkpoint_activations = checkpoint_activations
        self.loss_chunk = check_loss_chunk(loss_chunk)
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
                    self.model,
                    leaves,
                    part,
                    self.objective,
                    count,
                    self.checkpoint_activations,
                    self.loss_chunk,
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
        return {key: self.array(key) for key in state_shapes(self.model.config, self.master)}

    def array(self, key: str) -> np.ndarray:
        """One array of `state`, alone."""
        kind, _, name = key.partition(".")
        if not name:
            return np.array(self.adamw.step.item(), np.int64)
        moment = self.adamw.state[name]["m" if kind == "exp_avg" else "v"]
        return np.array(self.master[name] if kind == "master" else moment)

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` gave. Raises BridgeError, and changes nothing, where an array is
        missing, left over or has another shape."""
        check_state(self.model.config, self.master, state)
        with mx.stream(self.model.device):
            moments: dict[str, Any] = self.adamw.state
            moments["step"] = mx.array(int(state["step"]), mx.uint64)
            for name in self.master:  # one after another: a second state may not fit
                self.master[name], m, v = (
                    mx.array(np.asarray(state[f"{kind}.{name}"], np.float32))
                    for kind in ("master", "exp_avg", "exp_avg_sq")
                )
                moments[name] = {"m": m, "v": v}
            self._publish()

    def _rounded(self) -> dict[str, mx.array]:
        return {name: master.astype(self.model.dtype) for name, master in self.master.items()}

    def _publish(self) -> None:
        """The model computes with the master weights rounded to its dtype."""
        self.model.update(self._rounded())
