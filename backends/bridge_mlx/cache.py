"""What a decoder remembers: keys and values, of prompts and of rows' own timesteps (chapter 4).

A prompt's are shared by the rows of its group. All rows write at the same slot, so what they said
ends alike, and rows that came later begin at a later one. Rows that end stay for a while in their
places, where nobody reads them: to let them go is to copy all others. What is fed ahead lies apart
until the host has waited for it, since MLX writes in place only what no work under way holds.

Axes: G prompts, P prefix slots, R rows left, C places computed, T own slots, K key heads, d width.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from jaxtyping import Bool, Int

from bridge.decoding.rows import GridPlan, Rows
from bridge_mlx.block import Grid
from bridge_mlx.model import Transformer

TIMESTEPS = 256  # reserved at a time: memory follows what rows have said, not what they may say
IDLE = 1 / 8  # the largest share of the places that may be without a row

KeysValues = tuple[mx.array, mx.array]


@dataclass(frozen=True)
class Reads:
    """Which slots one timestep reads, the same for all layers of a window. A mask is there only
    where rows differ."""

    prefix: slice
    own: slice
    ahead: slice  # of what is fed ahead
    of_prefix: Bool[mx.array, "G one one P"] | None = None
    of_own: Bool[mx.array, "C one one T"] | None = None


class Cache:
    """The state of a decoder between two timesteps; one without rows to begin with."""

    def __init__(self, model: Transformer) -> None:
        config = model.config
        self.layers = range(len(model.layers))
        self._no_slots = mx.zeros((0, config.num_key_value_heads, 0, config.head_dim), model.dtype)
        self._clear()

    def _clear(self) -> None:
        self.rows = Rows.none()  # that are left
        self.prefix: list[KeysValues] = [(self._no_slots, self._no_slots) for _ in self.layers]
        self.own: list[KeysValues] = list(self.prefix)  # [G, K, P, d] and [C, K, T, d]
        self.ahead: list[KeysValues] = []  # [C, K, timesteps, d], written up to `lead`
        self.clock = self.lead = 0  # slots of `own` that are written; timesteps of `ahead`
        self._lay(np.zeros(0, np.int64))

    def _lay(self, places: Int[np.ndarray, " R"]) -> None:
        """The rows lie at these of the places, in their order."""
        self.places, C = places, self.own[0][0].shape[0]
        # The row of each place; one without a row computes what the first row does, for nobody.
        self._row_at = np.zeros(C, np.int64)
        self._row_at[places] = np.arange(len(places))
        idle = len(places) < C
        self._to_places = mx.array(self._row_at) if idle else None
        self._to_rows = mx.array(places) if idle else None
        plan = GridPlan.of(self.rows.group)
        plan = replace(plan, line=self.rows.group, groups=len(self.rows.lengths))
        self.grid = Grid.planned(plan, (places, C) if idle else None)

    def computed(self, of_rows: mx.array) -> mx.array:
        """What is given a row, along the first axis, a place: R becomes C."""
        return of_rows if self._to_places is None else mx.take(of_rows, self._to_places, axis=0)

    def left(self, of_places: mx.array) -> mx.array:
        """What was computed at places, of the rows alone: C becomes R."""
        return of_places if self._to_rows is None else mx.take(of_places, self._to_rows, axis=0)

    @property
    def positions(self) -> Int[np.ndarray, " C"]:
        """Where the timestep that is due stands in the text of each place's row."""
        return self.rows.positions[self._row_at]

    def join(self, prefix: list[KeysValues], others: Rows) -> None:
        """Groups come, whose prompts were read so (clause 4.5). Empties the list `prefix`: what is
        in it is not kept twice."""
        rows, prompts = self.rows.compact()
        self._remake(rows.joined(others), prompts, 1, prefix)

    def leave(self, kept: Int[np.ndarray, " kept"]) -> None:
        """Only the rows at these of R, ascending, stay (clause 4.3)."""
        if len(kept) == 0:
            self._clear()
        elif len(kept) < len(self.rows):
            self.rows = self.rows.keep(kept)
            self._lay(self.places[kept])

    def reserve(self, timesteps: int) -> None:
        """Room for as many more, and few places without a row."""
        C, _, room, _ = self.own[0][0].shape
        if self.clock + timesteps > room or C - len(self.rows) > IDLE * C:
            self._remake(*self.rows.compact(), timesteps)

    def _remake(
        self,
        rows: Rows,
        prompts: Int[np.ndarray, " G"],
        timesteps: int,
        joining: list[KeysValues] | None = None,
    ) -> None:
        """The same for `rows`, which are those left, of these `prompts`, and then those that join.

        Slots that no row reads any more, and places without a row, are let go. One layer after the
        other, so that never more than one is there twice.
        """
        P = int(rows.lengths.max())
        first = self.clock - int(self.rows.steps.max(initial=0))  # before it nobody was there
        written = self.clock - first
        most = written + max(0, int(rows.left.max()))
        # Not one more, but a quarter more: all growth together copies four times the end at most.
        need = (written + timesteps) * 5 // 4 if written else timesteps
        room = min(-(-need // TIMESTEPS) * TIMESTEPS, most)
        fresh = len(rows) - len(self.rows)
        for i in self.layers:
            k, v = (_ending(_at(x, prompts), P) for x in self.prefix[i])
            if joining is not None:
                new_k, new_v = (_ending(x, P) for x in joining.pop(0))
                k, v = _beside(k, new_k), _beside(v, new_v)
            self.prefix[i] = k, v
            k, v = (
                mx.pad(
                    _at(x, self.places)[:, :, first : self.clock],
                    [(0, fresh), (0, 0), (0, room - written), (0, 0)],
                )
                for x in self.own[i]
            )
            self.own[i] = k, v
            mx.eval(self.prefix[i], self.own[i])
        self.rows, self.clock = rows, written
        self._lay(np.arange(len(rows)))

    def begin_ahead(self, timesteps: int) -> None:
        """So many timesteps will be fed before the host waits."""
        self.reserve(timesteps)
        C, K, _, d = self.own[0][0].shape
        room = mx.zeros((C, K, timesteps, d), self._no_slots.dtype)
        self.ahead = [(mx.array(room), mx.array(room)) for _ in self.layers]

    def end_ahead(self) -> None:
        """The host has waited: what was fed ahead goes to the rest, in place."""
        now = slice(self.clock, self.clock + self.lead)
        for kept, fed in zip(self.own, self.ahead, strict=True):
            for x, y in zip(kept, fed, strict=True):
                x[:, :, now] = y[:, :, : self.lead]
        self.clock, self.lead, self.ahead = now.stop, 0, []

    def write(self, i: int, k: mx.array, v: mx.array) -> None:
        """Keys and values `[C, K, d]` of the timestep that is due."""
        into, slot = (self.ahead, self.lead) if self.ahead else (self.own, self.clock)
        for x, new in zip(into[i], (k, v), strict=True):
            x[:, :, slot] = new

    def fed(self) -> None:
        """The timestep that was due is over."""
        self.rows = self.rows.fed(1)
        if self.ahead:
            self.lead += 1
        else:
            self.clock += 1

    def go_back(self, timesteps: Int[np.ndarray, " R"]) -> None:
        """Rows take back as many, the same number in a group (clause 4.7). Those that take back
        more than others move towards the end: only there is a slot the same time for all."""
        common = int(timesteps.min())
        self.clock -= common
        self.rows = self.rows.fed(-timesteps)
        for group in np.unique(self.rows.group[timesteps > common]):
            own = self.places[self.rows.group == group]
            places = slice(int(own[0]), int(own[-1]) + 1)
            later = int(timesteps[self.rows.group == group][0]) - common
            for pair in self.own:
                moved = [mx.contiguous(x[places, :, : self.clock - later]) for x in pair]
                mx.eval(moved)
                for x, y in zip(pair, moved, strict=True):
                    x[places, :, later : self.clock] = y

    def reads(self, window: int | None) -> Reads:
        """What the timestep that is due reads (clause 5.5). A window is counted back from it."""
        rows, now = self.rows, self.clock + self.lead
        P = self.prefix[0][0].shape[2]
        prefix, own = P - rows.lengths[rows.group], now - rows.steps  # the first that each reads
        if window is not None:
            own = np.maximum(own, now + 1 - window)
            prefix = np.clip(P + rows.steps + 1 - window, prefix, P)
        p0, t0, end = int(prefix.min()), int(own.min()), self.clock + (not self.ahead)
        lines = np.full(len(rows.lengths), p0)
        lines[rows.group] = prefix
        return Reads(
            slice(p0, P),
            slice(min(t0, end), end),
            slice(max(t0 - self.clock, 0), self.lead + 1) if self.ahead else slice(0, 0),
            _from(lines, p0, P),
            _from(own[self._row_at], t0, end),
        )

    def timesteps(
        self, i: int, reads: Reads
    ) -> Iterator[tuple[mx.array, mx.array, mx.array | None]]:
        """Keys, values and mask of the parts of a layer in which rows' own timesteps lie."""
        for pairs, slots, mask in (
            (self.own, reads.own, reads.of_own),
            (self.ahead, reads.ahead, None),
        ):
            if slots.start < slots.stop:
                k, v = pairs[i]
                yield k[:, :, slots], v[:, :, slots], mask


def _from(first: Int[np.ndarray, " X"], start: int, end: int) -> mx.array | None:
    """Of the slots from `start` to `end`, those not before each one's first: `[X, 1, 1, slots]`;
    None where that is all."""
    if start >= end or (first <= start).all():
        return None
    return mx.arange(start, end) >= mx.array(first)[:, None, None, None]


def _at(x: mx.array, places: Int[np.ndarray, " N"]) -> mx.array:
    """These of the first axis, ascending; without a copy where they are all."""
    return x if len(places) == x.shape[0] else mx.take(x, mx.array(places), axis=0)


def _beside(x: mx.array, new: mx.array) -> mx.array:
    """The one and then the other along the first axis."""
    return mx.concatenate([x, new]) if x.shape[0] else new


def _ending(x: mx.array, slots: int) -> mx.array:
    """Cut or padded before, so that the last slots stay the last."""
    more = slots - x.shape[2]
    if more > 0:
        return mx.pad(x, [(0, 0), (0, 0), (more, 0), (0, 0)])
    return x if more == 0 else mx.contiguous(x[:, :, -more:])
