"""What the torch backend promises beyond the contract: costs, layouts, and rows that leave."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from bridge.config import parse_config
from bridge.contract import SFT, AdamW, Batch, Sampling
from bridge.errors import BridgeError
from bridge_conformance import strategies
from bridge_conformance.cases import ModelCase, random_tensors
from bridge_ref.sampling import sample as reference_sample
from bridge_torch import fused
from bridge_torch.backend import TorchBackend, add_up_in_float32
from bridge_torch.block import Grid
from bridge_torch.linear import blocked, can_block, plain
from bridge_torch.sampling import nucleus_floor, sample

RAW = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "bridge": {
        "spec_version": "1.0",
        "kind": "attention",
        "num_heads": 2,
        "head_dim": 8,
        "layers": [0, 1],
        "norm_eps": 1e-6,
    },
}
PROMPT = np.arange(10)


def load(dtype="float32", **changes):
    config = parse_config({**RAW, **changes})
    return TorchBackend().load(config, random_tensors(config, 0, dtype), device="cpu", dtype=dtype)


def flops(run):
    """Of matrix products and attention."""
    counter = FlopCounterMode(display=False)
    with counter:
        run()
    return counter.get_flop_counts()["Global"]


def of_attention(counts):
    names = ("bmm", "baddbmm", "attention")
    return sum(n for op, n in counts.items() if any(name in str(op) for name in names))


def test_a_prompt_is_read_once_whatever_the_width():
    model = load("float64")  # the counter does not know the blocked layout
    one, many = (flops(lambda w=w: model.prefill([PROMPT], [w], 4)) for w in (1, 16))
    assert one == many


def by_plain_step(prompts, widths):
    """A decoder; the counter does not see into the fused step."""
    with patch.object(fused, "serves", lambda *_: False):
        return load().prefill(prompts, widths, 8)


def step_cost(widths):
    decoder = by_plain_step([PROMPT] * len(widths), widths)
    tokens = np.zeros(sum(widths), np.int64)
    decoder.advance(tokens)
    return of_attention(flops(lambda: decoder.advance(tokens)))


def test_groups_cost_their_number_times_the_square_of_their_width():
    single, double = step_cost([4]), step_cost([4, 4])
    assert double == 2 * single
    assert step_cost([4] * 8) == 8 * single  # (8 * 4)^2 would be 64 times the pairs


def test_rows_that_end_leave_the_computation():
    decoder = by_plain_step([PROMPT, PROMPT[:4]], [4, 2])
    decoder.advance(np.zeros(6, np.int64))
    full = of_attention(flops(lambda: decoder.advance(np.zeros(6, np.int64))))
    keep = np.array([True, False, False, True, False, False])
    fewer = of_attention(flops(lambda: decoder.advance(np.zeros(6, np.int64), keep)))
    assert fewer < full / 2
    assert decoder.logits().shape == (2, 40) and decoder.cache.grid.groups == 1
    decoder.advance(np.zeros(2, np.int64), np.zeros(2, bool))
    assert decoder.sample(Sampling()).shape == (0,)


def test_only_tokens_go_to_the_host(monkeypatch):
    decoder = load().prefill([PROMPT], [4], 8)
    moved = []
    original = torch.Tensor.cpu
    monkeypatch.setattr(
        torch.Tensor, "cpu", lambda self, *a: moved.append(self.shape) or original(self, *a)
    )
    for _ in range(4):
        decoder.sample(Sampling(top_k=5))
        decoder.advance()
    assert moved == [(4,)] * 4


def test_a_decoder_says_when_it_is_misused():
    decoder = load().prefill([PROMPT], [2], 2)
    with pytest.raises(BridgeError, match="call sample first"):
        decoder.advance()
    decoder.advance(np.zeros(2, np.int64))
    with pytest.raises(BridgeError, match="past the max_new_tokens"):
        decoder.advance(np.zeros(2, np.int64))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=9))
def test_a_grid_holds_every_row_once(groups):
    grid = Grid.of(groups, "cpu")
    assert grid.groups == len(set(groups))
    assert grid.width == max(groups.count(g) for g in groups)
    rows = torch.arange(len(groups))
    cells = grid.spread(rows)
    assert grid.collect(cells).tolist() == rows.tolist()
    filled = torch.ones(grid.groups, grid.width, dtype=torch.bool)
    filled = filled if grid.filled is None else grid.filled
    for line, real in zip(cells.view(grid.groups, -1), filled, strict=True):
        held = [groups[row] for row in line[real]]
        assert len(set(held)) == 1 and len(held) == groups.count(held[0])
    if groups == sorted(groups) and len({groups.count(g) for g in groups}) == 1:
        assert grid.to_grid is None  # equal contiguous groups need no copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_keeps_every_byte(dtype):
    if not can_block("cpu", dtype):
        pytest.skip("this build of torch has no oneDNN layout")
    weight = torch.randn(37, 21).to(dtype)
    assert blocked(weight).is_mkldnn and torch.equal(plain(blocked(weight)), weight)


@pytest.mark.parametrize("tied", [True, False])
def test_training_and_decoding_take_turns(tied):
    """Weights change their layout in between; the model must see each update, and only that."""
    model = load(tie_word_embeddings=tied)
    tokens = np.random.default_rng(0).integers(0, 40, (2, 6))
    active = np.ones((2, 6), bool)
    positions, groups = np.broadcast_to(np.arange(6), (2, 6)), np.zeros(2, int)
    batch = Batch(tokens, groups, active, np.roll(tokens, -1, 1), active)
    names = [name for name, _ in model.tensors()]
    trainer = model.trainer(SFT(), AdamW(lr=0.01), names)
    before = model.logits(tokens, groups, active, positions)
    trainer.step(batch)
    after = model.logits(tokens, groups, active, positions)
    assert np.abs(after - before).max() > 1e-3
    fresh = TorchBackend().load(model.config, dict(model.tensors()), device="cpu", dtype="float32")
    np.testing.assert_array_equal(fresh.logits(tokens, groups, active, positions), after)
    decoder = model.prefill([tokens[0]], [1], 1)
    np.testing.assert_allclose(
        decoder.logits()[0],
        model.logits(tokens[:1], [0], active[:1], positions[:1])[0, -1],
        atol=1e-5,
    )


@settings(max_examples=40)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.3, 1.0, 5.0]),
    st.sampled_from([None, 1, 7, 10_000]),
    st.sampled_from([None, 0.05, 0.9, 0.9999]),
    st.sampled_from([None, 0.01, 0.5]),
)
def test_draws_from_a_real_vocabulary_follow_the_rule(seed, spread, top_k, top_p, min_p):
    """Nuclei of more tokens than are sorted at first, and ties, among 6000 tokens."""
    rng = np.random.default_rng(seed)
    logits = np.round(rng.normal(size=(4, 6000)) * spread * 8).astype(np.float32) / 8
    uniform = rng.random(4, dtype=np.float32)
    options = Sampling(temperature=0.8, top_k=top_k, top_p=top_p, min_p=min_p)
    got = sample(torch.from_numpy(logits), torch.from_numpy(uniform), options).numpy()
    filters = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "temperature": 0.8}
    nearby = [reference_sample(logits, uniform + d, **filters) for d in (0, -1e-4, 1e-4)]
    # Sums of 6000 weights differ in their last places: a draw may fall to a neighbour.
    assert all(nearby[1][i] <= got[i] <= nearby[2][i] or got[i] == nearby[0][i] for i in range(4))


def test_the_nucleus_is_found_however_large_it_is():
    w = torch.full((2, 6000), 0.5)
    w[0, :10] = 1.0
    floor = nucleus_floor(w, 0.99)
    assert floor.tolist() == [[0.5], [0.5]]
    assert nucleus_floor(w, 1e-6).tolist() == [[1.0], [0.5]]


@given(strategies.models())
@settings(max_examples=10)
def test_a_missing_or_misshapen_tensor_is_named(case: ModelCase):
    tensors = case.tensors("float32")
    name = sorted(tensors)[case.seed % len(tensors)]
    lacking = {n: a for n, a in tensors.items() if n != name}
    with pytest.raises(BridgeError, match="is missing") as caught:
        TorchBackend().load(case.config, lacking, device="cpu", dtype="float32")
    assert name in str(caught.value)
    wrong = {**tensors, name: tensors[name][:-1]}
    with pytest.raises(BridgeError, match=", need "):
        TorchBackend().load(case.config, wrong, device="cpu", dtype="float32")


def test_products_on_cuda_add_up_in_float32():
    matmul = torch.backends.cuda.matmul
    names = [f"allow_{kind}_reduced_precision_reduction" for kind in ("bf16", "fp16")]
    before = {name: getattr(matmul, name) for name in names}
    try:
        for name in names:
            setattr(matmul, name, True)
        load()
        assert all(getattr(matmul, name) for name in names)  # a model on a CPU leaves them
        add_up_in_float32()
        assert not any(getattr(matmul, name) for name in names)
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)
