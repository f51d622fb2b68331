"""A teacher-forced pass that is watched: where rows looked, how much blocks added, how sure rows
were.

The layers are those of `model`, one after the other, and of each only what is asked for is kept, so
that long answers of real models fit. It is no part of the contract: a view of the reference alone.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from bridge.config import ModelConfig
from bridge.contract import Sampling
from bridge_ref import ops
from bridge_ref.block import norm_ratio
from bridge_ref.model import Tensors, head, layer, rope_tables, teacher_forced
from bridge_ref.ops import Cache
from bridge_ref.precision import wide, wide_dtype
from bridge_ref.sampling import sampling_weights


class Watched(NamedTuple):
    """What `watch` saw, in the wide dtype; layers are those with a block, in order.

    `attention[l, n, s, b, b']` is p of clause 3.5; None for blocks that have no attention.
    """

    attention: Float[np.ndarray, "layers H S B B"] | None
    norm_ratios: Float[np.ndarray, " layers"]
    entropy: Float[np.ndarray, "B S"]


def watch(
    config: ModelConfig,
    tensors: Tensors,
    tokens: Int[np.ndarray, "B S"],
    groups: Int[np.ndarray, " B"],
    active: Bool[np.ndarray, "B S"],
    positions: Int[np.ndarray, "B S"],
    drawn: Bool[np.ndarray, "B S"],
    sampling: Sampling,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Watched:
    """One pass over a batch, as `forward` makes it.

    `drawn`: the active cells after which a token was drawn, whose `entropy` is that of what it was
    drawn from (clauses 6.3 to 6.6), in nats; 0 elsewhere. `progress` hears of layers done.
    """
    # What an inactive cell holds is not read; it need not even be a token.
    h, _ = ops.embedding(np.where(active, tokens, 0), tensors["model.embed_tokens.weight"])
    rope = rope_tables(config, positions, h.dtype)
    attend = teacher_forced(config, active, positions)
    weights, ratios = [], []
    for i in range(config.num_hidden_layers):
        h, cache = layer(config, tensors, i, h, groups, active, rope, attend)
        if (block := cache[-1]) is not None:
            ratios.append(norm_ratio(block))
            weights.append(rows_weights(block))
        progress(i + 1, config.num_hidden_layers)
    is_attention = config.bridge is not None and config.bridge.kind == "attention"
    return Watched(
        np.stack(weights) if is_attention and weights else None,
        np.array(ratios, wide_dtype(h.dtype)),
        entropy(config, tensors, h, drawn, sampling),
    )


def rows_weights(cache: Cache) -> Float[np.ndarray, "H S B B"] | None:
    """Clause 3.5: p of every head and timestep, wide, from what `bridge_block` gives for its
    backward. Rows of other groups, and inactive ones, have 0. None for P-Match (clause 8.1)."""
    active, _, kind, mix_cache, _ = cache
    if kind != "attention":
        return None
    *_, group_caches, _, _ = mix_cache
    B, S = active.shape
    weights = None
    for rows, (_, _, _, p, _) in group_caches:
        if weights is None:
            weights = np.zeros((p.shape[1], S, B, B), wide_dtype(p.dtype))
        weights[:, :, rows[:, None], rows] = wide(p).swapaxes(0, 1)
    return weights


def entropy(
    config: ModelConfig,
    tensors: Tensors,
    h: Float[np.ndarray, "B S D"],
    drawn: Bool[np.ndarray, "B S"],
    sampling: Sampling,
) -> Float[np.ndarray, "B S"]:
    """`-sum over kept tokens of p log p`, p being the weights of clauses 6.3 to 6.6 divided by
    their sum; 0 where not `drawn`. A timestep at a time, since a vocabulary is large."""
    found = np.zeros(drawn.shape, wide_dtype(h.dtype))
    for s in np.flatnonzero(drawn.any(axis=0)):
        rows = np.flatnonzero(drawn[:, s])
        logits, _ = head(config, tensors, h[rows, s : s + 1])
        w = sampling_weights(
            logits[:, 0],
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
        ).astype(np.float64)
        p = w / w.sum(axis=-1, keepdims=True)
        found[rows, s] = -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=-1)
    return found
