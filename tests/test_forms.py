"""Reading the three forms: what lies where, in files that other libraries and we wrote by hand."""

import json

import ml_dtypes
import numpy as np
import pytest
from mlx_lm.convert import QUANT_RECIPES
from mlx_lm.convert import convert as mlx_convert
from safetensors.numpy import load_file, save_file
from tiny_host import write_host

from bridge.checkpoints.conversion import convert
from bridge.checkpoints.initialise import init
from bridge.checkpoints.packing import quantise
from bridge.checkpoints.reading import open_checkpoint
from bridge.config.quantization import Quantization
from bridge.errors import BridgeError

Q = "self_attn.q_proj.weight"
STACK = f"model.layers.*.{Q}"
FILE = "model.safetensors"
PARTS = ("lm_head", "model.layers.0.self_attn.q_proj")  # to recipes, of more bits and of fewer


@pytest.fixture
def model(tmp_path):
    """A model with blocks after its first and last layer, in bf16."""
    host = write_host(tmp_path / "host", hidden_size=32, intermediate_size=64)
    init(host, tmp_path / "model", heads=2, head_dim=16, layers="0,2", dtype="bf16")
    return tmp_path / "model"


def rewrite(model, change, *, metadata=None, config=None):
    """Apply `change` to the tensors of a checkpoint, by the library of others."""
    tensors = load_file(model / FILE)
    change(tensors)
    save_file(tensors, model / FILE, metadata=metadata)
    if config is not None:
        raw = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(raw | config))


def stack(tensors, rest, layers):
    """Stack the layers' tensors, as the form jax does."""
    names = [f"model.layers.{i}.{rest}" for i in layers]
    tensors[f"model.layers.*.{rest}"] = np.stack([tensors.pop(name) for name in names])


def pack(tensors, name, bits=4, group_size=32):
    """Quantise a matrix, as the form mlx does."""
    packed = quantise(tensors[name], Quantization(bits, group_size))
    stem = name.removesuffix(".weight")
    parts = {name: packed.weight, f"{stem}.scales": packed.scales, f"{stem}.biases": packed.biases}
    tensors |= parts
    return packed


def read(path):
    """All tensors, read."""
    opened = open_checkpoint(path)
    return {name: np.array(opened.tensors[name]) for name in opened.tensors}


def same(one, other):
    assert list(one) == list(other)
    for name, array in one.items():
        assert array.dtype == other[name].dtype, name
        assert array.tobytes() == other[name].tobytes(), name


def refused(path, *words):
    with pytest.raises(BridgeError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    assert all(word in message for word in words), message


def test_stacked_and_unstacked_are_read_side_by_side(model):
    want = read(model)

    def change(tensors):
        stack(tensors, Q, range(3))
        stack(tensors, "bridge.q_proj.weight", (0, 2))

    rewrite(model, change)
    same(read(model), want)
    opened = open_checkpoint(model)
    assert opened.form == "jax"
    assert opened.specs[f"model.layers.2.{Q}"].shape == (32, 32)


@pytest.mark.parametrize("metadata,form", [({"format": "pt"}, "torch"), ({"format": "mlx"}, "mlx")])
def test_unstacked_files_have_the_form_that_they_say(model, metadata, form):
    rewrite(model, lambda tensors: None, metadata=metadata)
    assert open_checkpoint(model).form == form


def test_blocks_in_a_file_of_their_own(model):
    """With an index that names them, and without one."""
    want, tensors = read(model), load_file(model / FILE)
    blocks = {name: tensors.pop(name) for name in list(tensors) if ".bridge." in name}
    save_file(tensors, model / FILE)
    save_file(blocks, model / "bridge.safetensors")
    same(read(model), want)
    assert open_checkpoint(model).form == "mlx"
    places = dict.fromkeys(tensors, FILE) | dict.fromkeys(blocks, "bridge.safetensors")
    (model / f"{FILE}.index.json").write_text(json.dumps({"weight_map": places}))
    same(read(model), want)
    del places[next(iter(blocks))]
    (model / f"{FILE}.index.json").write_text(json.dumps({"weight_map": places}))
    refused(model, "bridge.safetensors", "is not where model.safetensors.index.json says")


def test_a_layer_given_twice_is_refused(model):
    def change(tensors):
        kept = tensors[f"model.layers.1.{Q}"]
        stack(tensors, Q, range(3))
        tensors[f"model.layers.1.{Q}"] = kept

    rewrite(model, change)
    refused(model, "both give 'model.layers.1.self_attn.q_proj.weight'")


@pytest.mark.parametrize("layers", [(0, 1), (0, 1, 2, 2)])
def test_a_stack_of_another_height_is_refused(model, layers):
    def change(tensors):
        array = np.stack([tensors[f"model.layers.{i}.{Q}"] for i in layers])
        for i in range(3):
            del tensors[f"model.layers.{i}.{Q}"]
        tensors[STACK] = array

    rewrite(model, change)
    refused(model, STACK, "calls for 3 layers along its first axis")


def test_an_empty_stack_is_not_passed_over(tmp_path):
    host = write_host(tmp_path / "host")
    empty = np.zeros((0, 4, 4), np.float32)
    name = "model.layers.*.bridge.q_proj.weight"
    rewrite(host, lambda tensors: tensors.update({name: empty}))
    refused(host, name, "not one that config.json calls for")


QUANTISED = {"quantization": {"bits": 4, "group_size": 32}}


def test_a_quantised_matrix_is_a_float_matrix_when_asked_for(model):
    packed = []
    name = f"model.layers.1.{Q}"
    rewrite(model, lambda t: packed.append(pack(t, name)), config=QUANTISED)
    opened = open_checkpoint(model)
    assert (opened.form, opened.quantization) == ("mlx", Quantization(4, 32))
    assert opened.dtype == "bfloat16"
    assert opened.specs[name] == (np.dtype(ml_dtypes.bfloat16), (32, 32))
    array = opened.tensors[name]
    assert array.tobytes() == packed[0].dequantise().tobytes()
    held = opened.tensors.packed(name)
    assert held is not None and held.weight.tobytes() == packed[0].weight.tobytes()
    assert opened.tensors.packed(f"model.layers.0.{Q}") is None
    assert opened.tensors.nbytes(name) == 32 * 4 * 4 + 2 * 32 * 2


def test_bits_are_those_that_shapes_imply(model):
    """As mlx-lm's mixed recipes write them, with their own entry in the config or without."""
    names = [f"model.layers.{i}.{Q}" for i in (0, 1)]

    def change(tensors):
        for name, bits in zip(names, (4, 8), strict=True):
            pack(tensors, name, bits)

    entry = {"model.layers.1.self_attn.q_proj": {"bits": 8, "group_size": 32}}
    rewrite(model, change, config={"quantization": QUANTISED["quantization"] | entry})
    opened = open_checkpoint(model)
    held = [opened.tensors.packed(name) for name in names]
    assert [p and (p.bits, p.group_size) for p in held] == [(4, 32), (8, 32)]


def narrow(tensors, name, part, edit):
    pack(tensors, name)
    key = name.replace("weight", part)
    tensors[key] = edit(tensors[key])


@pytest.mark.parametrize(
    "part,edit,words",
    [
        ("weight", lambda a: a.astype(np.int32), ("uint32",)),
        ("weight", lambda a: a[:, :1].copy(), ("bits 1 is not one of",)),
        ("scales", lambda a: a[:-1].copy(), ("differ",)),
        ("biases", lambda a: a.astype(np.float16), ("differ",)),
        ("biases", lambda a: a.astype(np.int8), ("biases",)),
    ],
)
def test_parts_that_do_not_fit_are_refused(model, part, edit, words):
    name = f"model.layers.0.{Q}"
    rewrite(model, lambda t: narrow(t, name, part, edit), config=QUANTISED)
    refused(model, "q_proj", *words)


def test_what_is_quantised_is_said_in_the_config(model):
    rewrite(model, lambda t: pack(t, f"model.layers.0.{Q}"))
    refused(model, "config.json has no quantization")


def test_scales_that_are_not_finite_are_refused_when_read(model):
    name = f"model.layers.0.{Q}"
    edit = np.full_like
    rewrite(model, lambda t: narrow(t, name, "scales", lambda a: edit(a, np.nan)), config=QUANTISED)
    opened = open_checkpoint(model)
    for read_one in (opened.tensors.packed, opened.tensors.__getitem__):
        with pytest.raises(BridgeError, match=r"q_proj.scales' holds nan at \[0, 0\]"):
            read_one(name)


OTHERS = {
    "quant_method 'gptq'": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "quant_method 'fp8'": {"quantization_config": {"quant_method": "fp8"}},
    "mode 'mxfp4'": {"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4"}},
    "bits 7": {"quantization": {"bits": 7, "group_size": 32}},
    "group_size 48": {"quantization": {"bits": 4, "group_size": 48}},
    "global_scale": {"quantization": {"bits": 4, "group_size": 32, "global_scale": 1}},
    "group_size is missing": {"quantization": {"bits": 4}},
    "q_proj.mode": {"quantization": {"bits": 4, "group_size": 64, "q_proj": {"mode": "mxfp4"}}},
}


@pytest.mark.parametrize("message", OTHERS)
def test_other_quantisations_are_refused_by_name(model, message):
    rewrite(model, lambda tensors: None, config=OTHERS[message])
    refused(model, "quantization", message)


def test_a_directory_of_mlx_lm_is_read(tmp_path):
    """Its index beside the one file, its quantised tied embedding, its config."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    sizes = {"hidden_size": 64, "intermediate_size": 128, "rms_norm_eps": 1e-6}
    host = write_host(tmp_path / "host", tie_word_embeddings=True, **sizes)
    (host / FILE).unlink()
    raw = json.loads((host / "config.json").read_text())
    floats = write_host(tmp_path / "floats", tie_word_embeddings=True, **sizes)
    model, config = quantize_model(*load_model(floats), group_size=32, bits=8)
    save_model(host, model)
    save_config(config, host / "config.json")
    opened, exact = open_checkpoint(host), read(floats)
    assert opened.form == "mlx" and opened.quantization == Quantization(8, 32)
    assert opened.config == open_checkpoint(floats).config and raw.items() <= config.items()
    for name, want in exact.items():
        step = np.ptp(want) / 255 if want.ndim == 2 else 0
        assert np.abs(opened.tensors[name] - want).max() <= step, name
    assert opened.tensors.packed("model.embed_tokens.weight") is not None


@pytest.mark.parametrize("recipe", QUANT_RECIPES)
def test_the_recipes_of_mlx_lm_are_read(tmp_path, recipe):
    """They leave out, by null, how many numbers a group of single modules has: MLX's 64. What comes
    out is what mlx-lm itself dequantises, and a conversion keeps what they say."""
    host = write_host(tmp_path / "host", hidden_size=64, intermediate_size=64, rms_norm_eps=1e-6)
    theirs, back = tmp_path / "theirs", tmp_path / "back"
    mlx_convert(str(host), str(theirs), quantize=True, quant_predicate=recipe)
    mlx_convert(str(theirs), str(back), dequantize=True)
    raw = json.loads((theirs / "config.json").read_text())
    assert raw["quantization"]["lm_head"]["group_size"] is None
    assert open_checkpoint(theirs).quantization == Quantization(4, 64)
    got, want = read(theirs), read(back)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        np.testing.assert_array_equal(got[name], tensor, err_msg=name)
    packed = [open_checkpoint(theirs).tensors.packed(f"{module}.weight") for module in PARTS]
    assert {each.bits for each in packed if each} == {int(bits) for bits in recipe.split("_")[1:]}
    assert convert(theirs, tmp_path / "ours").quantization == raw["quantization"]
    assert read(tmp_path / "ours").keys() == got.keys()
