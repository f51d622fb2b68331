"""A decoder whose groups come and leave at any time gives each of them what it has alone.

Both of torch's steps, the plain one over padded tensors and the fused one over each row's own, are
driven through random lives and compared with the reference, which has one decoder a group.
"""

import copy
from contextlib import nullcontext
from dataclasses import dataclass, replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given

from bridge.config import parse_config
from bridge.contract import Sampling
from bridge.philox import uniforms
from bridge_conformance.cases import random_tensors
from bridge_conformance.strategies import SEEDS, models
from bridge_conformance.trial import Target, Trial
from bridge_ref.sampling import sample
from bridge_torch import decode, fused
from bridge_torch.backend import TorchBackend
from bridge_torch.linear import can_block

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = ["plain", "fused"] if fused.kernels() else ["plain"]


def by(step):
    """Decode by this step."""
    return patch.object(fused, "serves", lambda *_: False) if step == "plain" else nullcontext()


@dataclass
class Come:
    """Groups come, `widths[g]` rows of `prompts[g]`."""

    prompts: list[np.ndarray]
    widths: list[int]
    new: int


@dataclass
class Fed:
    """Rows are fed `ahead [k - 1, R]`, go back `back` timesteps of them, and those in `keep` are
    fed `tokens`."""

    group: np.ndarray  # of each row, from the first that ever came
    ahead: np.ndarray
    back: np.ndarray
    keep: np.ndarray
    tokens: np.ndarray


def life(seed, vocab):
    """Some twenty of these in turn, the first of them a `Come`."""
    rng = np.random.default_rng(seed)
    group, left, known, acts = np.zeros(0, int), np.zeros(0, int), 0, []
    for _ in range(rng.integers(4, 20)):
        if not len(group) or rng.random() < 0.3:
            count, new = rng.integers(1, 4), int(rng.integers(1, 9))
            prompts = [rng.integers(0, vocab, rng.integers(1, 8)) for _ in range(count)]
            widths = rng.integers(1, 5, count)
            acts.append(Come(prompts, widths.tolist(), new))
            group = np.append(group, np.repeat(known + np.arange(count), widths))
            left, known = np.append(left, np.full(widths.sum(), new - 1)), known + count
            continue
        rows = len(group)
        ahead = int(rng.integers(0, max(1, min(4, left.min() + 1)))) if rng.random() < 0.4 else 0
        back = rng.integers(0, ahead + 1, known)[group] * (rng.random() < 0.7)
        left = left - ahead + back
        keep = (left > 0) & (rng.random(rows) > rng.choice([0, 0.2, 0.6]))
        fed = [rng.integers(0, vocab, (n, rows)) for n in (ahead, 1)]
        acts.append(Fed(group, fed[0], back, keep, fed[1][0]))
        group, left = group[keep], left[keep] - 1
    return acts


def together(model, acts):
    """The logits after each act, of the rows left, by one decoder for all."""
    decoder, logits = None, []
    for act in acts:
        match act:
            case Come() if decoder is None:
                decoder = model.prefill(act.prompts, act.widths, act.new)
            case Come():
                decoder.admit(act.prompts, act.widths, act.new)
            case Fed():
                for tokens in act.ahead:
                    decoder.advance(tokens)
                decoder.drawn = np.zeros((len(act.group), len(act.ahead) + 1), int)
                decoder.advance(act.tokens, act.keep, act.back)
        logits.append(decoder.logits())
    return np.concatenate(logits)


def alone(model, acts):
    """The same by a decoder a group; one that goes back was never further."""
    decoders, logits = [], [np.zeros((0, model.config.vocab_size))]
    for act in acts:
        match act:
            case Come():
                for prompt, width in zip(act.prompts, act.widths, strict=True):
                    decoders.append([model.prefill([prompt], [width], act.new)])
            case Fed():
                for number, decoder in enumerate(decoders):
                    own = act.group == number
                    if not own.any():
                        continue
                    for tokens in act.ahead[:, own]:
                        decoder.append(copy.copy(decoder[-1]))
                        decoder[-1].advance(tokens)
                    now = decoder[len(decoder) - 1 - act.back[own][0]]
                    now.advance(act.tokens[own], act.keep[own])
                    decoder[:] = [now]
        logits += [decoder[-1].logits() for decoder in decoders]
    return np.concatenate(logits)


@given(models(magnitudes=("plain",)), SEEDS)
def test_groups_that_come_and_leave_have_what_they_have_alone(case, seed):
    case = replace(case, raw=case.raw | {"max_position_embeddings": 64})
    acts = life(seed, case.config.vocab_size)
    trial = Trial(Target(TorchBackend(), "cpu", "float32"), case)
    exact, own, *nudged = (alone(model, acts) for model in trial.references())
    allowed = trial.allowed(exact, own, nudged)
    for step in STEPS:
        with by(step):
            got = together(trial.model, acts)
        trial.same(got, exact, allowed, f"logits by the {step} step", acts)


def load(tied=False):
    config = parse_config(
        {
            "model_type": "llama",
            "vocab_size": 40,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": tied,
            "bridge": {
                "spec_version": "1.0",
                "kind": "attention",
                "num_heads": 2,
                "head_dim": 6,
                "layers": [0, 1],
                "norm_eps": 1e-6,
            },
        }
    )
    tensors = random_tensors(config, 0, "float32")
    return TorchBackend().load(config, tensors, device="cpu", dtype="float32")


@pytest.mark.parametrize("step", STEPS)
def test_nan_of_a_group_is_gone_with_it(step):
    """Its places go to others, who read none of what it left; nor do those that are there still."""

    def feed(rows, keep=None):
        decoder.advance(np.ones(rows, int), keep)
        return decoder.logits()

    model, prompts = load(), [np.arange(n) for n in (5, 9, 2, 1)]
    with by(step):
        decoder = model.prefill(prompts[:2], [2, 2], 8)
        alone = [model.prefill([prompt], [2], 8) for prompt in prompts]
    if step == "plain":
        decoder.cache.prefix.numpy()[:, :, 1] = np.nan
    else:
        decoder.cache.prefixes[2].numpy()[:] = np.nan
    for _ in range(3):
        logits = feed(4)
    assert np.isfinite(logits[:2]).all() and np.isnan(logits[2:]).all()
    decoder.admit(prompts[2:3], [2], 8)
    feed(6)
    feed(6, np.array([1, 1, 0, 0, 1, 1], bool))
    decoder.admit(prompts[3:], [2], 8)
    logits = feed(6).reshape(3, 2, -1)
    for group, fed, got in zip((0, 2, 3), (6, 3, 1), logits, strict=True):
        for _ in range(fed):
            alone[group].advance(np.ones(2, int))
        np.testing.assert_allclose(got, alone[group].logits(), atol=1e-5)


@pytest.mark.parametrize("step", STEPS)
def test_rows_draw_by_their_own_settings_whenever_they_came(step):
    """Clauses 6.2 and 6.9: with the seed, the number and the step of each row."""
    chosen = [Sampling(0.0), Sampling(1.3, seed=2**40), Sampling(0.8, top_k=4, seed=7)]
    with by(step):
        decoder = load().prefill([np.arange(3)], [2], 8, [4])
    for _ in range(3):
        decoder.advance(np.ones(2, int))
    decoder.admit([np.arange(6)], [3], 8, [9])
    by_row = [chosen[n] for n in (0, 1, 2, 1, 2)]
    counters = [(3, 0, 4), (3, 1, 4), (0, 0, 9), (0, 1, 9), (0, 2, 9)]
    want = []
    for logits, (at, row, prompt), own in zip(decoder.logits(), counters, by_row, strict=True):
        uniform = uniforms(own.seed, at, np.array([row]), np.array([prompt]))
        filters = {"temperature": own.temperature, "top_k": own.top_k, "top_p": None, "min_p": None}
        want += sample(logits[None], uniform, **filters).tolist()
    assert decoder.sample(by_row).tolist() == want
    decoder.sample(chosen[1])
    assert decoder.sample_ahead(by_row, 3, []).tolist() == [[token] for token in want]


@pytest.mark.skipif(not can_block("cpu", torch.float32), reason="torch has one layout here")
@pytest.mark.parametrize("tied", [False, True])
def test_weights_lie_as_the_number_of_rows_wants_and_stay_the_same(tied):
    model, fresh = load(tied), load(tied)
    stored = {name: tensor.tobytes() for name, tensor in model.tensors()}

    def blocked():
        packed = model.weights.packed()
        matrices = [packed.head, *(getattr(la, n) for la in packed.layers for n in fused.PRODUCTS)]
        return {matrix.weight.is_mkldnn for matrix in matrices}

    def said(model, widths, new):
        decoder, found = model.prefill([np.array([1, 2, 3])] * len(widths), widths, new), []
        for _ in range(3):
            found.append(decoder.logits())
            decoder.sample(Sampling(temperature=0))
            decoder.advance()
        return found

    short = said(model, [1], 20)
    assert blocked() == {True}  # so few tokens are not worth it
    with patch.object(decode, "PAYS", 20):
        long = said(model, [1], 20)
    assert blocked() == {False}
    np.testing.assert_allclose(long, short, rtol=0, atol=1e-5)
    wide = said(model, [2, 2], 20)
    assert blocked() == {True}
    np.testing.assert_array_equal(wide, said(fresh, [2, 2], 20))
    assert {name: tensor.tobytes() for name, tensor in model.tensors()} == stored
