"""AdamW over the leaves that are trained (clauses 7.7 to 7.9), with optax's moments.

Masters and moments are float32, whatever the model's dtype, which computes with the masters rounded
to it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bridge.contract import AdamW
from bridge_jax.compiled import compiled
from bridge_jax.leaves import Chosen, Leaves, substitute, take_leaves

Array = jax.Array


class State(NamedTuple):
    """Of the trained leaves, all float32."""

    master: Leaves
    exp_avg: Leaves
    exp_avg_sq: Leaves


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
