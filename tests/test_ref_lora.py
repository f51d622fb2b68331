"""Low-rank updates in the reference (clauses 5.10, 8.3, 10.5): beside a matrix, in it, and fresh.

Gradients are in test_ref_gradients; what backends make of updates is for conformance.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given

from bridge.checkpoints.initialise import fresh_lora
from bridge.config import LoraConfig, lora_names, tensor_shapes
from bridge.philox import philox4x32
from bridge_conformance import strategies, worst
from bridge_ref.backend import Reference
from bridge_ref.linear import merged
from bridge_ref.model import forward

CONFIG = worst.UPDATED.config


def in_the_matrices(config, tensors):
    """The config and tensors of the same model without updates."""
    plain = replace(config, lora=None)
    modules = {name.partition(".lora_")[0] for name in lora_names(config)}
    return plain, {
        name: merged(config, tensors, name.removesuffix(".weight"))
        if name.removesuffix(".weight") in modules
        else tensors[name]
        for name in tensor_shapes(plain)
    }


@given(case=strategies.lora_cases())
def test_an_update_beside_a_matrix_is_one_in_it(case):
    rows, config = case.rows, case.rows.model.config
    tensors = rows.model.tensors("float64")
    got, _ = forward(config, tensors, *rows.arguments)
    want, _ = forward(*in_the_matrices(config, tensors), *rows.arguments)
    got, want = got[rows.active], want[rows.active]
    assert np.abs(got - want).max() <= 1e-10 * max(1, np.abs(want).max())


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_narrow_matrices_have_their_updates_in_them(weights):
    tensors = worst.UPDATED.tensors("float32")

    def load(config, tensors, **options):
        return Reference().load(config, tensors, device="cpu", dtype="float32", **options)

    model = load(CONFIG, tensors, weights=weights)
    plain = load(*in_the_matrices(CONFIG, tensors), weights=weights)
    cells = worst.DEEP_ROWS.arguments
    np.testing.assert_array_equal(model.logits(*cells), plain.logits(*cells))
    given, same = dict(model.tensors()), dict(plain.tensors())
    assert list(given) == list(tensor_shapes(CONFIG))
    for name, array in given.items():
        np.testing.assert_array_equal(array, same.get(name, 0), name)


def test_fresh_updates_change_nothing_and_are_of_the_seed_alone():
    fresh = fresh_lora(CONFIG, 2**40 + 1)
    assert list(fresh) == lora_names(CONFIG)
    assert fresh_lora(replace(CONFIG, lora=None), 3) == {}
    for name, array in fresh.items():
        assert array.dtype == np.float32 and array.shape == tensor_shapes(CONFIG)[name]
        assert array.any() == (".lora_A." in name)
    name = "model.layers.2.mlp.down_proj.lora_A.weight"  # target 10 of clause 8.3
    word = philox4x32((np.array([0]), 2, 10, 1), 2**40 + 1).reshape(-1)[1]
    u = float(word >> np.uint32(8)) * 2.0**-24
    want = (2 * u - 1 + 2.0**-24) / np.sqrt(CONFIG.intermediate_size)
    assert fresh[name][0, 1] == np.float32(want)
    again = fresh_lora(replace(CONFIG, lora=LoraConfig(3, 1.0)), 2**40 + 1)
    np.testing.assert_array_equal(again[name], fresh[name])  # whatever else has updates


def test_a_plain_host_keeps_its_updates():
    host = CONFIG.without_bridge()
    assert lora_names(host) == lora_names(CONFIG) and host.lora == CONFIG.lora
    assert [n for n in tensor_shapes(CONFIG) if ".bridge." not in n] == list(tensor_shapes(host))
