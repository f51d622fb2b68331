"""torch's training by the cells that are computed: against the whole batch, row by row, with every
target's logits at once. What conformance cannot see is here too: what is computed, and by what."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bridge.config import LoraConfig, lora_names, parse_config, tensor_shapes
from bridge.contract import GRPO, SFT, AdamW, Batch
from bridge.decoding.inputs import positions_of
from bridge.decoding.shared import SharedPlan
from bridge.errors import BridgeError
from bridge_conformance.cases import random_tensors
from bridge_torch import flash, loss, train
from bridge_torch.backend import TorchBackend
from bridge_torch.flash import Read, Reads
from bridge_torch.packed import mean_ratio

pytestmark = pytest.mark.usefixtures("one_thread")

RAW = {
    "model_type": "mistral",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
BLOCKS = {"spec_version": "1.0", "num_heads": 2, "head_dim": 8, "layers": [0, 1], "norm_eps": 1e-6}
OBJECTIVES = SFT(), GRPO(beta=0.3, temperature=0.7), GRPO()


def load(dtype="float64", **changes):
    blocks = {**BLOCKS, "kind": changes.pop("kind", "attention")}
    config = parse_config({**RAW, "bridge": blocks, **changes})
    return TorchBackend().load(config, random_tensors(config, 0, dtype), device="cpu", dtype=dtype)


MODELS = {
    "tied": load(tie_word_embeddings=True),
    "untied": load(tie_word_embeddings=False),
    "P-Match": load(kind="mlp"),
    "window": load(sliding_window=3),
}


@st.composite
def batches(draw) -> Batch:
    """Rows that begin alike in their groups, padded on either side, with holes and positions."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    B, S = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    groups, lead = rng.integers(0, 3, B), rng.integers(0, S + 1, 3)
    tokens, active = rng.integers(0, 40, (B, S)), np.ones((B, S), bool)
    kind = draw(st.sampled_from(["full", "right", "left", "holes"]))
    if kind == "holes":
        active = rng.random((B, S)) < 0.7
    for b in range(B):
        if kind == "right":
            active[b, rng.integers(1, S + 1) :] = False
        if kind == "left":
            active[b, : rng.integers(0, S)] = False
        first = np.flatnonzero(groups == groups[b])[0]
        tokens[b, : lead[groups[b]]] = tokens[first, : lead[groups[b]]]
        active[b, : lead[groups[b]]] = active[first, : lead[groups[b]]]
    active[0, -1] = True
    mask = active & (rng.random((B, S)) < draw(st.sampled_from([0.3, 1.0])))
    mask[0, -1] = True
    old, ref = -rng.random((2, B, S))
    positions = rng.integers(0, 100, (B, S)) if draw(st.booleans()) else None
    targets = rng.integers(0, 40, (B, S))
    return Batch(tokens, groups, active, targets, mask, positions, rng.normal(size=B), old, ref)


def whole(model, batch, objective):
    """Loss, log-probabilities and gradients by the module's own forward over all of `[B, S]`."""
    module, mask = model.transformer, torch.from_numpy(batch.target_mask)
    cells = module.cells(batch.groups, batch.active, positions_of(batch))
    logits = module(torch.from_numpy(np.where(batch.active, batch.tokens, 0)), cells)[mask]
    T = getattr(objective, "temperature", 1.0)
    lp = -F.cross_entropy(logits / T, torch.from_numpy(batch.targets)[mask], reduction="none")
    if isinstance(objective, SFT):
        loss = -lp.mean()
    else:
        A = torch.from_numpy(np.broadcast_to(batch.advantages[:, None], mask.shape).copy())[mask]
        old, ref = (torch.from_numpy(x)[mask] for x in (batch.old_logprobs, batch.ref_logprobs))
        rho = (lp - old).exp()
        gain = torch.minimum(rho * A, rho.clamp(0.8, 1.2) * A)
        loss = -(gain - objective.beta * ((ref - lp).exp() - (ref - lp) - 1)).mean()
    names, parameters = zip(*module.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return float(loss.detach()), lp.detach(), dict(zip(names, grads, strict=True))


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=15)
@given(batch=batches(), objective=st.sampled_from(OBJECTIVES), chunk=st.sampled_from([1, 3, 256]))
def test_loss_and_every_gradient_are_those_of_all_rows_one_by_one(name, batch, objective, chunk):
    model = MODELS[name]
    value, lp, grads = whole(model, batch, objective)
    module, names = model.transformer, list(tensor_shapes(model.config))
    metrics, found = train.loss_and_grads(module, names, batch, objective, loss_chunk=chunk)
    assert metrics["loss"] == pytest.approx(value, rel=1e-9, abs=1e-12)
    largest = max(1.0, *(float(gradient.abs().max()) for gradient in grads.values()))
    for key, gradient in grads.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-7, atol=1e-11 * largest)
    T = getattr(objective, "temperature", 1.0)
    said = model.logprobs(batch, T)
    np.testing.assert_allclose(said[batch.target_mask], lp, rtol=1e-9)
    assert not said[~batch.target_mask].any()
    cells = train.pieces(module, batch)
    assert (
        len(cells.tokens)
        <= SharedPlan.of(batch.tokens, batch.groups, batch.active, positions_of(batch)).cells
    )


@given(batches())
@settings(max_examples=15)
def test_a_shared_cell_counts_once_a_row(batch):
    model = MODELS["tied"]
    where = (batch.tokens, batch.groups, batch.active, positions_of(batch))
    reads = []
    module = model.transformer
    hooks = [
        module.get_submodule(f"model.layers.{i}.bridge").register_forward_hook(
            lambda _, args, out: reads.append((args[0], out))
        )
        for i in range(2)
    ]
    module(torch.from_numpy(np.where(batch.active, batch.tokens, 0)), module.cells(*where[1:]))
    for hook in hooks:
        hook.remove()
    on = torch.from_numpy(batch.active)
    want = [((y - h).norm(dim=-1) / h.norm(dim=-1))[on].mean().item() for h, y in reads]
    np.testing.assert_allclose(model.norm_ratios(*where), want, rtol=1e-9)


def test_of_a_zero_residual_the_ratio_is_0():
    y, h = torch.tensor([[3.0], [1.0], [2.0]]), torch.tensor([[0.0], [2.0], [1.0]])
    assert mean_ratio(y, h, torch.tensor([4, 1, 3])) == (0 * 4 + 0.5 * 1 + 2 * 3) / 8


def test_what_rows_share_is_computed_once_and_padding_never():
    model = MODELS["tied"]
    tokens = np.tile(np.arange(12), (4, 1))
    tokens[:, 8:] += np.arange(4)[:, None]  # 8 of a prompt, then a row's own
    active = np.arange(12) < np.array([[12], [12], [9], [10]])
    batch = Batch(tokens, np.zeros(4, int), active, tokens, active)
    seen = []
    gate = model.transformer.get_submodule("model.layers.0.mlp.gate_proj")
    hook = gate.register_forward_hook(lambda *args: seen.append(args[2].shape[0]))
    model.loss_and_grads(batch, SFT(), ["model.norm.weight"])
    hook.remove()
    assert seen == [8 + 4 + 4 + 1 + 2]


# The kernels' interface.


def plain(q, k, v, reads: Reads):
    """Each cell by itself."""
    C, shared = len(q), reads.shared
    mask = torch.zeros(C, C, dtype=torch.bool)
    for read in (*reads.within, *reads.across):
        for one in range(read.count):
            a, b = read.queries + one * read.n, read.keys + one * read.m
            block = torch.ones(read.n, read.m, dtype=torch.bool)
            mask[a : a + read.n, b : b + read.m] = block.tril() if read.causal else block
    places = reads.places
    at = torch.arange(reads.rows * reads.longest) if places is None else places
    row = torch.div(at, max(reads.longest, 1), rounding_mode="floor")
    mask[shared:, shared:] = (row[:, None] == row) & (at[:, None] >= at)
    H, K = q.shape[1], k.shape[1]
    k, v = (x.repeat_interleave(H // K, 1).transpose(0, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q.transpose(0, 1), k, v, mask).transpose(0, 1)


READS = {
    "ragged rows": Reads(
        7,
        (Read(1, 0, 3, 0, 3, True), Read(1, 3, 4, 3, 4, True)),
        (Read(1, 7, 5, 0, 3, False), Read(1, 12, 2, 3, 4, False)),
        3,
        3,
        torch.tensor([0, 1, 2, 3, 4, 6, 7]),
    ),
    "groups alike": Reads(
        4, (Read(2, 0, 2, 0, 2, True),), (Read(2, 4, 2, 0, 2, False),), 4, 1, None
    ),
    "nothing shared": Reads(0, (), (), 2, 3, None),
    "a group that shares nothing": Reads(
        2, (Read(1, 0, 2, 0, 2, True),), (Read(1, 2, 2, 0, 2, False),), 2, 2, None
    ),
    "nothing alone": Reads(5, (Read(1, 0, 5, 0, 5, True),), (), 0, 0, None),
}


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
def test_merged_attention_is_one_softmax(name, dtype, heads):
    reads, (H, K) = READS[name], heads
    C = reads.shared + (reads.rows * reads.longest if reads.places is None else len(reads.places))
    torch.manual_seed(0)
    assert flash.kernel_for(torch.device("cpu"), dtype, 8) is flash.CPU
    leaves = [torch.randn(C, n, 8, dtype=torch.float64) for n in (H, K, K)]
    dy = torch.randn(C, H, 8, dtype=torch.float64)
    parts = [x.to(dtype).requires_grad_() for x in leaves]
    exact = [x.detach().double().requires_grad_() for x in parts]
    (q, k, v), (q64, k64, v64) = parts, exact
    y, want = flash.attend(q, k, v, reads, flash.CPU), plain(q64, k64, v64, reads)
    found, grads = (
        torch.autograd.grad(out, of, dy.to(dtype).to(out.dtype))
        for out, of in ((y, parts), (want, exact))
    )
    near = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    for one, other in zip((y, *found), (want, *grads), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=near, atol=near)


@pytest.mark.parametrize(
    ("kernel", "dtype"), [(flash.FLASH, torch.bfloat16), (flash.EFFICIENT, torch.float32)]
)
@pytest.mark.parametrize("name", READS)
def test_cudas_kernels_are_called_as_they_are_declared(name, kernel, dtype):
    """By torch's own account of their shapes: there need be no GPU."""
    reads, saved = READS[name], SimpleNamespace()
    C = reads.shared + (reads.rows * reads.longest if reads.places is None else len(reads.places))
    saved.save_for_backward = lambda *tensors: setattr(saved, "saved_tensors", tensors)
    with torch.no_grad():
        if reads.places is not None:
            places = torch.empty(len(reads.places), dtype=torch.int64, device="meta")
            reads = replace(reads, places=places)
        q, k, v = (torch.empty(C, n, 16, dtype=dtype, device="meta") for n in (4, 2, 2))
        y = flash._Attend.forward(saved, q, k, v, reads, kernel)
        gradients = flash._Attend.backward(saved, torch.empty_like(y))[:3]
    for one, like in zip((y, *gradients), (q, q, k, v), strict=True):
        assert (one.shape, one.dtype, one.device) == (like.shape, dtype, like.device)


# Low-rank updates, and what changes of the weights.

LORA = LoraConfig(2, 6.0, ("q_proj", "v_proj", "down_proj"))


def with_updates(dtype="float64", weights=None, **changes):
    config = replace(parse_config({**RAW, **changes}), lora=LORA)
    tensors = random_tensors(config, 0, dtype)
    backend = TorchBackend()
    return tensors, backend.load(config, tensors, device="cpu", dtype=dtype, weights=weights)


def added(config, tensors):
    """The same host without updates, each matrix with what was added to it."""
    merged = dict(tensors)
    for name in tensors:
        if name.endswith("lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            A, B = merged.pop(name), merged.pop(f"{module}.lora_B.weight")
            merged[f"{module}.weight"] = merged[f"{module}.weight"] + LORA.scale * B @ A
    config = replace(config, lora=None)
    return TorchBackend().load(config, merged, device="cpu", dtype="float64")


def some_batch() -> Batch:
    tokens = np.random.default_rng(0).integers(0, 40, (4, 8))
    tokens[:, :5] = tokens[0, :5]
    active = np.ones((4, 8), bool)
    return Batch(tokens, np.zeros(4, int), active, tokens, active)


def test_updates_compute_what_the_sum_does():
    tensors, model = with_updates()
    plain, batch = added(model.config, tensors), some_batch()
    np.testing.assert_allclose(model.logprobs(batch), plain.logprobs(batch), rtol=1e-9)
    prompts = [np.arange(5), np.arange(3)]
    first, want = (m.prefill(prompts, [2, 1], 4).logits() for m in (model, plain))
    np.testing.assert_allclose(first, want, rtol=1e-9)
    assert [name for name, _ in model.tensors()] == list(tensor_shapes(model.config))
    for name, array in model.tensors():
        np.testing.assert_array_equal(array, tensors[name])
    # The gradient of W + s B A: s B^T dW, and s dW A^T.
    names = list(tensors)
    _, grads = model.loss_and_grads(batch, SFT(), names)
    _, whole = plain.loss_and_grads(batch, SFT(), [n for n in names if ".lora_" not in n])
    for name in lora_names(model.config):
        module = name.partition(".lora_")[0]
        A, B = tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]
        dW = whole[f"{module}.weight"]
        expected = LORA.scale * (B.T @ dW if "lora_A" in name else dW @ A.T)
        np.testing.assert_allclose(grads[name], expected, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_decoding_is_by_updates_as_they_are_trained(dtype):
    tensors, model = with_updates(dtype)
    names, prompt = lora_names(model.config), [np.arange(5)]
    before = model.prefill(prompt, [2], 4).logits()
    trainer = model.trainer(SFT(), AdamW(lr=0.1), names)
    kept = model.weights.packed().layers[0]
    trainer.step(some_batch())
    after, layer = model.prefill(prompt, [2], 4).logits(), model.weights.packed().layers[0]
    assert not np.allclose(before, after)
    assert layer.qkv is not kept.qkv and layer.down is not kept.down
    assert layer.o is kept.o and layer.gate_up is kept.gate_up  # nothing of them has changed
    fresh = TorchBackend().load(model.config, dict(model.tensors()), device="cpu", dtype=dtype)
    np.testing.assert_array_equal(fresh.prefill(prompt, [2], 4).logits(), after)
    for name, array in model.tensors():
        assert (name in names) == (not np.array_equal(array, tensors[name]))


def test_narrow_matrices_are_those_with_their_updates():
    tensors, model = with_updates("float32", "int8")
    config = replace(model.config, lora=LORA)
    double = {name: array.astype(np.float64) for name, array in tensors.items()}
    merged = dict(added(config, double).tensors())
    assert model.config.lora is None and [n for n, _ in model.tensors()] == list(merged)
    for name, array in model.tensors():
        near = np.abs(merged[name]).max() / 100 + 1e-6
        np.testing.assert_allclose(array, merged[name], atol=near)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_a_host_whose_blocks_learn_is_packed_once(dtype):
    model = load(dtype)
    names = [name for name in tensor_shapes(model.config) if ".bridge." in name]
    trainer = model.trainer(SFT(), AdamW(lr=0.1), names)
    first = model.weights.packed()
    under_way = model.prefill([np.arange(5)], [2], 4)
    assert model.weights.packed() is first
    trainer.step(some_batch())
    second = model.weights.packed()
    assert second is not first and second.head is first.head
    for one, other in zip(first.layers, second.layers, strict=True):
        assert one.host() == other.host() and one.block is not other.block
    fresh = TorchBackend().load(model.config, dict(model.tensors()), device="cpu", dtype=dtype)
    want = fresh.prefill([np.arange(5)], [2], 4)
    got = model.prefill([np.arange(5)], [2], 4)
    for decoder in (want, got, under_way):
        decoder.advance(np.array([1, 2]))
    np.testing.assert_array_equal(got.logits(), want.logits())
    assert np.isfinite(under_way.logits()).all()


def test_swapped_tensors_are_computed_with_until_an_update():
    model, batch = load(), some_batch()
    names = [name for name in tensor_shapes(model.config) if ".bridge." in name]
    start = {name: array for name, array in model.tensors() if name in names}
    trainer, prompt = model.trainer(SFT(), AdamW(lr=0.1), names), [np.arange(5)]
    lp, logits = model.logprobs(batch), model.prefill(prompt, [2], 4).logits()
    trainer.step(batch)
    learnt, later = model.logprobs(batch), dict(model.tensors())
    mine = model.swap(start)
    np.testing.assert_array_equal(model.logprobs(batch), lp)
    np.testing.assert_array_equal(model.prefill(prompt, [2], 4).logits(), logits)
    assert mine.keys() == start.keys()
    assert all(np.array_equal(mine[name], later[name]) for name in mine)
    with pytest.raises(BridgeError, match="swap: no tensor is named"):
        model.swap({**mine, "model.other": np.zeros(1)})
    np.testing.assert_array_equal(model.logprobs(batch), lp)
    model.swap(mine)
    np.testing.assert_array_equal(model.logprobs(batch), learnt)


def test_a_decoder_says_how_likely_next_tokens_are():
    decoder = load().prefill([np.arange(5), np.arange(3)], [2, 1], 4)
    decoder.advance(np.array([1, 2, 3]))
    logits, tokens = torch.from_numpy(decoder.logits()), np.array([4, 0, 39])
    want = (logits / 0.7).log_softmax(-1)[torch.arange(3), torch.from_numpy(tokens)]
    np.testing.assert_allclose(decoder.logprobs(tokens, 0.7), want, rtol=1e-9)
    for bad in (np.array([1, 2]), np.array([1, 2, 40])):
        with pytest.raises(BridgeError, match="logprobs: tokens"):
            decoder.logprobs(bad)


@pytest.mark.parametrize("trainable", ["blocks", "updates", "head", "norm"])
def test_nothing_frozen_has_a_gradient_computed(trainable, monkeypatch):
    """Of an untied model: products for a head's gradient, and leaves that ask for one."""
    config = replace(MODELS["untied"].config, lora=LORA)
    tensors = random_tensors(config, 0, "float64")
    model = TorchBackend().load(config, tensors, device="cpu", dtype="float64")
    marks = {"blocks": ".bridge.", "updates": ".lora_", "head": "lm_head", "norm": "model.norm"}
    names = [name for name in tensors if marks[trainable] in name]
    made, products = [], []
    add = torch.ops.aten.mm.default

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is add and tuple(out.shape) in {tensors[n].shape for n in tensors}:
                made.append(tuple(out.shape))
            return out

    monkeypatch.setattr(loss, "add_product", lambda total, dz, x: products.append(total.shape))
    with Watch():
        train.loss_and_grads(model.weights.module(), names, some_batch(), SFT())
    asked = {tensors[name].shape for name in names}
    assert {tuple(shape) for shape in made} <= asked
    assert bool(products) == (trainable == "head")
