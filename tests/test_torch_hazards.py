"""Where torch's arithmetic ends: sums taken in parallel, NaN, padding that comes last, and more
timesteps than a kernel takes at once."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_torch import RAW

from bridge.config import parse_config
from bridge.contract import Sampling
from bridge.decoding.rows import Rows
from bridge.registry import find_backend
from bridge_conformance.cases import random_tensors
from bridge_ref.sampling import sample as reference_sample
from bridge_ref.sampling import sampling_weights
from bridge_torch import block
from bridge_torch.backend import TorchModel
from bridge_torch.block import Grid, mix
from bridge_torch.cache import PaddedCache
from bridge_torch.cells import Cells, attend
from bridge_torch.sampling import first_above, sample
from bridge_torch.step import ByProducts

CONFIG = parse_config(RAW)
LAST = np.float32(1 - 2**-24)  # the largest uniform


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 0.25, 0.5, 0.999, LAST]),
    st.sampled_from([{}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3}]),
)
def test_both_ways_of_drawing_are_the_references(seed, u, filters):
    # Weights are powers of two, and so are all sums of them: exact in any order.
    rng = np.random.default_rng(seed)
    logits = np.log(2.0) * -rng.integers(0, 4, (5, 64))
    logits[:, 40:] = -1000 if seed % 2 else logits[:, 40:]  # a tail without weight
    uniform = np.full(5, u, np.float32)
    want = reference_sample(logits, uniform, temperature=1.0, **filters)
    z = torch.from_numpy(logits)
    drawn = sample(z, torch.from_numpy(uniform), Sampling(**filters))
    assert drawn.tolist() == want.tolist()
    w = torch.from_numpy(sampling_weights(logits, temperature=1.0, **filters))
    assert first_above(w.cumsum(-1), w, torch.from_numpy(uniform)).tolist() == want.tolist()


def test_where_a_sum_dips_a_token_with_weight_is_drawn():
    w = torch.tensor([[0.0, 1, 1, 0, 0], [0, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    total = 2 * (1 + 2**-22)  # what rounding adds where nothing is left to add
    sums = torch.tensor([[0, 1, 2, 2, total], [1e-7, 1, 2, total, total], [1, 1, 1, 1, 1]])
    uniform = torch.tensor([LAST, 0.0, LAST])
    assert first_above(sums, w, uniform).tolist() == [2, 1, 0]


@pytest.mark.parametrize("vocabulary", [7, 50_000])
def test_the_last_uniform_never_draws_what_was_filtered(vocabulary):
    logits = torch.zeros(2, vocabulary)
    logits[:, vocabulary // 2 :] = -1e4
    uniform = torch.full((2,), float(LAST))
    want = [vocabulary // 2 - 1] * 2
    assert sample(logits, uniform, Sampling()).tolist() == want
    w = (logits == 0).float()
    assert first_above(w.cumsum(-1), w, uniform).tolist() == want


@pytest.mark.parametrize("filters", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_overflown_model_draws_some_token(bad, filters):
    logits = torch.tensor([[0.0, bad, 1.0], [bad] * 3, [0.0, 1.0, 2.0]])
    tokens = sample(logits, torch.tensor([0.5, 0.5, 0.0]), Sampling(**filters))
    assert ((tokens >= 0) & (tokens < 3)).all()
    w = torch.full((2, 3), float("nan"))
    assert first_above(w.cumsum(-1), w, torch.tensor([0.0, 0.5])).tolist() == [2, 2]


def test_padding_that_comes_last_needs_no_mask():
    tensors = random_tensors(CONFIG, 0, "float32")
    model, reference = (
        find_backend(name).load(CONFIG, tensors, device="cpu", dtype="float32")
        for name in ("torch", "numpy")
    )
    active = np.arange(7) < np.array([[7], [3], [5], [0]])
    batch = (np.arange(28).reshape(4, 7), np.array([0, 0, 1, 1]), active)
    positions = np.broadcast_to(np.arange(7), (4, 7))
    assert isinstance(model, TorchModel)
    assert model.transformer.cells(batch[1], active, positions).masks == {None: None}
    got, want = (one.logits(*batch, positions) for one in (model, reference))
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got[active], want[active], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_scores_are_not_rounded_before_they_are_scaled(masked):
    """In float16, where 128 times 32 squared overflows, and the scaled score does not."""
    q = torch.full((1, 3, 4, 128), 32.0, dtype=torch.float16)
    k = torch.full((1, 3, 2, 128), 32.0, dtype=torch.float16)
    k[:, 1] = 31.9
    v = torch.arange(3, dtype=torch.float16)[None, :, None, None].expand(1, 3, 2, 128)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril() if masked else None
    cells = Cells(Grid.of([0], "cpu"), torch.empty(0), None, {None: mask})
    y = attend(q, k, v, cells, None).view(3, 4, 128)
    # Timestep 1 weighs less by exp(-32 * 0.1 * sqrt(128)), which is nothing.
    assert torch.allclose(y, torch.tensor([0, 0, 1.0], dtype=y.dtype)[:, None, None])
    parts = [x.flatten(2)[0] for x in (q, k.repeat(1, 1, 2, 1), v.repeat(1, 1, 2, 1))]
    mixed = mix([x[:, None] for x in parts], 4, Grid.of([0] * 3, "cpu"), None)
    assert torch.allclose(mixed, torch.ones_like(mixed))


def test_a_steps_scores_are_not_rounded_before_they_are_scaled():
    q, v = torch.full((2, 1, 128), 32.0).half(), torch.ones(2, 1, 128).half()
    k = q.clone()
    rows = Rows.of([np.zeros(2)], [2], 2)
    prefix = torch.stack([q[:, 0] - 0.1, 0 * v[:, 0]])[None, :, None, None]
    cache = PaddedCache(prefix, torch.zeros(1, 2, 2, 1, 1, 128).half(), rows)
    y = ByProducts(cache, cache.grid, 0, {None: cache.reach(None)})(0, None, q, k, v)
    assert torch.equal(y, v[:, 0])  # the prompt's keys are less alike, by exp(-36)


def test_a_block_attends_in_lots():
    torch.manual_seed(0)
    grid = Grid.of([0, 0, 0, 1, 1], "cpu")
    parts = [torch.randn(5, 6, 8, requires_grad=True) for _ in range(3)]
    active = torch.rand(5, 6) < 0.7
    for on in (None, active):
        whole = mix(parts, 2, grid, on)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(block, "CELLS", 5)
            assert torch.equal(mix(parts, 2, grid, on), whole)
