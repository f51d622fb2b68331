"""torch's training by the cells that are computed: against the whole batch, row by row, with every
target's logits at once. What conformance cannot see is here too: what is computed, and by what."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from bridge.config import parse_config, tensor_shapes
from bridge.contract import GRPO, SFT, Batch
from bridge.decoding.inputs import positions_of
from bridge.decoding.shared import SharedPlan
from bridge_conformance.cases import random_tensors
from bridge_torch import flash, train
from bridge_torch.backend import TorchBackend
from bridge_torch.flash import Read, Reads

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
@settings(max_examples=25)
@given(batch=batches(), objective=st.sampled_from(OBJECTIVES), chunk=st.sampled_from([1, 3, 256]))
def test_loss_and_every_gradient_are_those_of_all_rows_one_by_one(name, batch, objective, chunk):
    model = MODELS[name]
    loss, lp, grads = whole(model, batch, objective)
    module, names = model.transformer, list(tensor_shapes(model.config))
    metrics, found = train.loss_and_grads(module, names, batch, objective, loss_chunk=chunk)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-9, abs=1e-12)
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
@settings(max_examples=25)
def test_a_shared_cell_counts_once_a_row(batch):
    model = MODELS["tied"]
    where = (batch.tokens, batch.groups, batch.active, positions_of(batch))
    reads = []
    module = model.transformer
    hooks = [
        layer.bridge.register_forward_hook(lambda _, args, out: reads.append((args[0], out)))
        for layer in module.model.layers
    ]
    module(torch.from_numpy(np.where(batch.active, batch.tokens, 0)), module.cells(*where[1:]))
    for hook in hooks:
        hook.remove()
    on = torch.from_numpy(batch.active)
    want = [((y - h).norm(dim=-1) / h.norm(dim=-1))[on].mean().item() for h, y in reads]
    np.testing.assert_allclose(model.norm_ratios(*where), want, rtol=1e-9)


def test_what_rows_share_is_computed_once_and_padding_never(monkeypatch):
    model = MODELS["tied"]
    tokens = np.tile(np.arange(12), (4, 1))
    tokens[:, 8:] += np.arange(4)[:, None]  # 8 of a prompt, then a row's own
    active = np.arange(12) < np.array([[12], [12], [9], [10]])
    batch = Batch(tokens, np.zeros(4, int), active, tokens, active)
    seen = []
    hook = model.transformer.model.layers[0].mlp.gate_proj.register_forward_hook(
        lambda *args: seen.append(args[2].shape[0])
    )
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
    kernel = flash.kernel_for(torch.device("cpu"), dtype, 8)
    assert kernel is flash.CPU
    leaves = [torch.randn(C, n, 8, dtype=torch.float64) for n in (H, K, K)]
    dy = torch.randn(C, H, 8, dtype=torch.float64)
    parts = [x.to(dtype).requires_grad_() for x in leaves]
    exact = [x.detach().double().requires_grad_() for x in parts]
    y, want = flash.attend(*parts, reads, kernel), plain(*exact, reads)
    found, grads = (
        torch.autograd.grad(out, of, dy.to(dtype).to(out.dtype))
        for out, of in ((y, parts), (want, exact))
    )
    near = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    for one, other in zip((y, *found), (want, *grads), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=near, atol=near)
