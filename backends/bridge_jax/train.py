"""Gradients and a whole training step (chapter 7), with `jax.value_and_grad` and optax.

Trained tensors are leaves that stand in for the model's own, stacked over their layers as those
are; whatever else the model holds is frozen, shared and not differentiated. Master weights and
moments are float32, whatever the model's dtype. A batch holds whole groups (clause 7.3): gradients
flow across the rows of a group, so a group may not be split over two batches of an update.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from bridge.config import ModelConfig
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
from bridge_jax import model as transformer
from bridge_jax.block import take
from bridge_jax.compiled import compiled
from bridge_jax.linear import stacked, stacked_names
from bridge_jax.losses import Targets, at_targets, loss
from bridge_jax.model import Params, Transformer, forward, head

Array = jax.Array
Leaves = dict[str, Array]
Metrics = dict[str, float]
# What is trained: keys of the parameters, each with the layers of its stack; None: the whole leaf.
Chosen = tuple[tuple[str, tuple[int, ...] | None], ...]


def choose(config: ModelConfig, trainable: Sequence[str]) -> Chosen:
    """The leaves of the tensors named. Raises BridgeError for a name that is no tensor."""
    names = stacked_names(config)
    check_trainable([name for same in names.values() for name in same], trainable)
    wanted, chosen = set(trainable), []
    for key, same in names.items():
        layers = [stacked(name)[1] for name in same if name in wanted]
        whole = layers == list(range(config.num_hidden_layers)) or layers == [None]
        if layers:
            chosen.append((key, None if whole else tuple(layers)))
    return tuple(chosen)


def take_leaves(params: Params, chosen: Chosen) -> Leaves:
    """What is trained, as float32 copies."""
    return {
        key: jnp.array(params[key] if layers is None else take(params[key], np.array(layers)))
        .astype(jnp.float32)
        .copy()
        for key, layers in chosen
    }


def substitute(params: Params, leaves: Leaves, chosen: Chosen) -> dict[str, Array]:
    """The parameters with leaves in place of their own, rounded to the model's dtype."""
    new = dict(params)
    for key, layers in chosen:
        leaf = leaves[key].astype(params[key].dtype)
        new[key] = leaf if layers is None else params[key].at[np.array(layers)].set(leaf)
    return new


def by_name(
    leaves: Mapping[str, Array], config: ModelConfig, chosen: Chosen
) -> dict[str, np.ndarray]:
    """Leaves as arrays on the host, by the names of their tensors."""
    tensors, names = {}, stacked_names(config)
    for key, layers in chosen:
        leaf = jax.device_get(leaves[key])
        if stacked(names[key][0])[1] is None:
            tensors[key] = leaf
            continue
        for row, layer in zip(leaf, range(len(leaf)) if layers is None else layers, strict=True):
            tensors[key.replace("*", str(layer), 1)] = row
    return tensors


def loss_and_grads(
    model: Transformer,
    leaves: Leaves,
    chosen: Chosen,
    batch: Batch,
    objective: Objective,
    count: int | None = None,
    checkpoint_activations: bool = False,
) -> tuple[Metrics, Leaves]:
    """Clauses 7.1 to 7.5: metrics, and the gradient of the loss at each leaf, in float32.

    `leaves` stand in for the model's own. `count`: see `loss`. Raises BridgeError for a batch whose
    shapes disagree, that has no target, or lacks what the objective reads.
    """
    check_batch(batch, objective, model.config.vocab_size)
    cells, table, targets = _planned(model, batch)
    tokens = int(batch.target_mask.sum())
    metrics, grads = value_and_grads(
        leaves,
        model.params,
        cells,
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
    cells: transformer.Batch,
    table: Float[Array, "two P d"],
    targets: Targets,
    count: float,
    *,
    config: ModelConfig,
    chosen: Chosen,
    objective: Objective,
    checkpoint: bool,
) -> tuple[dict[str, Array], Leaves]:
    """Metrics, and gradients of the trained leaves alone."""

    def value(leaves: Leaves) -> tuple[Array, dict[str, Array]]:
        whole = substitute(params, leaves, chosen)
        h, _ = forward(whole, cells, table, config, checkpoint=checkpoint)
        h = take(h.reshape(-1, h.shape[-1]), targets.cells)
        return loss(head(whole, h, config), targets, objective, count)

    (_, metrics), grads = jax.value_and_grad(value, has_aux=True)(leaves)
    return metrics, grads


def logprobs(model: Transformer, batch: Batch, temperature: float) -> Float[np.ndarray, " tokens"]:
    """Clause 7.12: lp of each target at the temperature, in the order of the mask."""
    check_batch(batch, SFT(), model.config.vocab_size)
    check_temperature(temperature)
    cells, table, targets = _planned(model, batch)
    lp = target_logprobs(
        model.params, cells, table, targets, temperature, config=model.config, quick=model.quick
    )
    return jax.device_get(lp)[: int(batch.target_mask.sum())]


def _planned(model: Transformer, batch: Batch) -> tuple[transformer.Batch, Array, Targets]:
    """A batch in the sizes that are compiled, its table of positions, and its targets."""
    positions = positions_of(batch)
    cells, layout, table = model.batch(batch.tokens, batch.groups, batch.active, positions)
    return cells, table, Targets.of(batch, layout.places, cells.tokens.shape[1])


@compiled(static_argnames="config")
def target_logprobs(
    params: Params,
    cells: transformer.Batch,
    table: Float[Array, "two P d"],
    targets: Targets,
    temperature: float,
    *,
    config: ModelConfig,
) -> Float[Array, " n"]:
    """lp of each target, padded."""
    h, _ = forward(params, cells, table, config)
    h = take(h.reshape(-1, h.shape[-1]), targets.cells)
    return at_targets(head(params, h, config), targets, temperature)[1]


class State(NamedTuple):
    """Of the trained leaves, all float32."""

    master: Leaves
    exp_avg: Leaves
    exp_avg_sq: Leaves


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
        self.trainable, self.chosen = list(trainable), choose(model.config, trainable)
        self.checkpoint_activations = checkpoint_activations
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
        arrays = {
            f"{kind}.{name}": np.array(array)
            for kind, leaves in self.tensors._asdict().items()
            for name, array in by_name(leaves, self.model.config, self.chosen).items()
        }
        return {"step": np.array(self.steps, np.int64), **arrays}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` gave. Raises BridgeError, and changes nothing, where an array is
        missing, left over or has another shape."""
        check_state(self.model.config, self.trainable, state)
        names = stacked_names(self.model.config)

        def given(kind: str, key: str, layers: tuple[int, ...] | None) -> Array:
            same = names[key]
            if layers is not None:
                same = [name for name in same if stacked(name)[1] in layers]
            arrays = [np.asarray(state[f"{kind}.{name}"], np.float32) for name in same]
            like = getattr(self.tensors, kind)[key]
            array = np.stack(arrays).reshape(like.shape)
            return jax.device_put(array, like.sharding, may_alias=False)

        self.tensors = State(
            *(
                {key: given(kind, key, layers) for key, layers in self.chosen}
                for kind in State._fields
            )
        )
        self.steps = int(state["step"])
        own = publish(self._own(), self.tensors.master, chosen=self.chosen, quick=self.model.quick)
        self.model.params.update(own)


@compiled(static_argnames="chosen")
def start(own: Leaves, *, chosen: Chosen) -> State:
    """Clause 7.9: masters at the model's values, moments at 0."""
    master = take_leaves(own, chosen)
    return State(master, *({k: jnp.zeros_like(m) for k, m in master.items()} for _ in range(2)))


@compiled(donate_argnums=0)
def add(total: Leaves, new: Leaves) -> Leaves:
    """The gradients of two batches of an update."""
    return jax.tree.map(jnp.add, total, new)


@compiled(static_argnames=("options", "chosen"), donate_argnums=(0, 2))
def update(
    state: State,
    grads: Leaves,
    own: Leaves,
    first_correction: float,
    second_correction: float,
    lr: float,
    *,
    options: AdamW,
    chosen: Chosen,
) -> tuple[State, Leaves, Array]:
    """Clauses 7.7 and 7.8: the new state, the model's leaves after it, and the gradients' norm.

    The corrections are 1 - beta^t, from float64 on the host: `optax.adamw` takes them in float32,
    which for a beta of 0.999 is off by 3e-5 at first. Its norm clipping lacks the 1e-6.
    """
    norm = optax.tree.norm(grads)
    if options.max_grad_norm is not None:
        scale = jnp.minimum(1, options.max_grad_norm / (norm + 1e-6))
        grads = jax.tree.map(lambda g: g * scale, grads)
    beta1, beta2 = options.betas
    m = optax.tree.update_moment(grads, state.exp_avg, beta1, 1)
    v = optax.tree.update_moment(grads, state.exp_avg_sq, beta2, 2)

    def moved(p: Array, m: Array, v: Array) -> Array:
        p = p - lr * options.weight_decay * p
        scale = jnp.sqrt(v / second_correction) + options.eps
        return p - lr * (m / first_correction) / scale

    master = jax.tree.map(moved, state.master, m, v)
    return State(master, m, v), _published(own, master, chosen), norm


@compiled(static_argnames="chosen", donate_argnums=0)
def publish(own: Leaves, master: Leaves, *, chosen: Chosen) -> Leaves:
    """The model computes with the master weights rounded to its dtype."""
    return _published(own, master, chosen)


def _published(own: Leaves, master: Leaves, chosen: Chosen) -> Leaves:
    # Copies: what the model holds and what the trainer holds are each given away at a step.
    return {key: leaf.copy() for key, leaf in substitute(own, master, chosen).items()}
