"""The cells of a teacher-forced batch that are computed: what rows share, once (clause 7.14).

A batch `[B, S]` is two pieces: `[G, P]` of the timesteps that the rows of a group share, and
`[B, T]` of those that each has alone. Layers see the cells of both flat, one piece after the other,
`n = G * P + B * T`; only attention and the block know which is which. Made once a call.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from jaxtyping import Bool, Float, Int

from bridge.decoding.rows import causal_alone
from bridge.decoding.shared import SharedPlan
from bridge_mlx.attention import Rope, attend
from bridge_mlx.block import Grid, Sharing

Masks = Mapping[int | None, Bool[mx.array, "R one S K"] | None]  # by window; None: causal


@dataclass(frozen=True)
class Cells:
    """What the layers need to know of a batch."""

    ids: Int[mx.array, " n"]  # 0 where not active
    places: Int[np.ndarray, "B S"]  # which of the n each cell of the batch is
    pieces: tuple[tuple[int, int], ...]  # rows and timesteps of each piece that has any
    masks: tuple[Masks, ...]  # of each of these
    line: Int[mx.array, " B"]  # the group of each row
    sharing: Sharing
    rope: Float[mx.array, "two n d"]
    share: Float[mx.array, " n"]  # of each cell in a mean over the batch's active cells

    @classmethod
    def of(
        cls,
        tokens: Int[np.ndarray, "B S"],
        groups: Int[np.ndarray, " B"],
        active: Bool[np.ndarray, "B S"],
        positions: Int[np.ndarray, "B S"],
        rope: Rope,
        windows: Iterable[int | None],
    ) -> "Cells":
        """Of a batch, whose cells that are not active may hold anything."""
        plan = SharedPlan.of(tokens, groups, active, positions)
        G, B, T, line = plan.grid.groups, len(groups), plan.alone, plan.grid.line
        P = max(plan.shared, int(T == 0))  # a batch without an active cell has one that is not
        of_shared = np.pad(plan.of_shared, ((0, 0), (0, P - plan.shared)), constant_values=-1)
        found = np.concatenate([of_shared.ravel(), plan.of_alone.ravel()])
        on = (found >= 0) & active.ravel()[found]
        at = np.where(on, positions.ravel()[found], 0)
        rope.reserve(int(at.max(initial=0)) + 1)

        def apart(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            """What is shared; and of each row what it shares, and then what it has alone."""
            shared = x[: G * P].reshape(G, P)
            return shared, np.concatenate([shared[line], x[G * P :].reshape(B, T)], axis=1)

        (on_shared, on_rows), (at_shared, at_rows) = apart(on), apart(at)
        whole = ((G, P, on_shared, at_shared), (B, T, on_rows, at_rows))
        pieces = [piece for piece in whole if piece[1]]
        on_alone = on[G * P :].reshape(B, T)
        sharing = Sharing.of(
            Grid.planned(plan.grid), None if on_alone.all() else to_device(on_alone), T
        )
        share = np.concatenate([np.repeat(np.bincount(line), P), np.ones(B * T)]) * on
        return cls(
            ids=to_device(np.where(on, tokens.ravel()[found], 0).astype(np.int32)),
            places=plan.places,
            pieces=tuple((rows, S) for rows, S, _, _ in pieces),
            masks=tuple(
                {window: _mask(readable, place, S, window) for window in windows}
                for _, S, readable, place in pieces
            ),
            line=to_device(line.astype(np.int32)),
            sharing=replace(sharing, active=None if on.all() else to_device(on), shared=G * P),
            rope=rope(at),
            share=to_device((share / max(share.sum(), 1)).astype(np.float32)),
        )

    def attend(
        self,
        q: Float[mx.array, "n heads d"],
        k: Float[mx.array, "n kv_heads d"],
        v: Float[mx.array, "n kv_heads d"],
        window: int | None,
    ) -> Float[mx.array, "n heads_d"]:
        """Causal attention over active cells inside the window (clauses 5.4 and 5.5). A cell that
        a row has alone reads those that its group shares, and then the row's own."""
        qs, ks, vs = (self._apart(x) for x in (q, k, v))
        if len(self.pieces) == 2:
            ks[1], vs[1] = self._behind(*ks), self._behind(*vs)
        parts = [
            attend(*of_piece, masks[window]).reshape(-1, q.shape[1] * q.shape[2])
            for of_piece, masks in zip(zip(qs, ks, vs, strict=True), self.masks, strict=True)
        ]
        out = parts[0] if len(parts) == 1 else mx.concatenate(parts)
        active = self.sharing.active
        return out if active is None else mx.where(active[:, None], out, 0)

    def _apart(self, x: Float[mx.array, "n heads d"]) -> list[mx.array]:
        """`[rows, timesteps, heads, d]` of each piece. None is without cells, by the number of
        which MLX would divide in some gradients."""
        parts = [x] if len(self.pieces) == 1 else mx.split(x, [self.sharing.shared])
        return [
            part.reshape(*piece, *x.shape[1:])
            for part, piece in zip(parts, self.pieces, strict=True)
        ]

    def _behind(
        self, shared: Float[mx.array, "G P heads d"], alone: Float[mx.array, "B T heads d"]
    ) -> Float[mx.array, "B P_T heads d"]:
        """What rows have alone, each behind what its group shares, whose gradient adds up over the
        rows in float32."""
        wide = shared.astype(mx.float32)
        if self.sharing.grid.to_grid is None:  # equal contiguous groups
            G, B = len(shared), len(alone)
            rows = mx.broadcast_to(wide[:, None], (G, B // G, *shared.shape[1:]))
            rows = rows.reshape(B, *shared.shape[1:])
        else:
            rows = mx.take(wide, self.line, axis=0)
        return mx.concatenate([rows.astype(shared.dtype), alone], axis=1)


def _mask(
    active: Bool[np.ndarray, "R K"], positions: Int[np.ndarray, "R K"], S: int, window: int | None
) -> Bool[mx.array, "R one S K"] | None:
    """Which of K cells the last S read; None where causality says it all."""
    if causal_alone(active, positions, window):
        return None
    K = active.shape[1]
    mask = mx.tri(S, K, K - S, dtype=mx.bool_) & to_device(active)[:, None, :]
    if window is not None:
        place = to_device(positions.astype(np.int32))
        mask = mask & (place[:, K - S :, None] - place[:, None, :] < window)
    # Every cell may read itself, so that no softmax is empty; inactive ones give 0 below.
    return mx.expand_dims(mask | mx.eye(S, K, K - S, dtype=mx.bool_), 1)


def to_device(x: np.ndarray) -> mx.array:
    """The same numbers, in the same dtype."""
    return mx.array(x)
