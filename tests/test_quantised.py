"""Quantised weights: packing and unpacking against MLX itself, and what a reader refuses."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.checkpoints import packing as packing_module
from bridge.checkpoints.packing import packing, quantise, side_names
from bridge.checkpoints.safetensors_io import specs_of
from bridge.config import quantization
from bridge.config.quantization import Quantization, parse_quantization
from bridge.errors import BridgeError

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def to_mlx(array):
    mx = pytest.importorskip("mlx.core")
    if array.dtype == ml_dtypes.bfloat16:
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)
    return mx.array(array)


def to_numpy(array):
    mx = pytest.importorskip("mlx.core")
    if array.dtype == mx.bfloat16:
        return np.array(array.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.array(array)


@st.composite
def matrices(draw):
    """A matrix and how to quantise it; groups that are constant, one-sided or tiny too."""
    how = Quantization(
        draw(st.sampled_from(quantization.BITS)),
        draw(st.sampled_from(quantization.GROUP_SIZES)),
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.integers(1, 5)), draw(st.integers(1, 3)) * how.group_size
    weight = rng.normal(size=shape) * 10.0 ** draw(st.integers(-4, 2))
    groups = weight.reshape(-1, how.group_size)
    kind = draw(st.sampled_from(["plain", "constant", "zero", "positive", "negative"]))
    first = {"plain": groups[0], "constant": 0.3, "zero": 0.0}
    groups[0] = first.get(kind, np.abs(groups[0]) * (1 if kind == "positive" else -1))
    return weight.astype(np.float32).astype(DTYPES[draw(st.sampled_from(list(DTYPES)))]), how


@given(matrices(), st.sampled_from([1, 100, 1 << 20]))
def test_packing_gives_the_bytes_of_mlx(case, piece):
    mx = pytest.importorskip("mlx.core")
    weight, how = case
    with pytest.MonkeyPatch.context() as patch, mx.stream(mx.cpu):
        patch.setattr(packing_module, "PIECE", piece)
        packed = quantise(weight, how)
        want = mx.quantize(to_mlx(weight), group_size=how.group_size, bits=how.bits)
    for got, other in zip((packed.weight, packed.scales, packed.biases), want, strict=True):
        assert got.dtype == to_numpy(other).dtype
        assert got.tobytes() == to_numpy(other).tobytes()
    assert packed.shape == weight.shape


@given(matrices(), st.sampled_from([1, 100, 1 << 20]))
def test_unpacking_gives_the_numbers_of_mlx(case, piece):
    """In float32 to the bit. In narrower dtypes MLX rounds twice on a CPU, which is not ours."""
    mx = pytest.importorskip("mlx.core")
    weight, how = case
    with mx.stream(mx.cpu):
        stored = mx.quantize(to_mlx(weight), group_size=how.group_size, bits=how.bits)
        wide = [stored[0], *(side.astype(mx.float32) for side in stored[1:])]
        want = to_numpy(mx.dequantize(*wide, group_size=how.group_size, bits=how.bits))
    weight_, scales, biases = map(to_numpy, stored)
    packed = packing_module.Packed(weight_, scales, biases, how.bits, how.group_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing_module, "PIECE", piece)
        np.testing.assert_array_equal(packed.dequantise(dtype=np.float32), want)
        assert packed.dequantise().tobytes() == want.astype(weight.dtype).tobytes()
        np.testing.assert_array_equal(packed.dequantise(slice(1, 3), np.float32), want[1:3])
    exact = packed.dequantise(dtype=np.float64)
    scale = np.abs(want).max() + np.abs(exact).max()
    assert exact.dtype == np.float64 and np.abs(exact - want).max() <= 2**-23 * scale


@given(matrices())
def test_every_number_is_within_half_a_step(case):
    """The quantiser's own promise, without MLX: a step is the scale, and ends are kept."""
    weight, how = case
    weight = weight.astype(np.float32)
    packed = quantise(weight, how)
    off = np.abs(packed.dequantise() - weight).reshape(*packed.scales.shape, how.group_size)
    step = np.abs(packed.scales)[..., None]
    largest = np.abs(weight).max()
    # The scale is stretched to hit the far end exactly, so that the near end may be a step away.
    assert (off <= step + 4 * np.finfo(np.float32).eps * largest).all()
    assert np.median(off / step) <= 0.5


SHAPE = (4, 64)


HOW = Quantization(4, 32)


def stored(**changes):
    packed = quantise(np.random.default_rng(0).normal(size=SHAPE).astype(np.float32), HOW)
    arrays = {"a.weight": packed.weight, "a.scales": packed.scales, "a.biases": packed.biases}
    return specs_of({n: a for n, a in {**arrays, **changes}.items() if a is not None})


def test_a_packing_is_told_from_headers():
    assert side_names("model.a.weight") == ("model.a.scales", "model.a.biases")
    for bits in quantization.BITS:
        for group_size in (32, 64):
            how = Quantization(bits, group_size)
            packed = quantise(np.ones(SHAPE, np.float16), how)
            sides = {"a.weight": packed.weight, "a.scales": packed.scales}
            specs = stored(**sides, **{"a.biases": packed.biases})
            assert packing("a.weight", SHAPE, specs, "f") == how
    twice = packing(
        "a.weight", (4, 128), stored(), "f"
    )  # the shape is the config's, not the file's
    assert twice == Quantization(2, 64)


@pytest.mark.parametrize(
    ("changes", "shape", "message"),
    [
        ({"a.scales": None}, SHAPE, "a.scales is missing"),
        ({"a.biases": None}, SHAPE, "a.biases is missing"),
        ({}, (64,), "only matrices"),
        ({"a.weight": np.zeros((4, 8), np.int32)}, SHAPE, "int32 where uint32"),
        ({"a.scales": np.zeros((4, 2), np.uint8)}, SHAPE, "a.scales' is uint8"),
        ({"a.biases": np.zeros((4, 2), np.float16)}, SHAPE, "differ in dtype or shape"),
        ({"a.biases": np.zeros((4, 1), np.float32)}, SHAPE, "differ in dtype or shape"),
        ({}, (5, 64), "config.json calls for \\[5, 64\\]"),
        ({}, (4, 63), "config.json calls for \\[4, 63\\]"),
        ({"a.weight": np.zeros((4, 9), np.uint32)}, SHAPE, "9 words a row"),
        ({"a.weight": np.zeros((4, 14), np.uint32)}, SHAPE, "bits 7 is not one of"),
        ({"a.weight": np.zeros((4, 0), np.uint32)}, SHAPE, "bits 0 is not one of"),
        ({"a.weight": np.zeros(4, np.uint32)}, SHAPE, "packed as \\[4\\]"),
        (dict.fromkeys(("a.scales", "a.biases"), np.zeros((4, 0), "f4")), SHAPE, "packed as"),
        (dict.fromkeys(("a.scales", "a.biases"), np.zeros((4, 4), "f4")), SHAPE, "group_size 16"),
    ],
)
def test_what_is_no_packing_of_the_shape_is_refused(changes, shape, message):
    with pytest.raises(BridgeError, match=message) as caught:
        packing("a.weight", shape, stored(**changes), "f")
    assert str(caught.value).startswith("f: ") and "\n" not in str(caught.value)


def test_a_config_says_how_it_is_quantised():
    plain = {"group_size": 64, "bits": 4}
    affine = {**plain, "mode": "affine"}
    layer = {"model.layers.0.mlp.down_proj": {"group_size": 32, "bits": 8}, "lm_head": False}
    for said in (plain, affine, {**affine, **layer}):
        both = {"quantization": said, "quantization_config": said}
        assert parse_quantization(both) == Quantization(4, 64)
        assert parse_quantization({"quantization": said}) == Quantization(4, 64)
    unsaid = {"group_size": None, "bits": None, "mode": None}  # what MLX takes then
    layers = {"lm_head": {"bits": 6}, "model.embed_tokens": {"group_size": None, "bits": 2}}
    assert parse_quantization({"quantization": {**unsaid, **layers}}) == Quantization(4, 64)
    assert parse_quantization({"quantization": {**plain, "lm_head": {}}}) == Quantization(4, 64)
    assert Quantization(4, 64).to_json() == affine
    assert parse_quantization({}) is None
    assert parse_quantization({"quantization": None}) is None


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"quantization": 4}, "quantization must be an object"),
        ({"quantization": {"bits": 4}}, "quantization.group_size is missing"),
        ({"quantization": {"bits": "4", "group_size": 64}}, "quantization.bits must be an integer"),
        ({"quantization": {"bits": 7, "group_size": 64}}, "bits 7 is not one of"),
        ({"quantization": {"bits": 4, "group_size": 48}}, "group_size 48 is not one of"),
        ({"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4"}}, "'mxfp4' is not"),
        ({"quantization": {"bits": 4, "group_size": 32, "x": 1}}, "quantization.x is not known"),
        (
            {"quantization": {"bits": 4, "group_size": 32, "a.b": {"bits": 1, "group_size": 32}}},
            "quantization.a.b: bits 1",
        ),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "'awq' is not supported"),
        (
            {
                "quantization": {"bits": 4, "group_size": 64},
                "quantization_config": {"bits": 8, "group_size": 64},
            },
            "disagree",
        ),
    ],
)
def test_other_quantisations_are_refused_by_name(said, message):
    with pytest.raises(BridgeError, match=message) as caught:
        parse_quantization(said, "config.json")
    assert str(caught.value).startswith("config.json: ")


@pytest.mark.parametrize(
    ("weight", "how", "message"),
    [
        (np.zeros((2, 48), np.float32), Quantization(4, 32), "48 numbers are not whole groups"),
        (np.zeros((2, 64), np.float64), Quantization(4, 32), "float64 weights"),
        (np.zeros((2, 64), np.float32), Quantization(7, 32), "bits 7"),
        (np.zeros((2, 64), np.float32), Quantization(4, 16), "group_size 16"),
    ],
)
def test_what_mlx_cannot_quantise_is_refused(weight, how, message):
    with pytest.raises(BridgeError, match=message):
        quantise(weight, how)
