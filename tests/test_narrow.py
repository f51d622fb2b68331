"""Narrow weights (clause 10.5): linear maps against the reference's, models by the numerics rule,
and what a model so held refuses."""

import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bridge
from bridge.checkpoints.packing import quantise
from bridge.config import parse_config, tensor_shapes
from bridge.config.quantization import Quantization
from bridge.contract import SFT, AdamW, Batch, NarrowBackend, Sampling
from bridge.decoding.inputs import check_weights
from bridge.errors import BridgeError
from bridge_conformance import strategies
from bridge_conformance.cases import random_tensors
from bridge_conformance.tolerance import allowance, error
from bridge_ref.backend import Reference
from bridge_ref.narrow import floats, int4_linear, int8_linear

torch = pytest.importorskip("torch")

from bridge_torch import fused, narrow  # noqa: E402
from bridge_torch.backend import TorchBackend  # noqa: E402
from bridge_torch.linear import Whole, blocked, can_block  # noqa: E402

needs_int4 = pytest.mark.skipif(not narrow.can_hold_int4(), reason="torch has no 4-bit kernel here")
needs_half = pytest.mark.skipif(not narrow.can_hold_half(), reason="torch has no FBGEMM here")
SHAPES = [(64, 128), (37, 60), (100, 64), (5, 21), (1, 4)]


def layer_of(kind, weight, bias=None, **more):
    return kind.of(weight, names=("a",), sizes=(len(weight),), bias=bias, **more)


def both_ways(monkeypatch, call):
    """What a call gives with what is compiled, and without it."""
    compiled = call()
    with monkeypatch.context() as patch:
        patch.setattr(narrow, "_kernels", lambda: None)
        return compiled, call()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 11, 12, 13, 40])
def test_8_bits_are_the_same_compiled_or_not(shape, rows, monkeypatch):
    """Bit for bit, with and without what is added, whatever other rows there are."""
    torch.manual_seed(rows)
    weight, bias = torch.randn(shape), torch.randn(shape[0])
    x, h = torch.randn(rows, shape[1]) * 10, torch.randn(rows, shape[0])
    for added in (None, bias):
        layer = layer_of(narrow.Bits8, weight, added)
        assert torch.equal(*both_ways(monkeypatch, lambda layer=layer: layer(x)))
        assert torch.equal(*both_ways(monkeypatch, lambda layer=layer: layer.add_to(h, x)))
        assert torch.equal(layer(x)[-1:], layer(x[-1:]))
        assert torch.equal(layer(x[:, None])[:, 0], layer(x))
        want = int8_linear(x.numpy(), weight.numpy(), None if added is None else bias.numpy())
        np.testing.assert_allclose(
            layer(x).numpy(), want, rtol=1e-5, atol=1e-5 * np.abs(want).max()
        )
    np.testing.assert_array_equal(layer.floats().numpy(), floats(weight.numpy(), "int8"))


def test_8_bits_of_extreme_rows(monkeypatch):
    """Zeros, numbers too small to count, ties, and what is not finite, which no other row has."""
    weight = torch.randn(33, 64)
    x = torch.zeros(6, 64)
    x[1] = 1e-35
    x[2] = torch.arange(64) - 31.5  # halves of a unit
    x[2, 0] = 127
    x[3, 7], x[4, 7], x[5] = float("nan"), float("inf"), torch.randn(64) * 1e30
    for y in both_ways(monkeypatch, lambda: layer_of(narrow.Bits8, weight)(x)):
        assert (y[:2] == 0).all() and not y[3:5].isfinite().any() and y[[2, 5]].isfinite().all()
        np.testing.assert_array_equal(y[2].numpy(), int8_linear(x[2].numpy(), weight.numpy(), None))
    assert (layer_of(narrow.Bits8, torch.zeros(3, 8))(torch.ones(2, 8)) == 0).all()


@needs_half
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.0, 1e-7, 1e-3, 1.0, 1e3])
def test_weights_of_16_bits_are_held_exactly(dtype, scale):
    """Numbers of many magnitudes, those too that float16 cannot hold beside the largest."""
    torch.manual_seed(0)
    spread = torch.randn(50, 70).exp() ** 4
    weight = (torch.randn(50, 70) * spread * scale).clamp(-6e4, 6e4).to(dtype)
    x, h, bias = torch.randn(9, 70), torch.randn(9, 50), torch.randn(50)
    for added in (None, bias):
        layer = layer_of(narrow.Half, weight, added)
        assert layer.floats().dtype == dtype and torch.equal(layer.floats(), weight)
        want = x.double() @ weight.double().T + (0 if added is None else bias.double())
        bound = 1e-6 * (x.abs().double() @ weight.abs().double().T + 1)
        assert ((layer(x) - want).abs() <= bound).all()
        assert ((layer.add_to(h, x) - h - want).abs() <= bound + 1e-6 * h.abs()).all()
        assert torch.equal(layer(x)[:1], layer(x[:1]))


@needs_int4
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_4_bits_are_the_integers_that_are_stored(group_size, stored):
    torch.manual_seed(0)
    dtype = getattr(torch, stored)
    weight = torch.randn(50, 2 * group_size)
    array = weight.numpy().astype({"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[stored])
    packed = quantise(array, Quantization(4, group_size))
    layer = narrow.Bits4.of([packed, packed], dtype, names=("a", "b"), sizes=(50, 50), bias=None)
    want = np.concatenate([packed.dequantise(dtype=np.float32)] * 2)
    held = torch.from_numpy(want).to(dtype)
    assert torch.equal(layer.floats(), held)
    x = torch.randn(70, 2 * group_size)
    exact = x.double().numpy() @ want.T.astype(np.float64)
    own = (x.bfloat16().double() @ held.bfloat16().double().T).bfloat16().double().numpy()
    assert error(layer(x).numpy(), exact) <= allowance(exact, own, "bfloat16")
    if group_size == 32 and stored == "float32":
        again = narrow.Bits4.of([narrow.quantised(weight)], dtype, names=(), sizes=(), bias=None)
        own = int4_linear(x.numpy(), weight.numpy(), None)
        assert error(again(x).numpy(), own) <= allowance(own, own, "bfloat16")


def test_weights_that_the_processor_multiplies():
    """Activations are rounded to bfloat16, and what comes is float32 again."""
    weight, x = torch.randn(7, 16).bfloat16(), torch.randn(3, 16)
    held = blocked(weight) if can_block("cpu", torch.bfloat16) else weight
    layer = narrow.Rounding(("a",), (7,), Whole((), (), held), bias=torch.ones(7))
    want = (x.bfloat16() @ weight.T).float() + 1
    assert torch.equal(layer.floats(), weight)
    torch.testing.assert_close(layer(x), want, rtol=2**-7, atol=2**-7)


KINDS = [pytest.param("int8"), pytest.param("int4", marks=needs_int4)]


@st.composite
def wide_rows(draw):
    """A teacher-forced case of conformance, its model wide enough for groups of 32."""
    case = draw(strategies.rows_cases(magnitudes=("plain",)))
    sizes = {
        "head_dim": 32,
        "hidden_size": 64,
        "intermediate_size": draw(st.sampled_from([64, 80])),
    }
    return replace(case, model=replace(case.model, raw={**case.model.raw, **sizes}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weights", KINDS)
@settings(max_examples=10)
@given(case=wide_rows())
def test_narrow_models_are_within_the_numerics_rule(weights, dtype, case):
    """Clauses 10.5 and 10.2: `own` is the reference by the same maps."""
    config, tensors = case.model.config, case.model.tensors(dtype)
    ours, theirs = (
        b.load(config, tensors, device="cpu", dtype=dtype, weights=weights)
        for b in (TorchBackend(), Reference())
    )
    exact = Reference().load(config, tensors, device="cpu", dtype="float64")
    want, own, got = (m.logits(*case.arguments)[case.active] for m in (exact, theirs, ours))
    floor = "bfloat16" if weights == "int4" else dtype
    assert error(got, want) <= allowance(want, own, floor)


RAW = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
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
PROMPTS = [np.arange(5), np.arange(3)]


def batch() -> Batch:
    tokens = np.random.default_rng(0).integers(0, 96, (2, 6))
    on = np.ones((2, 6), bool)
    return Batch(tokens, np.zeros(2, int), on, tokens, on)


class Held(dict):
    """Tensors of which some are packed; dequantised to who reads them."""

    def __init__(self, tensors, how: Quantization) -> None:
        super().__init__(tensors)
        self.packings = {
            name: quantise(array, how)
            for name, array in tensors.items()
            if array.ndim == 2 and ".bridge." not in name and array.shape[1] % how.group_size == 0
        }
        self.update({name: packed.dequantise() for name, packed in self.packings.items()})

    def packed(self, name: str):
        return self.packings.get(name)


def load(backend, weights=None, dtype="float32", tensors=None, **changes):
    config = parse_config({**RAW, **changes})
    tensors = random_tensors(config, 0, dtype) if tensors is None else tensors
    more = {} if weights is None else {"weights": weights}
    return backend.load(config, tensors, device="cpu", dtype=dtype, **more)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weights", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_narrow_model_decodes_as_it_reads(weights, dtype, tied):
    """Clause 4.1, as near as rounding rows to integers lets it be: far nearer than the integers are
    to the weights that they were made of."""
    model = load(TorchBackend(), weights, dtype, tie_word_embeddings=tied)
    decoder = model.prefill(PROMPTS, [2, 3], 8)
    rows = [list(PROMPTS[0])] * 2 + [list(PROMPTS[1])] * 3
    for _ in range(4):
        drawn = decoder.sample(Sampling(seed=1))
        decoder.advance()
        rows = [[*row, int(token)] for row, token in zip(rows, drawn, strict=True)]
    tokens, active = np.zeros((5, 9), int), np.zeros((5, 9), bool)
    for r, row in enumerate(rows):
        tokens[r, : len(row)], active[r, : len(row)] = row, True
    positions = np.tile(np.arange(9), (5, 1))
    groups = np.array([0, 0, 1, 1, 1])
    # Rows of unlike prompts are at unlike timesteps, where blocks would read across: one by one.
    for g, length in ((0, 9), (1, 7)):
        some = groups == g
        sub = (tokens[some, :length], groups[some], active[some, :length], positions[some, :length])
        got, want = decoder.logits()[some], model.logits(*sub)[:, -1]
        whole = load(TorchBackend(), None, dtype, tie_word_embeddings=tied).logits(*sub)[:, -1]
        assert error(got, want) < error(want, whole)


@pytest.mark.parametrize("weights", KINDS)
@pytest.mark.parametrize("backend", [TorchBackend(), Reference()], ids=["torch", "numpy"])
def test_a_narrow_model_has_no_gradients(backend, weights):
    """Refused in a line that names the mend; reading, and log-probabilities, are as by `logits`."""
    model = load(backend, weights)
    names = [name for name in tensor_shapes(model.config) if ".bridge." in name]
    for ask in (
        lambda: model.trainer(SFT(), AdamW(), names),
        lambda: model.loss_and_grads(batch(), SFT(), names),
        *([lambda: model.transformer] if isinstance(backend, TorchBackend) else []),
    ):
        with pytest.raises(BridgeError, match="load the model without weights to train"):
            ask()
    b = batch()
    logits = model.logits(b.tokens, b.groups, b.active, np.tile(np.arange(6), (2, 1)))
    logits = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = np.take_along_axis(logits, b.targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(model.logprobs(b), want, atol=1e-4)


@pytest.mark.parametrize("weights", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_narrow_model_gives_the_numbers_of_its_integers(weights, dtype):
    config = parse_config({**RAW, "tie_word_embeddings": False})
    given = random_tensors(config, 0, dtype)
    got = dict(load(TorchBackend(), weights, dtype, given, tie_word_embeddings=False).tensors())
    want = dict(load(Reference(), weights, dtype, given, tie_word_embeddings=False).tensors())
    assert list(got) == list(want) == list(given)
    for name in given:
        assert got[name].dtype == given[name].dtype
        np.testing.assert_array_equal(got[name], want[name])
        whole = given[name].ndim == 1 or ".bridge." in name or "embed" in name
        assert np.array_equal(got[name], given[name]) == whole


@needs_int4
@pytest.mark.parametrize("how", [Quantization(4, 32), Quantization(4, 64), Quantization(8, 32)])
def test_what_is_stored_with_4_bits_stays_so_in_bfloat16(how):
    """And is widened for whoever trains; with 8 bits, which no kernel of torch has, it is at once.
    In float32, where the kernel would be coarser than the dtype, it is too, unless asked for."""
    config = parse_config(RAW)

    def kinds(dtype: str, weights: str | None = None) -> set[type]:
        held = Held(random_tensors(config, 0, dtype), how)
        model = load(TorchBackend(), weights, dtype, held)
        packed = model.weights.packed()
        for name, array in model.tensors():
            if weights is None or (weights == "int4" and how.bits == 4 and name in held.packings):
                np.testing.assert_array_equal(array, held[name])
        return {type(packed.head), *(type(layer.qkv) for layer in packed.layers)}

    kept = {narrow.Bits4} if how.bits == 4 else {narrow.Half}
    if fused.kernels() and narrow.can_hold_half() and not narrow.multiplies(torch.bfloat16):
        assert kinds("bfloat16") == kept
    assert kinds("float32") == {Whole}
    assert kinds("float32", "int4") == {narrow.Bits4}
    assert kinds("float32", "int8") == {narrow.Bits8}
    held = Held(random_tensors(config, 0, "bfloat16"), how)
    model = load(TorchBackend(), None, "bfloat16", held)
    model.prefill(PROMPTS, [1, 1], 2)
    name = "model.layers.0.bridge.o_proj.weight"
    _, grads = model.loss_and_grads(batch(), SFT(), [name])
    widened = load(TorchBackend(), None, "bfloat16", dict(held))
    np.testing.assert_array_equal(
        grads[name], widened.loss_and_grads(batch(), SFT(), [name])[1][name]
    )
    got, want = (m.prefill(PROMPTS, [1, 1], 2).logits() for m in (model, widened))
    np.testing.assert_array_equal(got, want)


@needs_half
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_come_back_as_they_were(dtype):
    """A CPU computes with them in float32; what is given back, decoding and after, is the bytes."""
    given = random_tensors(parse_config(RAW), 0, dtype)
    model = load(TorchBackend(), None, dtype, given)
    computes = torch.float32 if fused.kernels() else getattr(torch, dtype)
    assert model.dtype == dtype and model.weights.packed().like.dtype == computes
    for _ in range(2):
        for name, array in model.tensors():
            assert array.dtype == given[name].dtype and np.array_equal(array, given[name])
        model.loss_and_grads(batch(), SFT(), ["model.norm.weight"])  # as a module again
        assert model.weights._packed is None


def test_what_is_not_there_is_refused():
    with pytest.raises(BridgeError, match=r"'int8' are not there .* \(has none; leave weights"):
        check_weights("without", "cpu", "int8", [])
    check_weights("without", "cpu", None, [])
    assert all(isinstance(backend, NarrowBackend) for backend in (TorchBackend(), Reference()))
    for backend in (TorchBackend(), Reference()):
        with pytest.raises(BridgeError, match=f"'int3' are not there for backend '{backend.name}'"):
            load(backend, "int3")


def test_a_user_asks_for_narrow_weights():
    """By `bridge.load`, and by the commands that decode, which say so."""
    from typer.testing import CliRunner

    from bridge_cli.main import app

    model = bridge.load(backend="torch", weights="int8")
    assert model.weights == "int8" and "with int8 weights" in repr(model)
    asked = ["generate", "3 5 2 7 = 8 ?", "--width", "2", "--max-new-tokens", "4", "--json"]
    asked += ["--backend", "torch", "--weights"]
    said = json.loads(CliRunner().invoke(app, [*asked, "int8"]).stdout)
    assert said["weights"] == "int8" and len(said["prompts"][0]["responses"]) == 2
    wrong = CliRunner().invoke(app, [*asked, "int9"])
    assert wrong.exit_code == 2
    assert "weights 'int9' are not there for backend 'torch'" in wrong.stderr
