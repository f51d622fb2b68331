"""A whole training step (chapter 7): loss, gradients, clipping, AdamW.

A batch holds whole groups (clause 7.3): through the blocks every row's loss has a gradient in every
row of its group, so a group may not be split over two batches. An update may be made of several
batches (clause 7.10).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from bridge.config import ModelConfig
from bridge.contract import SFT, AdamW, Batch, Objective
from bridge.decoding.inputs import (
    add_metrics,
    check_batch,
    check_state,
    check_temperature,
    check_trainable,
    default_positions,
    micro_batches,
)
from bridge_ref.losses import Metrics, loss, target_logprobs
from bridge_ref.model import Tensors, backward, forward
from bridge_ref.optim import AdamWState, clip_by_global_norm
from bridge_ref.precision import rounded, wide


def loss_and_grads(
    config: ModelConfig,
    tensors: Tensors,
    batch: Batch,
    objective: Objective,
    trainable: Sequence[str],
    count: int | None = None,
) -> tuple[Metrics, dict[str, np.ndarray]]:
    """Clauses 7.1 to 7.5: metrics, and the gradient of each tensor named, wide.

    Positions not given are the default ones of clause 2.4. `count`: see `losses.loss`. Raises
    BridgeError for a batch whose shapes disagree, that has no target, or lacks what the objective
    reads.
    """
    check_trainable(tensors, trainable)
    check_batch(batch, objective, config.vocab_size)
    positions = default_positions(batch.active) if batch.positions is None else batch.positions
    logits, cache = forward(config, tensors, batch.tokens, batch.groups, batch.active, positions)
    metrics, dlogits = loss(objective, logits, batch, count)
    grads = backward(config, dlogits, cache)
    return metrics, {name: wide(grads[name]) for name in trainable}


def logprobs(
    config: ModelConfig, tensors: Tensors, batch: Batch, temperature: float
) -> Float[np.ndarray, "B S"]:
    """Clause 7.12: lp of each target at the temperature, wide; 0 where there is none."""
    check_batch(batch, SFT(), config.vocab_size)
    check_temperature(temperature)
    positions = default_positions(batch.active) if batch.positions is None else batch.positions
    logits, _ = forward(config, tensors, batch.tokens, batch.groups, batch.active, positions)
    return target_logprobs(logits, batch, temperature)


class ReferenceTrainer:
    """Updates a model's trainable tensors, and owns their optimizer state (clause 7.9)."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: dict[str, np.ndarray],
        objective: Objective,
        optimizer: AdamW,
        trainable: Sequence[str],
    ) -> None:
        """`tensors` is the model's own dict: each step replaces what it holds by new arrays."""
        check_trainable(tensors, trainable)
        self.config, self.tensors = config, tensors
        self.objective, self.optimizer = objective, optimizer
        self.adamw = AdamWState({name: tensors[name] for name in trainable})

    def step(self, batch: Batch | Sequence[Batch], *, lr: float | None = None) -> Metrics:
        """One update, of one batch or accumulated over several (clause 7.10); the loss's metrics,
        and `grad_norm` before clipping."""
        batches, count = micro_batches(batch, self.objective, self.config.vocab_size)
        names = list(self.adamw.master)
        parts, grads = [], {name: np.zeros_like(self.adamw.master[name]) for name in names}
        for part in batches:
            metrics, added = loss_and_grads(
                self.config, self.tensors, part, self.objective, names, count
            )
            parts.append(metrics)
            grads = {name: grads[name] + added[name] for name in names}
        grads, norm = clip_by_global_norm(grads, self.optimizer.max_grad_norm)
        now = self.optimizer if lr is None else replace(self.optimizer, lr=lr)
        self.adamw.update(grads, now)
        self._publish()
        return {**add_metrics(parts), "grad_norm": norm}

    def state(self) -> dict[str, np.ndarray]:
        """Step count, master weights and moments, by name."""
        return self.adamw.state()

    def array(self, key: str) -> np.ndarray:
        """One array of the state."""
        return self.adamw.array(key)

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from what `state` gave; the model takes the master weights' values. Raises
        BridgeError, and changes nothing, where an array is missing, left over or has another shape.
        """
        check_state(self.config, self.adamw.master, state)
        self.adamw.restore(state)
        self._publish()

    def _publish(self) -> None:
        """The model computes with the master weights rounded to its dtype."""
        for name, master in self.adamw.master.items():
            self.tensors[name] = rounded(master, self.tensors[name].dtype)
