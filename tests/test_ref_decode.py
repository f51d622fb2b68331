"""Cached decoding in the reference: equal to teacher forcing, truly cached, and what it refuses."""

from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given

from bridge.contract import Sampling
from bridge.errors import BridgeError
from bridge_conformance import strategies
from bridge_ref import ops
from bridge_ref.backend import Reference
from bridge_ref.generate import generate

CASES = strategies.decode_cases()


def load(case):
    tensors = case.model.tensors("float64")
    return Reference().load(case.model.config, tensors, device="cpu", dtype="float64")


@given(CASES)
def test_cached_decoding_equals_teacher_forcing(case):
    model = load(case)
    rows, first = case.teacher_forced()
    want = model.logits(*rows.arguments)
    decoder = model.prefill(case.prompts, case.widths, case.steps)
    for step in range(case.steps):
        live = np.flatnonzero(case.alive[step])
        np.testing.assert_allclose(
            decoder.logits(), want[live, first[live] + step], rtol=1e-10, atol=1e-12
        )
        if step + 1 < case.steps:
            decoder.advance(case.forced[step, live], case.alive[step + 1, live])


@given(CASES)
def test_each_token_is_read_once(case):
    """A prompt once for all its rows (clause 4.2), then one token a row and step."""
    read = []

    def counted(tokens, weight, embedding=ops.embedding):
        read.append(tokens.shape)
        return embedding(tokens, weight)

    with patch.object(ops, "embedding", counted):
        decoder = load(case).prefill(case.prompts, case.widths, case.steps)
        assert read == [(1, n) for n in case.lengths]
        for step in range(1, case.steps):
            live = case.alive[step - 1]
            decoder.advance(case.forced[step - 1, live], case.alive[step, live])
            assert read[len(case.lengths) :][-1] == (case.alive[step].sum(), 1)
    assert len(read) == len(case.lengths) + case.steps - 1


@given(CASES)
def test_generation_is_what_teacher_forcing_would_draw(case):
    """Greedy: each token is the argmax of the logits of all that was said before it."""
    model, eos = load(case), {2, 3}
    said = generate(model, case.prompts, case.widths, case.steps, Sampling(temperature=0), eos)
    assert [len(group) for group in said] == list(case.widths)
    rows = [(g, row) for g, group in enumerate(said) for row in group]
    tokens = np.zeros((len(rows), max(case.lengths) + case.steps), np.int64)
    active = np.zeros(tokens.shape, bool)
    for b, (g, row) in enumerate(rows):
        assert all(token not in eos for token in row[:-1])
        assert row[-1] in eos or len(row) == case.steps
        fed = [*case.prompts[g], *row[:-1]]  # the last is a target, never an input
        tokens[b, : len(fed)], active[b, : len(fed)] = fed, True
    positions = np.maximum(np.cumsum(active, 1) - 1, 0)
    logits = model.logits(tokens, np.array([g for g, _ in rows]), active, positions)
    for b, (g, row) in enumerate(rows):
        start = len(case.prompts[g]) - 1
        cells = logits[b, start : start + len(row)]
        best = cells.max(axis=-1)
        assert (cells[np.arange(len(row)), row] >= best - 1e-9 * (1 + np.abs(best))).all()


def small_model():
    from test_ref_train import model

    return model()


def test_rows_of_a_prompt_draw_apart_and_again_the_same():
    prompts, sampling = [np.array([1, 2]), np.array([3])], Sampling(temperature=2.0, seed=9)
    said = generate(small_model(), prompts, [3, 2], 8, sampling)
    assert len({tuple(row) for row in said[0]}) == 3
    assert said == generate(small_model(), prompts, [3, 2], 8, sampling)
    assert said != generate(small_model(), prompts, [3, 2], 8, Sampling(temperature=2.0, seed=8))


REFUSED = {
    "prompt 1 is empty": ([[1], []], [1, 1], 4),
    "width must be 1 or above, not 0": ([[1]], [0], 4),
    "1 widths for 2 prompts": ([[1], [2]], [1], 4),
    "0 widths for 0 prompts": ([], [], 4),
    "prompt 0 has an id outside 0..10": ([[-1, 1]], [1], 4),
    "prompt 1 has an id outside 0..10": ([[1], [10, 11]], [1, 1], 4),
    "prompt 0 has 30 tokens, and with max_new_tokens 3 it goes past the context of 32": (
        [[1] * 30],
        [1],
        3,
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_decoded_is_refused(message):
    prompts, widths, max_new_tokens = REFUSED[message]
    with pytest.raises(BridgeError) as error:
        small_model().prefill([np.array(p, int) for p in prompts], widths, max_new_tokens)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_context_may_be_filled_to_the_brim():
    decoder = small_model().prefill([np.arange(10)], [2], 22)
    assert decoder.logits().shape == (2, 11)


def test_advance_needs_tokens_or_a_draw():
    decoder = small_model().prefill([np.arange(3)], [1], 4)
    with pytest.raises(BridgeError, match="call sample first"):
        decoder.advance()
