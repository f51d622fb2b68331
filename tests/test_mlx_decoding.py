"""Decoding on MLX while groups come, rows end, steps are drawn ahead and taken back: the numbers
against the reference, and what it may cost."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.config import parse_config
from bridge.contract import Sampling
from bridge.philox import uniforms
from bridge_conformance.cases import random_tensors
from bridge_ref.backend import Reference
from bridge_ref.sampling import sample as reference_sample

mx = pytest.importorskip("mlx.core")

from test_mlx import PROMPT, RAW, graph_of, load  # noqa: E402

from bridge_mlx import cache as caches  # noqa: E402
from bridge_mlx.backend import MlxBackend  # noqa: E402

SAMPLINGS = (
    Sampling(temperature=0.0),
    Sampling(temperature=1.0, seed=3),
    Sampling(temperature=0.7, top_k=5, seed=9),
    Sampling(temperature=1.2, top_p=0.8, seed=1),
)
ROUNDING = 1e-3  # of logits that are about 1; a wrong formula is off by a hundred times as much


class Beside:
    """The same rows decoded by MLX and by the reference, which is fed what MLX drew."""

    def __init__(self, seed, window, timesteps):
        raw = {**RAW, "model_type": "mistral", "sliding_window": window} if window else RAW
        config, self.random = parse_config(raw), np.random.default_rng(seed)
        tensors = random_tensors(config, seed, "float32")
        exact = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
        mlx = MlxBackend().load(config, tensors, device="cpu", dtype="float32")
        reference = Reference().load(config, exact, device="cpu", dtype="float64")
        groups = self.groups()
        self.mlx, self.reference = mlx.prefill(*groups), reference.prefill(*groups)

    def groups(self):
        """Prompts, widths, how many tokens a row may have, and the prompts' numbers."""
        count = self.random.integers(1, 3)
        prompts = [self.random.integers(0, 40, self.random.integers(1, 9)) for _ in range(count)]
        widths = self.random.integers(1, 7, count).tolist()
        numbers = self.random.integers(0, 100, count).tolist()
        return prompts, widths, int(self.random.integers(1, 16)), numbers

    def admit(self):
        groups = self.groups()
        self.mlx.admit(*groups)
        self.reference.admit(*groups)

    def draw(self, sampling, steps, ends):
        """Draws of several steps, each of which must be what the rule gives there."""
        decoder, rows = self.reference, self.reference.rows
        drawn = self.mlx.sample_ahead(sampling, steps, ends)
        R, k = drawn.shape
        assert len(rows) == R and 1 <= k <= steps
        of = [sampling] * R if isinstance(sampling, Sampling) else sampling
        alive = np.ones(R, bool)
        for column in range(k):
            seeds = np.array([one.seed for one in of], np.uint64)
            u = uniforms(seeds, decoder.rows.steps, rows.row_ids, rows.prompt_ids)
            for r in range(R):
                if not alive[r]:
                    assert drawn[r, column] == -1
                    continue
                assert follows(decoder.next_logits[r], u[r], of[r], drawn[r, column])
            if column < k - 1:
                alive &= ~np.isin(drawn[:, column], ends) & (decoder.rows.left >= 1)
                decoder._feed(drawn[:, column], alive)
        decoder.drawn = drawn
        return drawn

    def advance(self, drawn, leaving, returning):
        """Go on with what was drawn in some column, the same in a group, or with other tokens."""
        rows, (R, k) = self.reference.rows, drawn.shape
        back = np.zeros(R, np.int64)
        for group in np.unique(rows.group):
            if self.random.random() < returning:
                back[rows.group == group] = self.random.integers(0, k)
        tokens = drawn[np.arange(R), k - 1 - back]
        keep = (tokens >= 0) & (rows.left + back >= 1) & (self.random.random(R) >= leaving)
        tokens = np.where(self.random.random(R) < 0.5, tokens, self.random.integers(0, 40, R))
        self.mlx.advance(tokens, keep, back)
        self.reference.advance(tokens, keep, back)

    def compare(self):
        got, want = self.mlx.logits(), self.reference.logits()
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, atol=ROUNDING, rtol=ROUNDING)
        for name in ("steps", "limits", "positions", "row_ids", "prompt_ids"):
            of_mlx, of_reference = (
                getattr(decoder, "cache", decoder).rows for decoder in (self.mlx, self.reference)
            )
            assert getattr(of_mlx, name).tolist() == getattr(of_reference, name).tolist()


def follows(logits, uniform, sampling, token):
    """Whether the rule draws this token, or would, were the uniform a rounding larger or less."""
    if sampling.temperature == 0:
        return logits[token] >= logits.max() - ROUNDING
    filters = {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    exact, least, most = (
        reference_sample(logits[None].astype(np.float32), np.float32([uniform + moved]), **filters)
        for moved in (0, -1e-4, 1e-4)
    )
    return token == exact[0] or least[0] <= token <= most[0]


@settings(max_examples=15)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([None, 3, 6]),
    st.sampled_from([2, 5, 256]),
    st.sampled_from([0.0, 0.1, 0.4]),
    st.sampled_from([0.0, 0.4]),
)
def test_whatever_comes_ends_and_goes_back_the_numbers_are_the_references(
    seed, window, timesteps, leaving, returning
):
    """Clauses 4.1 to 4.7 and 6.9, at random: prompts of several lengths, windows, rows out of step,
    settings a row, caches that grow at once or seldom."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caches, "TIMESTEPS", timesteps)
        both = Beside(seed, window, timesteps)
        for _ in range(10):
            both.compare()
            rows = len(both.reference.rows)
            if rows == 0 or both.random.random() < 0.25:
                both.admit()
                both.compare()
                rows = len(both.reference.rows)
            sampling = [SAMPLINGS[i] for i in both.random.integers(0, len(SAMPLINGS), rows)]
            sampling = sampling if both.random.random() < 0.5 else sampling[0]
            ends = both.random.choice(40, both.random.integers(0, 8), replace=False).tolist()
            drawn = both.draw(sampling, int(both.random.integers(1, 7)), ends)
            both.advance(drawn, leaving, returning)


def addresses(decoder):
    """Where each cache of rows' own timesteps lies in memory."""
    arrays = [x for layer in decoder.cache.own for x in layer]
    return [np.array(x, copy=False).__array_interface__["data"][0] for x in arrays]


def test_what_is_fed_ahead_is_written_in_place_in_the_end():
    decoder = load().prefill([PROMPT], [4], 200)
    decoder.advance(np.zeros(4, np.int64))
    decoder.logits()
    before = addresses(decoder)
    for _ in range(3):
        decoder.sample_ahead(Sampling(), 8, ())
        decoder.advance()
        decoder.logits()
    assert addresses(decoder) == before


def test_steps_ahead_wait_for_the_host_once_and_their_graphs_do_not_grow(monkeypatch):
    decoder = load().prefill([PROMPT, PROMPT[:4]], [4, 2], 200)
    sizes, evaluate, wait, waits = [], mx.async_eval, mx.eval, []

    def spy(*arrays):
        flat = [x for a in arrays for x in ([a] if isinstance(a, mx.array) else sum(a, ()))]
        sizes.append(graph_of(flat))
        evaluate(*arrays)

    decoder.sample_ahead(Sampling(), 20, [39])  # the table of draws and room for 20 are there
    decoder.advance(np.zeros(6, np.int64), back=np.full(6, 19))
    decoder.logits()
    monkeypatch.setattr(mx, "async_eval", spy)
    monkeypatch.setattr(mx, "eval", lambda *arrays: (waits.append(arrays), wait(*arrays)))
    assert decoder.sample_ahead(Sampling(), 20, [39]).shape == (6, 20)
    assert len(sizes) == 19 and not waits
    # The first knows of no row that had ended before; the last writes the last of the room.
    assert len(set(sizes[1:-1])) == 1 and 10 < sizes[-1] <= sizes[-2]


def test_rows_in_step_need_no_mask_and_an_eighth_may_be_idle():
    decoder = load().prefill([PROMPT] * 2, [8, 8], 40)
    cache = decoder.cache
    computed = alive = 0
    while len(cache.rows):
        reads = cache.reads(None)
        assert reads.of_prefix is None and reads.of_own is None
        computed, alive = computed + cache.own[0][0].shape[0], alive + len(cache.rows)
        keep = np.arange(len(cache.rows)) != len(cache.rows) // 2
        decoder.advance(np.zeros(len(keep), np.int64), keep)
    assert alive >= computed * 7 / 8


def test_a_row_that_ends_copies_nothing_while_few_are_idle():
    decoder = load().prefill([PROMPT], [16], 40)
    decoder.advance(np.zeros(16, np.int64))
    decoder.logits()
    before = addresses(decoder)
    decoder.advance(np.zeros(16, np.int64), np.arange(16) != 5)
    decoder.advance(np.zeros(15, np.int64), np.arange(15) != 9)
    assert decoder.logits().shape == (14, 40)
    assert addresses(decoder) == before
    decoder.advance(np.zeros(14, np.int64), np.arange(14) != 9)
    assert {x.shape[0] for layer in decoder.cache.own for x in layer} == {13}


def test_groups_that_come_and_go_leave_no_slots_behind():
    """What lies before every row left is let go as room is made, however long a decoder runs."""
    decoder = load(max_position_embeddings=64).prefill([PROMPT[:4]], [2], 40)
    for turn in range(30):
        if turn % 3 == 0:
            decoder.admit([PROMPT[: 1 + turn % 7]], [2], 10)
        rows = decoder.cache.rows
        oldest = rows.steps == rows.steps.max()
        keep = ~oldest if len(np.unique(rows.group)) > 3 else np.ones(len(rows), bool)
        decoder.sample_ahead(Sampling(), 3, ())
        decoder.advance(np.zeros(len(rows), np.int64), keep, np.full(len(rows), 2))
    assert decoder.cache.own[0][0].shape[2] <= 64 and decoder.cache.clock <= 64


def test_float32_is_meant_unless_the_user_says_otherwise():
    said = "import os, bridge_mlx; print(os.environ['MLX_ENABLE_TF32'])"
    for given_, want in ((None, "0"), ("1", "1")):
        environment = {k: v for k, v in os.environ.items() if k != "MLX_ENABLE_TF32"}
        environment |= {} if given_ is None else {"MLX_ENABLE_TF32": given_}
        run = subprocess.run(
            [sys.executable, "-c", said], env=environment, capture_output=True, text=True
        )
        assert run.stdout.strip() == want, run.stderr
    assert load().free_bytes() is None  # a CPU's memory is the machine's
