"""What the MLX backend promises beyond the contract: costs, evaluation, bytes, and no compiler."""

import gc
import io
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bridge
from bridge.checkpoints.initialise import init
from bridge.config import parse_config
from bridge.contract import SFT, AdamW, Batch, Sampling
from bridge.errors import BridgeError
from bridge_conformance import strategies
from bridge_conformance.cases import ModelCase, random_tensors
from bridge_ref.sampling import sample as reference_sample

mx = pytest.importorskip("mlx.core")

from bridge_mlx import (  # noqa: E402
    attention,
    block,
    cache,
    cells,
    decode,
    layer,
    linear,
    model,
    sampling,
    train,
)
from bridge_mlx.backend import DTYPES, MlxBackend, from_numpy, to_numpy  # noqa: E402

RAW = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
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
    return MlxBackend().load(config, random_tensors(config, 0, dtype), device="cpu", dtype=dtype)


def rows_of_two(seed=0):
    """Two rows of one group, every token the target of the cell before it."""
    tokens = np.random.default_rng(seed).integers(0, 40, (2, 6))
    active = np.ones((2, 6), bool)
    batch = Batch(tokens, np.zeros(2, int), active, np.roll(tokens, -1, 1), active)
    return batch, (tokens, batch.groups, active, np.broadcast_to(np.arange(6), (2, 6)))


@pytest.fixture
def products(monkeypatch):
    """Multiplications of each matrix product and attention in graphs built from here on."""
    counts = []
    matmul, addmm = mx.array.__matmul__, mx.addmm
    attention = mx.fast.scaled_dot_product_attention

    def count_matmul(a, b):
        out = matmul(a, b)
        counts.append(out.size * a.shape[-1])
        return out

    def count_attention(q, k, v, **options):
        counts.append(2 * q.size * k.shape[-2])
        return attention(q, k, v, **options)

    def count_addmm(c, a, b, **options):
        counts.append(a.size * b.shape[-1])
        return addmm(c, a, b, **options)

    monkeypatch.setattr(mx.array, "__matmul__", count_matmul)
    monkeypatch.setattr(mx, "addmm", count_addmm)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", count_attention)

    def run(work):
        counts.clear()
        work()
        return sum(counts)

    return run


def test_a_prompt_is_read_once_whatever_the_width(products):
    loaded = load()
    one, many = (products(lambda w=w: loaded.prefill([PROMPT], [w], 4)) for w in (1, 16))
    assert one == many > 0
    decoder = loaded.prefill([PROMPT, PROMPT[:4]], [16, 3], 4)
    assert {k.shape[0] for layer in decoder.cache.prefix for k in layer} == {2}  # prompts, not rows


def test_groups_cost_their_number_times_the_square_of_their_width(products):
    def step_cost(widths):
        decoder = load().prefill([PROMPT] * len(widths), widths, 8)
        tokens = np.zeros(sum(widths), np.int64)
        decoder.advance(tokens)
        return products(lambda: decoder.advance(tokens))

    single = step_cost([4])
    assert step_cost([4, 4]) == 2 * single > 0
    assert step_cost([4] * 8) == 8 * single  # (8 * 4)^2 would be 64 times the pairs


def test_rows_that_end_leave_the_computation(products):
    decoder = load().prefill([PROMPT, PROMPT[:4]], [4, 2], 8)
    decoder.advance(np.zeros(6, np.int64))
    full = products(lambda: decoder.advance(np.zeros(6, np.int64)))
    keep = np.array([True, False, False, True, False, False])
    fewer = products(lambda: decoder.advance(np.zeros(6, np.int64), keep))
    assert fewer < full / 2
    assert decoder.logits().shape == (2, 40)
    assert {k.shape[0] for layer in decoder.cache.own for k in layer} == {2}  # rows left
    assert {k.shape[0] for layer in decoder.cache.prefix for k in layer} == {1}  # their prompt
    decoder.advance(np.zeros(2, np.int64), np.zeros(2, bool))
    assert decoder.sample(Sampling()).shape == (0,)


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"min_p": 0.1}, {"temperature": 0.0}])
def test_only_tokens_go_to_the_host(monkeypatch, options):
    decoder = load().prefill([PROMPT], [4], 8)
    moved = []

    def spy(original):
        def read(value, *arguments, **keywords):
            if isinstance(value, mx.array):
                moved.append(tuple(value.shape))
            return original(value, *arguments, **keywords)

        return read

    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__"):
        if hasattr(mx.array, name):  # not all in every version of MLX
            monkeypatch.setattr(mx.array, name, spy(getattr(mx.array, name)))
    watched = {**vars(np), "array": spy(np.array), "asarray": spy(np.asarray)}
    for module in (attention, block, cache, cells, decode, layer, linear, model, sampling):
        if hasattr(module, "np"):
            monkeypatch.setattr(module, "np", SimpleNamespace(**watched))
    for _ in range(4):
        decoder.sample(Sampling(**options))
        decoder.advance()
    assert moved == [(4, 1)] * 4


def graph_of(arrays):
    """How many operations wait to be evaluated for `arrays`."""
    text = io.StringIO()
    mx.export_to_dot(text, *arrays)
    return text.getvalue().count("shape=rectangle")


def test_graphs_do_not_grow_over_steps(monkeypatch):
    """Each step is evaluated by itself, so its graph and the memory in use stay as they are."""
    decoder = load().prefill([PROMPT], [4], 200)
    sizes, memory = [], []
    evaluate = mx.async_eval

    def spy(logits, own):
        sizes.append(graph_of([logits, *(k for layer in own for k in layer)]))
        evaluate(logits, own)

    monkeypatch.setattr(mx, "async_eval", spy)
    gc.collect()  # what earlier tests left must not go in between
    for _ in range(120):
        decoder.advance(decoder.sample(Sampling()))
        decoder.logits()
        mx.synchronize()  # MLX's own thread lets go of a step's work only after its result is there
        memory.append(mx.get_active_memory())
    assert len(set(sizes[1:])) == 1 and sizes[-1] > 10
    # A reused buffer may be some bytes larger than what it holds, as what ran before left it;
    # over a hundred steps not even one may leave its logits behind.
    assert max(memory[2:]) - min(memory[2:]) < decoder.logits().nbytes


def test_the_cache_is_written_in_place_and_grows_by_timesteps_said():
    decoder = load().prefill([PROMPT], [2], 600)
    for step in range(300):
        decoder.advance(np.zeros(2, np.int64))
        room = {k.shape[2] for layer in decoder.cache.own for k in layer}
        assert room == {cache.TIMESTEPS if step < cache.TIMESTEPS else 2 * cache.TIMESTEPS}
    decoder.logits()
    before = places(decoder)
    decoder.advance(np.zeros(2, np.int64))
    decoder.logits()
    assert places(decoder) == before and len(set(before)) == 4  # written in place


def places(decoder):
    """Where each cache lies in memory."""
    caches = [k for layer in decoder.cache.own for k in layer]
    return [np.array(k, copy=False).__array_interface__["data"][0] for k in caches]


def test_a_decoder_says_when_it_is_misused():
    decoder = load().prefill([PROMPT], [2], 2)
    with pytest.raises(BridgeError, match="call sample first"):
        decoder.advance()
    decoder.advance(np.zeros(2, np.int64))
    with pytest.raises(BridgeError, match="past the max_new_tokens that a row came with"):
        decoder.advance(np.zeros(2, np.int64))


def test_unknown_devices_and_dtypes_are_refused():
    config = parse_config(RAW)
    with pytest.raises(BridgeError, match=r"no device 'tpu'; use one of"):
        MlxBackend().load(config, {}, device="tpu", dtype="float32")
    with pytest.raises(BridgeError, match=r"no dtype 'float64'; use one of float32"):
        MlxBackend().load(config, {}, device="cpu", dtype="float64")


@given(st.lists(st.integers(0, 4), min_size=1, max_size=9))
def test_a_grid_holds_every_row_once(groups):
    grid = block.Grid.of(groups)
    assert grid.groups == len(set(groups))
    assert grid.width == max(groups.count(g) for g in groups)
    rows = mx.arange(len(groups))
    cells = grid.spread(rows)
    assert grid.collect(cells).tolist() == rows.tolist()
    filled = np.ones((grid.groups, grid.width), bool)
    filled = filled if grid.filled is None else np.array(grid.filled)
    for line, real in zip(np.array(cells).reshape(grid.groups, -1), filled, strict=True):
        held = [groups[row] for row in line[real]]
        assert len(set(held)) == 1 and len(held) == groups.count(held[0])
        assert {groups[row] for row in line} == set(held)  # empty cells read their own group
    if groups == sorted(groups) and len({groups.count(g) for g in groups}) == 1:
        assert grid.to_grid is None  # equal contiguous groups need no copy


def test_a_group_that_overflowed_leaves_ragged_others_alone():
    """Clause 3.4: not even an active row's NaN reaches another group, padded as the grid is."""
    loaded = load()
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(4, 3, 16)).astype(np.float32)
    groups, active = np.array([0, 0, 0, 1]), np.ones((4, 3), bool)
    want = loaded.block(0, hidden, groups, active)
    hidden[0] = np.nan
    got = loaded.block(0, hidden, groups, active)
    np.testing.assert_array_equal(got[3], want[3])
    assert np.isnan(got[:3]).all()


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_every_byte_of_a_half_precision_tensor_survives(name):
    """All 65536 patterns, NaNs and their payloads too."""
    patterns = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    numbers = patterns.view({"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[name])
    for given_ in (numbers, numbers.T, numbers[::3, 5:]):
        array = from_numpy(given_, DTYPES[name])
        assert array.dtype == DTYPES[name]
        back = to_numpy(array)
        assert back.dtype == given_.dtype and back.tobytes() == given_.tobytes()
        assert to_numpy(array.T).tobytes() == given_.T.tobytes()


@pytest.mark.parametrize("tied", [True, False])
def test_training_and_decoding_take_turns(tied):
    """The model must see each update, and only that."""
    loaded = load(tie_word_embeddings=tied)
    batch, rows = rows_of_two()
    names = [name for name, _ in loaded.tensors()]
    trainer = loaded.trainer(SFT(), AdamW(lr=0.01), names)
    before = loaded.logits(*rows)
    trainer.step(batch)
    after = loaded.logits(*rows)
    assert np.abs(after - before).max() > 1e-3
    fresh = MlxBackend().load(loaded.config, dict(loaded.tensors()), device="cpu", dtype="float32")
    np.testing.assert_array_equal(fresh.logits(*rows), after)
    decoder = loaded.prefill([rows[0][0]], [1], 1)
    np.testing.assert_allclose(
        decoder.logits()[0], loaded.logits(*(a[:1] for a in rows))[0, -1], atol=1e-5
    )


def test_what_is_frozen_is_not_differentiated(products):
    """A gradient of the last block's output alone costs a fraction of one of everything."""
    loaded = load(num_hidden_layers=6, bridge={**RAW["bridge"], "layers": [5]})
    batch, rows = rows_of_two()
    forward = products(lambda: loaded.logits(*rows))
    names = [name for name, _ in loaded.tensors()]
    before = {name: array.tobytes() for name, array in loaded.tensors()}
    graphs, evaluate = [], train.mx.eval

    def spy(*arrays):
        if isinstance(arrays[-1], dict):
            graphs.append(graph_of(arrays[-1].values()))
        evaluate(*arrays)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.mx, "eval", spy)
        loaded.loss_and_grads(batch, SFT(), ["model.layers.5.bridge.o_proj.weight"])
        loaded.loss_and_grads(batch, SFT(), names)
    assert forward and graphs[0] < graphs[1] / 2
    trained = "model.layers.5.bridge.o_proj.weight"
    loaded.trainer(SFT(), AdamW(lr=0.01), [trained]).step(batch)
    changed = {name for name, array in loaded.tensors() if array.tobytes() != before[name]}
    assert changed == {trained}


def test_a_common_tokens_gradient_is_not_lost_in_half_precision():
    """3000 cells that hold one token: MLX's own scatter stops adding after the first hundreds."""
    weight = mx.ones((4, 3), mx.bfloat16)
    tokens = mx.zeros((3000,), mx.int32)

    def total(weight):
        return mx.sum(linear.embed(weight, tokens).astype(mx.float32) * 2**-7)

    grad = to_numpy(mx.grad(total)(weight)).astype(np.float64)
    np.testing.assert_allclose(grad[0], 3000 / 2**7, rtol=2**-8)
    assert not grad[1:].any()


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
    with mx.stream(mx.cpu):
        got = np.array(sampling.sample(mx.array(logits), mx.array(uniform), options))
    filters = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "temperature": 0.8}
    nearby = [reference_sample(logits, uniform + d, **filters) for d in (0, -1e-4, 1e-4)]
    # Sums of 6000 weights differ in their last places: a draw may fall to a neighbour.
    assert all(nearby[1][i] <= got[i] <= nearby[2][i] or got[i] == nearby[0][i] for i in range(4))


def test_the_nucleus_is_found_however_large_it_is():
    w = np.full((2, 6000), 0.5, np.float32)
    w[0, :10] = 1.0
    with mx.stream(mx.cpu):
        assert sampling.nucleus_floor(mx.array(w), 0.99).tolist() == [[0.5], [0.5]]
        assert sampling.nucleus_floor(mx.array(w), 1e-6).tolist() == [[1.0], [0.5]]


def test_the_last_token_with_weight_is_drawn_where_rounding_leaves_none(monkeypatch):
    """Clause 6.7, with sums that do not ascend exactly, as parallel ones may not."""
    monkeypatch.setattr(mx, "cumsum", lambda w, axis: mx.array([[1, 2, 2.99, 3.0]]))
    logits = mx.array([[0.0, 0.0, 0.0, -1e9]])
    drawn = sampling.sample(logits, mx.array([1 - 2**-24]), Sampling())
    assert drawn.tolist() == [2]


@given(strategies.models())
@settings(max_examples=10)
def test_a_missing_or_misshapen_tensor_is_named(case: ModelCase):
    tensors = case.tensors("float32")
    name = sorted(tensors)[case.seed % len(tensors)]
    lacking = {n: a for n, a in tensors.items() if n != name}
    with pytest.raises(BridgeError, match="is missing") as caught:
        MlxBackend().load(case.config, lacking, device="cpu", dtype="float32")
    assert name in str(caught.value)
    wrong = {**tensors, name: tensors[name][:-1]}
    with pytest.raises(BridgeError, match=", need "):
        MlxBackend().load(case.config, wrong, device="cpu", dtype="float32")


WITHOUT_COMPILER = """
import sys
import numpy as np
from bridge.contract import GRPO, AdamW, Sampling
sys.path.insert(0, "tests")
from test_mlx import load, rows_of_two
from dataclasses import replace
model = load()
batch, rows = rows_of_two()
model.block(0, np.ones((2, 6, 16), np.float32), rows[1], rows[2])
decoder = model.prefill([rows[0][0]], [3], 4)
decoder.advance(decoder.sample(Sampling(top_k=5, top_p=0.9)))
trainer = model.trainer(GRPO(), AdamW(), [n for n, _ in model.tensors()])
print(trainer.step(replace(batch, advantages=np.ones(2)))["loss"], decoder.logits().shape)
"""


@pytest.mark.parametrize("compilers", [(), ("g++", "c++", "clang++", "cc")])
def test_no_compiler_is_needed_or_called(tmp_path, compilers):
    """On a machine without one, and on one where each leaves a trace and fails."""
    for name in compilers:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n: > {tmp_path}/called\nexit 1\n")
        path.chmod(0o755)
    alone = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX")}
    alone |= {"PATH": str(tmp_path), "TMPDIR": str(tmp_path)}  # kernels are cached under TMPDIR
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER], env=alone, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("(3, 40)\n")
    assert not (tmp_path / "called").exists()


@pytest.mark.skipif(shutil.which("g++") is None, reason="MLX compiles with g++ on CPUs")
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_work_gives_the_same_numbers(monkeypatch, dtype):
    """What a GPU runs as one kernel, compiled here for the CPU, forward and backward."""
    rng = np.random.default_rng(0)
    x, y = (mx.array(rng.normal(size=(5, 8))).astype(DTYPES[dtype]) for _ in range(2))
    cos, sin = mx.array(rng.normal(size=(2, 5, 8)).astype(np.float32))

    def work(x):
        turned = attention._turn(x, y, cos, sin)
        return turned + block.silu(x) + layer._gated(x, y)

    def both():
        value, grad = mx.value_and_grad(lambda x: mx.sum(work(x).astype(mx.float32)))(x)
        return [np.array(a.astype(mx.float32)) for a in (value, grad, work(x))]

    plain = both()
    monkeypatch.setattr(mx, "default_device", lambda: SimpleNamespace(type=mx.gpu))
    for got, want in zip(both(), plain, strict=True):
        allowed = 8 * float(mx.finfo(DTYPES[dtype]).eps) * max(1, np.abs(want).max())
        np.testing.assert_allclose(got, want, atol=allowed, rtol=0)


@pytest.mark.skipif(shutil.which("g++") is None, reason="MLX compiles with g++ on CPUs")
@pytest.mark.parametrize("limit", [None, 0.5])
def test_compiled_updates_are_the_same_updates(monkeypatch, limit):
    """What a GPU runs as few kernels, compiled here for the CPU: rates that change, and a state
    that is taken back between."""

    def train_some():
        loaded, (batch, _) = load(), rows_of_two()
        names = [name for name, _ in loaded.tensors() if ".0." in name]
        optimizer = AdamW(lr=0.01, weight_decay=0.1, max_grad_norm=limit)
        trainer = loaded.trainer(SFT(), optimizer, names)
        metrics = [trainer.step(batch), trainer.step(batch, lr=0.03)]
        state = trainer.state()
        metrics.append(trainer.step(batch))
        trainer.restore(state)
        metrics += [trainer.step(batch) for _ in range(2)]
        assert metrics[2] == metrics[3]
        return metrics, trainer.state()

    plain, plain_state = train_some()
    monkeypatch.setattr(mx, "default_device", lambda: SimpleNamespace(type=mx.gpu))
    metrics, state = train_some()
    rounding = 64 * float(mx.finfo(mx.float32).eps)
    for got, want in zip(metrics, plain, strict=True):
        assert got == pytest.approx(want, rel=rounding)
    assert state["step"] == plain_state["step"] == 4
    for name, want in plain_state.items():
        allowed = rounding * np.abs(want).max()
        np.testing.assert_allclose(state[name], want, atol=allowed, rtol=0, err_msg=name)


def test_the_users_default_device_is_left_alone():
    before = mx.default_device(), mx.default_stream(mx.default_device())
    loaded = load()
    for _ in loaded.tensors():
        assert mx.default_device() == before[0]
    loaded.prefill([PROMPT], [2], 4).sample(Sampling())
    with pytest.raises(BridgeError):
        loaded.trainer(SFT(), AdamW(), ["nothing"])
    assert (mx.default_device(), mx.default_stream(mx.default_device())) == before


@pytest.fixture(scope="module")
def with_blocks(smollm2, tmp_path_factory):
    out = tmp_path_factory.mktemp("mlx") / "bridge"
    init(smollm2, out, heads=2, head_dim=32)
    return {
        name: bridge.load(out, backend=backend, device="cpu", dtype=dtype)
        for name, backend, dtype in (
            ("mlx", "mlx", "float32"),
            ("torch", "torch", "float32"),
            ("exact", "torch", "float64"),
        )
    }


def test_logits_of_the_real_model_are_torchs(with_blocks):
    """Our error against float64 is no more than torch's in float32 is, up to the small factor."""
    vocabulary = with_blocks["mlx"].config.vocab_size
    tokens = np.random.default_rng(0).integers(0, vocabulary, size=(2, 16))
    exact, torch, mlx = (
        with_blocks[name].logits(tokens, groups=[0, 0]) for name in ("exact", "torch", "mlx")
    )
    assert np.abs(mlx - exact).max() <= 4 * np.abs(torch - exact).max()


@pytest.mark.slow  # draws of the real model are compared in test_agreement
def test_greedy_continuation_of_the_real_model_is_torchs(with_blocks):
    turns = [{"role": "user", "content": "Write one sentence about the sea."}]
    options = {"width": 2, "max_new_tokens": 16, "temperature": 0}
    want, got = (with_blocks[name].generate(turns, **options)[0] for name in ("torch", "mlx"))
    assert [r.tokens for r in got.responses] == [r.tokens for r in want.responses]
    assert len(got.responses[0].tokens) >= 8
