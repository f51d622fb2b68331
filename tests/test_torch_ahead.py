"""torch's loop on the device, run on the CPU: one turn at a time, and as a graph replays it, where
a plain call stands in for what CUDA launches."""

from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.config import parse_config
from bridge.contract import Sampling
from bridge_conformance.cases import random_tensors
from bridge_conformance.runner import run
from bridge_torch import ahead, decode, fused
from bridge_torch.ahead import Ahead, bucket
from bridge_torch.backend import TorchBackend

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = parse_config(
    {
        "model_type": "mistral",
        "vocab_size": 12,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "sliding_window": 5,
        "tie_word_embeddings": False,
        "bridge": {
            "spec_version": "1.0",
            "kind": "attention",
            "num_heads": 2,
            "head_dim": 8,
            "layers": [0, 1],
            "norm_eps": 1e-6,
        },
    }
)
MODEL = TorchBackend().load(
    CONFIG, random_tensors(CONFIG, 0, "float64"), device="cpu", dtype="float64"
)


class Called:
    """In place of a graph: what is captured is called, at first too, and all is put back."""

    made = 0

    def __init__(self, call, state):
        Called.made += 1
        before = [tensor.clone() for tensor in state]
        call()
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)
        self.call = call

    def __call__(self):
        self.call()


@contextmanager
def running_ahead(captured):
    """Decoders run ahead, on the plain step; `captured`: in buckets, as by graphs."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(fused, "serves", lambda *_: False))
        stack.enter_context(patch.object(ahead, "serves", lambda *_: True))
        stack.enter_context(patch.object(ahead, "Graph", Called))
        stack.enter_context(patch.object(decode, "Ahead", lambda w, _: Ahead(w, captured)))
        yield


@pytest.mark.parametrize("captured", [False, True])
def test_it_conforms(captured):
    checks = ["steps_ahead_are_those_of_one_at_a_time", "going_back_leaves_nothing_behind"]
    checks += ["what_may_not_follow_a_table_is_refused"]
    with running_ahead(captured):
        report = run(
            "torch", device="cpu", dtypes=["float32"], profile="ci", checks=checks, workers=1
        )
    assert report.ok, report.failures[0].message


def texts(k, prompts, widths, limit, samplings, ends):
    """What each row says, `k` tokens at a time."""
    decoder = MODEL.prefill(prompts, widths, limit)
    said, left = [[] for _ in range(sum(widths))], np.arange(sum(widths))
    while len(left):
        table = decoder.sample_ahead([samplings[row] for row in left], k, ends)
        for row, tokens in zip(left, table, strict=True):
            said[row] += [int(token) for token in tokens if token >= 0]
        keep = table[:, -1] >= 0
        keep &= ~np.isin(table[:, -1], ends) & (np.array([len(said[r]) for r in left]) < limit)
        decoder.advance(keep=keep)
        left = left[keep]
    return said


@settings(max_examples=10)
@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=3),
    st.integers(1, 9),
    st.lists(st.integers(0, 11), max_size=2),
    st.sampled_from([2, 3, 8, 70]),
    st.booleans(),
    st.integers(0, 99),
)
def test_any_number_of_steps_says_the_same(widths, limit, ends, k, captured, seed):
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 12, rng.integers(1, 9)) for _ in widths]
    kinds = [Sampling(0.9, top_p=0.8), Sampling(0.0), Sampling(1.2, top_k=4), Sampling(min_p=0.05)]
    kinds = kinds[: 1 + seed % 4]
    samplings = [replace(kinds[n % len(kinds)], seed=seed + n) for n in range(sum(widths))]
    with running_ahead(captured):
        one, many = (texts(n, prompts, widths, limit, samplings, ends) for n in (1, k))
    assert many == one


def test_rows_that_leave_stay_in_their_bucket():
    with running_ahead(captured=True):
        decoder = MODEL.prefill([np.arange(3), np.arange(5)], [7, 6], 30)
        Called.made = 0
        for left in (
            13,
            12,
            11,
            10,
            9,
        ):  # all are padded to 13 rows, which is what there is room for
            table = decoder.sample_ahead(Sampling(), 3, [])
            assert table.shape == (left, 3) and (table >= 0).all()
            decoder.advance(keep=np.arange(left) < left - 1)
        assert Called.made == 1
        decoder.sample_ahead(Sampling(), 3, [])  # 8 rows are another bucket
        decoder.sample_ahead(Sampling(temperature=0.5), 3, [])
        assert Called.made == 3
        decoder.admit([np.arange(2)], [6], 40)  # the cache moves
        decoder.sample_ahead(Sampling(), 3, [])
        assert Called.made == 4


def test_nothing_reaches_the_host_within_a_table(monkeypatch):
    moved = []
    with running_ahead(captured=False):
        decoder = MODEL.prefill([np.arange(3)], [4], 30)
        for name in ("cpu", "item", "tolist", "__bool__", "nonzero", "numpy"):
            original = getattr(torch.Tensor, name)

            def noted(self, *a, name=name, original=original):
                moved.append(name)
                return original(self, *a)

            monkeypatch.setattr(torch.Tensor, name, noted)
        decoder.sample_ahead(Sampling(top_k=5, min_p=0.1), 9, [1])
    assert moved == ["cpu", "numpy"]


def test_buckets_hold_up_to_seven_more():
    sizes = [bucket(n, 64) for n in range(1, 65)]
    assert all(n <= size < n + 8 for n, size in enumerate(sizes, 1)) and len(set(sizes)) == 11
    assert bucket(13, 13) == 13
