"""Gradients and a whole training step (chapter 7), with `jax.vjp` and optax.

A batch holds whole groups (clause 7.3): gradients flow across the rows of a group, so a group may
not be split over two batches of an update. What its rows share is computed once (clause 7.14), and
logits are made in parts (7.15): `pieces` and `losses` have these.
"""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Float

from bridge.config import ModelConfig
from bridge.contract import SFT, AdamW, Batch, Objective
from bridge.decoding.inputs import (
    add_metrics,
    check_batch,
    check_state,
    check_temperature,
    micro_batches,
    positions_of,
    state_shapes,
)
from bridge.decoding.targets import LOSS_CHUNK
from bridge_jax.adamw import State, add, publish, start, update
from bridge_jax.compiled import compiled
from bridge_jax.leaves import Chosen, Leaves, choose, from_names, substitute
from bridge_jax.linear import stacked
from bridge_jax.losses import Targets, in_parts, logprobs_in_parts
from bridge_jax.model import Transformer, forward
from bridge_jax.pieces import Pieces
from bridge_jax.weights import Params

Array = jax.Array
Metrics = dict[str, float]


def loss_and_grads(
    model: Transformer,
    leaves: Leaves,
    chosen: Chosen,
    batch: Batch,
    objective: Objective,
    count: int | None = None,
    checkpoint_activations: bool = False,
    loss_chunk: int = LOSS_CHUNK,
) -> tuple[Metrics, Leaves]:
    """Clauses 7.1 to 7.5: metrics, and the gradient of the loss at each leaf, in float32.

    `leaves` stand in for the model's own. `count`: see `losses.loss`. Raises BridgeError for a
    batch whose shapes disagree, that has no target, or lacks what the objective reads.
    """
    check_batch(batch, objective, model.config.vocab_size)
    pieces, table, targets = _planned(model, batch, loss_chunk)
    tokens = int(batch.target_mask.sum())
    metrics, grads = value_and_grads(
        leaves,
        model.params,
        pieces,
        table,
        targets,
        float(tokens if count is None else count),
        config=model.config,
        chosen=chosen,
        objective=objective,
        checkpoint=checkpoint_activations,
        quick=model.quick,
    )
    metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
    return {**metrics, "tokens": float(tokens)}, grads


@compiled(static_argnames=("config", "chosen", "objective", "checkpoint"))
def value_and_grads(
    leaves: Leaves,
    params: Params,
    pieces: Pieces,
    table: Float[Array, "two positions d"],
    targets: Targets,
    count: float,
    *,
    config: ModelConfig,
    chosen: Chosen,
    objective: Objective,
    checkpoint: bool,
) -> tuple[dict[str, Array], Leaves]:
    """Metrics, and gradients of the trained leaves alone."""

    def hidden(leaves: Leaves) -> Float[Array, "C D"]:
        whole = substitute(params, leaves, chosen)
        return forward(whole, pieces, table, config, checkpoint=checkpoint)[0]

    h, back = jax.vjp(hidden, leaves)
    whole = substitute(params, leaves, chosen)
    metrics, of_h, of_ends = in_parts(whole, h, targets, objective, count, config, leaves)
    (grads,) = back(of_h.astype(h.dtype))
    return metrics, grads | {key: grads[key] + more for key, more in of_ends.items()}


def logprobs(model: Transformer, batch: Batch, temperature: float) -> Float[np.ndarray, " tokens"]:
    """Clause 7.12: lp of each target at the temperature, in the order of the mask."""
    check_batch(batch, SFT(), model.config.vocab_size)
    check_temperature(temperature)
    pieces, table, targets = _planned(model, batch, LOSS_CHUNK)
    lp = target_logprobs(
        model.params, pieces, table, targets, temperature, config=model.config, quick=model.quick
    )
    return jax.device_get(lp).ravel()[: int(batch.target_mask.sum())]


def _planned(model: Transformer, batch: Batch, loss_chunk: int) -> tuple[Pieces, Array, Targets]:
    """A batch in the sizes that are compiled, its table of positions, and its targets."""
    positions = positions_of(batch)
    pieces, places, table = model.batch(batch.tokens, batch.groups, batch.active, positions)
    return pieces, table, Targets.of(batch, pieces, places, loss_chunk)


@compiled(static_argnames="config")
def target_logprobs(
    params: Params,
    pieces: Pieces,
    table: Float[Array, "two positions d"],
    targets: Targets,
    temperature: float,
    *,
    config: ModelConfig,
) -> Float[Array, "m n"]:
    """lp of each target, padded."""
    h, _ = forward(params, pieces, table, config)
    return logprobs_in_parts(params, h, targets, temperature, config)


class Trainer:
    """Updates a model's trainable tensors in place; see `bridge.contract.Trainer`."""

    def __init__(
        self,
        model: Transformer,
        objective: Objective,
        optimizer: AdamW,
        trainable: Sequence[str],
        checkpoint_activations: bool = False,
        loss_chunk: int = LOSS_CHUNK,
    ) -> None:
        """Masters start at the model's own values, moments at 0 (clause 7.9)."""
        self.model, self.objective, self.options = model, objective, optimizer
        self.trainable, self.chosen = list(trainable), choose(model.config, trainable)
        self.checkpoint_activations, self.loss_chunk = checkpoint_activations, loss_chunk
        self.steps = 0
        self.tensors = start(self._own(), chosen=self.chosen, quick=model.quick)

    def _own(self) -> Leaves:
        """The model's leaves of which some tensor is trained."""
        return {key: self.model.params[key] for key, _ in self.chosen}

    def step(self, batch: Batch | Sequence[Batch], *, lr: float | None = None) -> Metrics:
        """One update, of one batch or accumulated over several (clause 7.10); the loss's metrics,
        and `grad_norm` before clipping (clauses 7.7, 7.8)."""
        batches, count = micro_batches(batch, self.objective, self.model.config.vocab_size)
        parts, grads = [], None
        for part in batches:
            metrics, new = loss_and_grads(
                self.model,
                self.tensors.master,
                self.chosen,
                part,
                self.objective,
                count,
                self.checkpoint_activations,
                self.loss_chunk,
            )
            parts.append(metrics)
            grads = new if grads is None else add(grads, new, quick=self.model.quick)
        self.steps += 1
        self.tensors, own, norm = update(
            self.tensors,
            grads,
            self._own(),
            *(1 - beta**self.steps for beta in self.options.betas),
            self.options.lr if lr is None else lr,
            options=self.options,
            chosen=self.chosen,
            quick=self.model.quick,
        )
        self.model.params.update(own)
        return {**add_metrics(parts), "grad_norm": float(norm)}

    def state(self) -> dict[str, np.ndarray]:
        """`step`, and `master.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME` of each trained tensor."""
        return {key: self.array(key) for key in state_shapes(self.model.config, self.trainable)}

    def array(self, key: str) -> np.ndarray:
        """One array of `state`, alone."""
        kind, _, name = key.partition(".")
        if not name:
            return np.array(self.steps, np.int64)
        leaf, layer = stacked(name)
        array, layers = getattr(self.tensors, kind)[leaf], dict(self.chosen)[leaf]
        if layer is not None:
            array = array[layer if layers is None else layers.index(layer)]
        return np.array(array)

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` gave. Raises BridgeError, and changes nothing, where an array is
        missing, left over or has another shape."""
        check_state(self.model.config, self.trainable, state)
        for kind in State._fields:
            mine, prefix = getattr(self.tensors, kind), f"{kind}."
            arrays = {
                key.removeprefix(prefix): np.asarray(array, np.float32)
                for key, array in state.items()
                if key.startswith(prefix)
            }
            for leaf in self.chosen:  # in turn: a second state may not fit
                for key, array in from_names(arrays, self.model.config, (leaf,)).items():
                    mine[key] = jax.device_put(array, mine[key].sharding, may_alias=False)
        self.steps = int(state["step"])
        own = publish(self._own(), self.tensors.master, chosen=self.chosen, quick=self.model.quick)
        self.model.params.update(own)
