"""A group's first timesteps computed once (clause 7.14): what `model` gives, from fewer cells.

The cells that `SharedPlan` names are one long row here, in which masks say who reads whom. `model`
is the definition; this shows that nothing is lost, and is a map for backends. N cells computed, of
B rows and S timesteps.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from bridge.config import ModelConfig
from bridge.decoding.shared import SharedPlan
from bridge_ref.attention import self_attention, self_attention_backward
from bridge_ref.block import cell_ratios
from bridge_ref.linear import Grads, Tensors
from bridge_ref.model import (
    add_grads,
    decoder,
    decoder_backward,
    head,
    head_backward,
    window_of,
)
from bridge_ref.ops import Cache
from bridge_ref.precision import wide_dtype


class Cells(NamedTuple):
    """What is computed: the shared cells group by group, then what each row has alone. A cell that
    pads either piece is not active."""

    active: Bool[np.ndarray, " N"]
    shared: Bool[np.ndarray, " N"]
    row: Int[np.ndarray, " N"]  # of a shared cell, its group's first
    group: Int[np.ndarray, " N"]
    timestep: Int[np.ndarray, " N"]
    token: Int[np.ndarray, " N"]
    position: Int[np.ndarray, " N"]
    places: Int[np.ndarray, "B S"]  # which of them each cell of the batch is

    @classmethod
    def of(
        cls,
        tokens: Int[np.ndarray, "B S"],
        groups: Int[np.ndarray, " B"],
        active: Bool[np.ndarray, "B S"],
        positions: Int[np.ndarray, "B S"],
    ) -> "Cells":
        """Those of a batch."""
        plan = SharedPlan.of(tokens, groups, active, positions)
        of = np.concatenate([plan.of_shared.ravel(), plan.of_alone.ravel()])
        row, timestep = np.divmod(np.maximum(of, 0), plan.timesteps)
        there = (of >= 0) & active[row, timestep]
        return cls(
            there,
            np.arange(len(of)) < plan.of_shared.size,
            row,
            plan.grid.line[row],
            timestep,
            np.where(there, tokens[row, timestep], 0),
            np.where(there, positions[row, timestep], 0),
            plan.places,
        )

    def allowed(self, window: int | None) -> Bool[np.ndarray, "N N"]:
        """Clauses 5.4 and 5.5: a cell reads what its group shares and what its own row has alone,
        up to its own timestep, within the window."""
        of_mine = self.shared | (self.row[:, None] == self.row)
        allowed = of_mine & (self.group[:, None] == self.group)
        allowed &= (self.timestep <= self.timestep[:, None]) & self.active & self.active[:, None]
        if window is not None:
            allowed &= self.position[:, None] - self.position < window
        return allowed

    @property
    def met(self) -> Int[np.ndarray, " N"]:
        """The block reads across the cells of a group at one timestep (clause 3.4): a number for
        each such set. A shared cell is one by itself, as at width 1."""
        return self.group * (self.timestep.max(initial=0) + 1) + self.timestep


def forward(
    config: ModelConfig,
    tensors: Tensors,
    tokens: Int[np.ndarray, "B S"],
    groups: Int[np.ndarray, " B"],
    active: Bool[np.ndarray, "B S"],
    positions: Int[np.ndarray, "B S"],
) -> tuple[Float[np.ndarray, "B S V"], Cache]:
    """As `model.forward`: logits of a shared cell are those of each row."""
    cells = Cells.of(tokens, groups, active, positions)
    h, decoder_cache = computed(config, tensors, cells)
    logits, head_cache = head(config, tensors, h)
    return logits[cells.places, 0], (decoder_cache, head_cache, cells, active)


def backward(config: ModelConfig, dlogits: Float[np.ndarray, "B S V"], cache: Cache) -> Grads:
    """As `model.backward`. A shared cell's gradient is the sum of what its rows' losses give it."""
    decoder_cache, head_cache, cells, active = cache
    dcells = np.zeros((len(cells.active), 1, dlogits.shape[-1]), dlogits.dtype)
    np.add.at(dcells[:, 0], cells.places[active], dlogits[active])
    dh, grads = head_backward(config, dcells, head_cache)
    return add_grads(grads, decoder_backward(config, dh, decoder_cache, attend_backward))


def norm_ratios(
    config: ModelConfig,
    tensors: Tensors,
    tokens: Int[np.ndarray, "B S"],
    groups: Int[np.ndarray, " B"],
    active: Bool[np.ndarray, "B S"],
    positions: Int[np.ndarray, "B S"],
) -> Float[np.ndarray, " blocks"]:
    """As `model.norm_ratios`: a shared cell counts once a row."""
    cells = Cells.of(tokens, groups, active, positions)
    h, (_, caches) = computed(config, tensors, cells)
    ratios = [cell_ratios(cache[-1])[cells.places, 0] for cache in caches if cache[-1] is not None]
    means = [ratio[active].sum() / max(active.sum(), 1) for ratio in ratios]
    return np.array(means, wide_dtype(h.dtype))


def computed(
    config: ModelConfig, tensors: Tensors, cells: Cells
) -> tuple[Float[np.ndarray, "N one D"], Cache]:
    """The residual stream after the last layer. Every cell is a row of one timestep, so that the
    block, which knows rows, reads across those that meet; attention puts them into a line."""
    windows = {window_of(config, i) for i in range(config.num_hidden_layers)}
    allowed = {window: cells.allowed(window)[None] for window in windows}

    def attend(i: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, Cache]:
        q, k, v = (x.swapaxes(0, 1) for x in (q, k, v))
        y, cache = self_attention(q, k, v, allowed[window_of(config, i)])
        return y.swapaxes(0, 1), cache

    token, active, position = (x[:, None] for x in (cells.token, cells.active, cells.position))
    return decoder(config, tensors, token, cells.met, active, position, attend)


def attend_backward(
    dy: Float[np.ndarray, "N one I"], cache: Cache
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys and values of a shared cell get the sum over all cells that read them."""
    dq, dk, dv = self_attention_backward(dy.swapaxes(0, 1), cache)
    return dq.swapaxes(0, 1), dk.swapaxes(0, 1), dv.swapaxes(0, 1)
