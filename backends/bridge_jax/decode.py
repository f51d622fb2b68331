"""Cached decoding of interdependent rows (chapter 4).

A prompt is read once and its keys and values are shared by the rows of its group; each row's own
timesteps are in a cache that a step updates in place, each row at its own step. Rows that end stay
as blocked places, which groups that come may take, until what is left fits a smaller bucket; then
they leave every array. Nothing goes to the host but drawn tokens.

Axes: G lines of a grid for groups, R places for rows, P prefix slots, T own timesteps,
V vocabulary.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from bridge.contract import Sampling
from bridge.decoding.inputs import check_advance, check_next_tokens, check_prompts
from bridge.decoding.rows import Rows, left_padded
from bridge.decoding.uniforms import Uniforms, seeds_of
from bridge_jax import by_layer, steps
from bridge_jax.block import Layout
from bridge_jax.cache import Caches, cleared, installed, moved, slots_of
from bridge_jax.compiled import bucket
from bridge_jax.model import Transformer
from bridge_jax.pieces import STEPS, Piece, Pieces
from bridge_jax.sampling import LANES, Settings, sample
from bridge_jax.steps import AHEAD, Draws, Places, first_logits, of_tokens, rows_of

REACH = 64  # own timesteps that a cache has room for at first
PROMPTS = 8  # that are read at once
ENDS = 8  # end ids that a run has room for at least


class Decoder:
    """The rows left, in the order of their prompts' coming; see `bridge.contract.Decoder`."""

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[np.ndarray],
        widths: Sequence[int],
        max_new_tokens: int,
        prompt_ids: Sequence[int] | None = None,
    ) -> None:
        """Prefill (clause 4.2): the first groups come to a decoder that has none. Raises
        BridgeError for what clause 4.4 refuses."""
        self.model = model
        self.compute: Any = by_layer if model.by_layer else steps
        self.rows, none = Rows.none(), np.zeros(0, np.int64)
        self.layout = Layout(none, none, 1, 1, 1)
        self.drawn: np.ndarray | None = None  # [R, k], what was drawn at this step
        self.admit(prompts, widths, max_new_tokens, prompt_ids)

    @property
    def _ids(self) -> int:
        """V."""
        return -(-self.model.config.vocab_size // LANES) * LANES

    def admit(
        self,
        prompts: Sequence[np.ndarray],
        widths: Sequence[int],
        max_new_tokens: int,
        prompt_ids: Sequence[int] | None = None,
    ) -> None:
        """Groups that come (clauses 4.2 and 4.5)."""
        check_prompts(self.model.config, prompts, widths, max_new_tokens)
        before, new = len(self.rows), Rows.of(prompts, widths, max_new_tokens, prompt_ids)
        rows = self.rows.joined(new)
        then = self.layout.joined(new.group)
        if then is None:
            then = self._layout(rows)
        self._settle(rows, then)
        places, lines = then.places[before:], then.lines[before:]
        if before:
            coming = np.full(then.size, then.size, np.int32)
            coming[: len(places)] = places
            self.own = cleared(self.own, coming, quick=self.model.quick)
        for first, last in _some_at_once(len(prompts)):
            ours = (new.group >= first) & (new.group < last)
            of_prompts = np.full(then.size, -1, np.int32)
            of_prompts[places[ours]] = new.group[ours] - first
            self._read(prompts[first:last], np.unique(lines[ours]), of_prompts)
        self.drawn = None

    def _read(self, prompts: Sequence[np.ndarray], lines: np.ndarray, of_rows: np.ndarray) -> None:
        """Read prompts at width 1 for these lines; `of_rows` says by place whose each row is."""
        model = self.model
        slots = bucket(max(map(len, prompts)), STEPS)
        alone = Layout.of(np.arange(len(prompts)), model.floor)
        tokens, active, positions = map(alone.put, left_padded(prompts, slots))
        prompt = Piece(tokens.astype(np.int32), positions.astype(np.int32), active)
        batch = Pieces(prompt, Piece.none(), alone.grid)
        kept, logits = self.compute.read(
            self._weights,
            batch,
            model.rope(slots),
            config=model.config,
            sharding=model.of_cache,
            quick=model.quick,
        )
        where = alone.put(lines.astype(np.int32), self.layout.groups)
        self.prefix = installed(self.prefix, kept, where, quick=model.quick)
        self.next_logits = first_logits(self.next_logits, logits, of_rows, quick=model.quick)

    def _layout(self, rows: Rows) -> Layout:
        """The smallest in which these rows lie."""
        return Layout.of(rows.group, self.model.floor, self.model.floor)

    def _settle(self, rows: Rows, then: Layout) -> None:
        """These rows, of which those that are here stand first, lie as in `then` from now on."""
        now, here, model = self.layout, len(self.rows), self.model
        stay = then.keep(np.arange(here)).same(now)
        slots = bucket(int(rows.lengths.max()), STEPS)
        if stay and here:
            slots = max(slots, slots_of(self.prefix))
        timesteps = self._timesteps(rows, 1)
        if not here:
            self.prefix, self.own = (
                model.cache(then.groups, slots),
                model.cache(then.size, timesteps),
            )
            self.next_logits = model.zeros(then.size, self._ids)
        elif not stay or slots > slots_of(self.prefix):
            places, lines = np.zeros(then.size, np.int32), np.zeros(then.groups, np.int32)
            places[then.places[:here]], lines[then.lines[:here]] = now.places, now.lines
            self.prefix = moved(self.prefix, lines, slots, to_end=True, quick=model.quick)
            self.own = moved(self.own, places, timesteps, to_end=False, quick=model.quick)
            self.next_logits = rows_of(self.next_logits, places, quick=model.quick)
        self.rows, self.layout = rows, then
        self._draws_anew()

    def _shrink(self) -> None:
        """Once what is left fits fewer places, it moves there."""
        if len(self.rows):
            then = self._layout(self.rows)
            if then.measure < self.layout.measure:
                self._settle(self.rows, then)

    def _grow(self, more: int) -> None:
        """Room for as many timesteps more of each row."""
        timesteps = self._timesteps(self.rows, more)
        if timesteps > slots_of(self.own):
            places = np.arange(self.layout.size, dtype=np.int32)
            self.own = moved(self.own, places, timesteps, to_end=False, quick=self.model.quick)

    def _timesteps(self, rows: Rows, more: int) -> int:
        """How many own timesteps the cache needs room for, where each row is fed `more`."""
        need = int((rows.steps + np.minimum(more, rows.left)).max(initial=1))
        most = bucket(int(rows.limits.max(initial=1)), STEPS)
        return min(1 << (max(need, REACH) - 1).bit_length(), most)

    def _draws_anew(self) -> None:
        """Other rows are here, or at other places: tables and settings of before are of no use."""
        layout, put = self.layout, self.model.put
        self.uniforms = Uniforms(
            self.rows.row_ids, self.rows.prompt_ids, lambda table: put(layout.put(table.T).T)
        )
        self.settings: tuple[Any, Settings] | None = None

    def logits(self) -> Float[np.ndarray, "R V"]:
        """Next-token logits of the rows left, float32."""
        return jax.device_get(self.next_logits)[self.layout.places, : self.model.config.vocab_size]

    def logprobs(self, tokens: np.ndarray, temperature: float = 1.0) -> Float[np.ndarray, " R"]:
        """lp of a token for each row left, as its next, float32 (clause 6.10)."""
        given = check_next_tokens(self.model.config.vocab_size, len(self.rows), tokens, temperature)
        fed = self.layout.put(given.astype(np.int32))
        lp = of_tokens(self.next_logits, fed, temperature, quick=self.model.quick)
        return jax.device_get(lp)[self.layout.places]

    def sample(self, sampling: Sampling | Sequence[Sampling]) -> Int[np.ndarray, " R"]:
        """Draw the next token of each row left: int64. Does not advance."""
        return self.sample_ahead(sampling, 1, ())[:, 0]

    def sample_ahead(
        self, sampling: Sampling | Sequence[Sampling], steps: int, ends: Collection[int]
    ) -> Int[np.ndarray, "R k"]:
        """As clause 4.6 says, in one loop on the device."""
        # On a CPU it costs nothing to ask the host, and to be fed after one's end costs a step.
        ahead = 1 if self.model.by_layer else min(steps, AHEAD)
        draws, later = self._drawing(sampling, ahead, ends), []
        first = self._draw(draws)
        if ahead > 1 and len(self.rows):
            fed, columns = jax.device_get(self._run(first, draws, ahead - 1))
            self.rows, later = self.rows.fed(int(fed)), [columns[:, :fed]]
        drawn = np.concatenate([jax.device_get(first)[:, None], *later], axis=1)
        self.drawn = drawn[self.layout.places].astype(np.int64)
        return self.drawn.copy()

    def advance(
        self,
        tokens: np.ndarray | None = None,
        keep: np.ndarray | None = None,
        back: np.ndarray | None = None,
    ) -> None:
        """Go back (clause 4.7), and feed one token to each row kept (clauses 4.1 and 4.3)."""
        rows, V = self.rows, self.model.config.vocab_size
        kept, back = check_advance(V, rows.group, rows.left, self.drawn, tokens, keep, back)
        if tokens is None:
            assert self.drawn is not None
            tokens = self.drawn[:, -1]
        stay = np.flatnonzero(kept)
        self.rows, _ = rows.fed(-back).keep(stay).compact()
        self.drawn = None
        if len(stay) < len(rows):
            self.layout = self.layout.keep(stay)
            self._draws_anew()
            self._shrink()
        if len(stay):
            fed = self.model.put(self.layout.put(np.asarray(tokens)[stay].astype(np.int32)))
            self._step(fed)
            self.rows = self.rows.fed(1)

    def _drawing(
        self, sampling: Sampling | Sequence[Sampling], steps: int, ends: Collection[int] = ()
    ) -> Draws:
        """How the rows draw, from this step on."""
        rows, layout, put = self.rows, self.layout, self.model.put
        table, line = self.uniforms.at(rows.steps, seeds_of(sampling, len(rows)), steps)
        if self.settings is None or self.settings[0] != sampling:
            settings = Settings.of(sampling, len(rows))
            self.settings = sampling, Settings(*(put(layout.put(x)) for x in settings))
        ids = np.full(bucket(len(ends), ENDS), -1, np.int32)
        ids[: len(ends)] = sorted(ends)
        return Draws(table, line, self.settings[1], ids)

    def _draw(self, draws: Draws) -> jax.Array:
        """The next token of each place."""
        return sample(
            self.next_logits, draws.table, draws.line, draws.settings, quick=self.model.quick
        )

    def _step(self, tokens: jax.Array) -> None:
        """Feed each place its token."""
        self._grow(1)
        self.own, self.next_logits = self.compute.step(
            *self._now(), tokens, self._places(), config=self.model.config, quick=self.model.quick
        )

    def _run(self, tokens: jax.Array, draws: Draws, steps: int) -> tuple[jax.Array, jax.Array]:
        """Feed each place what it drew, and up to `steps` timesteps: how many they were, and what
        was drawn after each, `[R, AHEAD]`."""
        self._grow(steps)
        self.own, self.next_logits, drawn, fed = self.compute.run(
            *self._now(),
            self.next_logits,
            tokens,
            self._places(),
            draws,
            steps,
            config=self.model.config,
            quick=self.model.quick,
        )
        return fed, drawn

    @property
    def _weights(self) -> Any:
        """As they are now, in the form that `compute` reads."""
        weights = self.model.weights
        return weights.layers if self.model.by_layer else weights.merged(quick=self.model.quick)

    def _now(self) -> tuple[Any, Caches, Caches, jax.Array]:
        """What every step reads: weights, both caches, and the table of positions."""
        ends = self.rows.positions + self.rows.left
        return self._weights, self.own, self.prefix, self.model.rope(int(ends.max()))

    def _places(self) -> Places:
        rows, put = self.rows, self.layout.put
        numbers = (rows.steps, rows.left, rows.lengths[rows.group])
        steps, left, length = (put(x.astype(np.int32)) for x in numbers)
        return Places(self.layout.grid, put(np.ones(len(rows), bool)), steps, left, length)


def _some_at_once(prompts: int) -> Iterator[tuple[int, int]]:
    """From which prompt to which: at most `PROMPTS`, in numbers that are sizes of buckets."""
    first = 0
    while first < prompts:
        some = min(PROMPTS, 1 << (prompts - first).bit_length() - 1)
        yield first, first + some
        first += some
