"""A checkpoint whose tensors have different dtypes, layer by layer: every backend computes with the
stored numbers, each rounded once to the dtype that it computes in, or refuses those too large."""

import ml_dtypes
import numpy as np
import pytest
from tiny_host import write_host

import bridge
from bridge.checkpoints.initialise import init
from bridge.checkpoints.reading import open_checkpoint
from bridge.checkpoints.safetensors_io import specs_of, write_safetensors
from bridge.errors import BridgeError
from bridge_conformance.tolerance import allowance, error

BACKENDS = ("numpy", "torch", "jax", "mlx")
BFLOAT16, FLOAT16, FLOAT64 = map(np.dtype, (ml_dtypes.bfloat16, np.float16, np.float64))
pytestmark = pytest.mark.usefixtures("one_thread")


def write(path, change=lambda name, array: array):
    """A model with layers in bfloat16 and in float16, and what no layer has in float64."""
    host = path.parent / f"{path.name}-host"
    write_host(host)
    init(host, path, heads=2, head_dim=4, layers="0,1")
    opened = open_checkpoint(path)
    rng = np.random.default_rng(0)
    tensors = {}
    for name, spec in opened.specs.items():
        dtype = BFLOAT16 if ".layers.0." in name else FLOAT16 if ".layers." in name else FLOAT64
        tensors[name] = change(name, rng.normal(0.1, 0.2, spec.shape).astype(dtype))
    write_safetensors(
        path / "model.safetensors", specs_of(tensors), tensors.items(), {"format": "pt"}
    )
    return path, tensors


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    path, tensors = write(tmp_path_factory.mktemp("mixed") / "model")
    assert {array.dtype for array in tensors.values()} == {BFLOAT16, FLOAT16, FLOAT64}
    return path, tensors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_number_is_rounded_once(mixed, backend, dtype):
    path, stored = mixed
    model = bridge.load(path, backend=backend, dtype=dtype)
    for name, tensor in model.implementation.tensors():
        exact = stored[name].astype(np.float64)
        want = bridge_rounded(exact, np.dtype(dtype))
        assert tensor.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(tensor.astype(np.float64), want, err_msg=name)


def bridge_rounded(exact, dtype):
    """To the nearest, ties to even, by hand: on the grid of the dtype's own exponent."""
    bits = ml_dtypes.finfo(dtype).nmant
    _, exponent = np.frexp(exact)
    exponent = np.maximum(exponent, ml_dtypes.finfo(dtype).minexp + 1)
    return np.ldexp(np.round(np.ldexp(exact, bits + 1 - exponent)), exponent - bits - 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_computes_as_the_reference(mixed, backend):
    path, _ = mixed
    tokens = np.array([[1, 2, 3, 4], [1, 2, 5, 6]])
    exact, own, got = (
        bridge.load(path, backend=b, dtype=d).logits(tokens, groups=[0, 0])
        for b, d in (("numpy", "float64"), ("numpy", "float32"), (backend, "float32"))
    )
    assert error(got, exact) <= allowance(exact, own, "float32")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_number_too_large_is_named(tmp_path, backend):
    def large(name, array):
        if name == "model.layers.1.mlp.up_proj.weight":
            array = array.astype(ml_dtypes.bfloat16)
            array[0, 0] = 1e6
        return array

    path, _ = write(tmp_path / "model", large)
    bridge.load(path, backend=backend, dtype="bfloat16")
    with pytest.raises(BridgeError, match=r"up_proj.weight' holds 999424.0.*too large for float16"):
        bridge.load(path, backend=backend, dtype="float16")
