"""`bridge.convert`: round trips byte for byte, one file for the same tensors, adapters, packing."""

import filecmp
import hashlib
import json
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny_host import write_host

import bridge
from bridge.checkpoints.conversion import parse_size
from bridge.checkpoints.initialise import init
from bridge.checkpoints.reading import open_checkpoint
from bridge.config import parse_config, tensor_shapes
from bridge.errors import BridgeError
from bridge.numbers.rounding import rounded
from bridge_conformance import strategies

DTYPES = [np.dtype(t) for t in (np.float32, ml_dtypes.bfloat16, np.float16, np.float64)]
BF16 = DTYPES[1]
SHARDS = st.sampled_from([2000, "5kB", "1MB"])


@st.composite
def checkpoints(draw):
    """A raw config, with blocks or without, and tensors of one dtype or of several."""
    raw = dict(draw(strategies.models()).raw)
    if draw(st.booleans()):
        del raw["bridge"]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    chosen = draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3))
    tensors = {}
    for name, shape in tensor_shapes(parse_config(raw)).items():
        # Layers of a stack agree in dtype more often than not.
        layer = rng.random() < 0.1
        key = name if layer else ".".join(p for p in name.split(".") if not p.isdigit())
        pick = chosen[int(hashlib.sha256(key.encode()).hexdigest(), 16) % len(chosen)]
        tensors[name] = rng.normal(size=shape).astype(pick)
    return raw, tensors


def write_source(path, raw, tensors, shards, indent):
    """A checkpoint as others may write it: any order, any spacing, any number of shards."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(raw, indent=indent, ensure_ascii=True))
    names = sorted(tensors, key=lambda name: hashlib.sha256(name.encode()).digest())
    parts = {f"part-{i}.safetensors": names[i::shards] for i in range(shards) if names[i::shards]}
    if shards == 1:
        return save_file(tensors, path / "model.safetensors")
    for part, members in parts.items():
        save_file({name: tensors[name] for name in members}, path / part)
    places = {name: part for part, members in parts.items() for name in members}
    index = path / "model.safetensors.index.json"
    return index.write_text(json.dumps({"metadata": {}, "weight_map": places}))


def same_directories(one, other):
    """The same files with the same bytes."""
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in other.iterdir())
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name


@given(checkpoints(), st.integers(1, 3), st.sampled_from([None, 4]), SHARDS, SHARDS, st.data())
def test_a_round_trip_through_all_forms_changes_nothing(made, shards, indent, size, other, data):
    """Clause 9.12: tensors, dtypes and config, byte for byte; and clause 9.8: the same files."""
    raw, tensors = made
    with TemporaryDirectory() as parent:
        root = Path(parent)
        write_source(root / "src", raw, tensors, shards, indent)
        bridge.convert(root / "src", root / "first", "torch", shard_size=size)
        before = "first"
        for form in (*data.draw(st.permutations(["jax", "mlx"])), "torch"):
            shard_size = size if form == "torch" else other
            bridge.convert(root / before, root / form, form, shard_size=shard_size)
            opened = open_checkpoint(root / form)
            assert list(opened.tensors) == list(tensor_shapes(parse_config(raw)))
            for name, array in tensors.items():
                got = opened.tensors[name]
                assert (got.dtype, got.tobytes()) == (array.dtype, array.tobytes()), (form, name)
            said = json.loads((root / form / "config.json").read_text())
            assert list(raw.items()) == [item for item in said.items() if item[0] in raw]
            assert form == "mlx" or said.keys() == raw.keys()  # where rope may be spelled twice
            before = form
        same_directories(root / "first", root / "torch")


@given(checkpoints(), st.sampled_from(["jax", "mlx"]))
def test_the_same_tensors_give_the_same_files(made, form):
    """Clause 9.8: whatever form and shards they come from."""
    raw, tensors = made
    with TemporaryDirectory() as parent:
        root = Path(parent)
        write_source(root / "src", raw, tensors, 3, None)
        bridge.convert(root / "src", root / "direct", form, shard_size=2000)
        bridge.convert(root / "src", root / "other", "jax" if form == "mlx" else "mlx")
        bridge.convert(root / "other", root / "back", form, shard_size=2000)
        same_directories(root / "direct", root / "back")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A host whose matrices can be quantised, and a model of it with blocks that do something."""
    root = tmp_path_factory.mktemp("conversion")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "rms_norm_eps": 1e-6}
    host = write_host(root / "host", **sizes)
    init(host, root / "model", heads=2, head_dim=32, layers="0,2")
    tensors = load_file(root / "model" / "model.safetensors")
    rng = np.random.default_rng(1)
    for name in tensors:
        if name.endswith("bridge.o_proj.weight"):
            tensors[name] = rng.normal(size=tensors[name].shape).astype(np.float32)
    save_file(tensors, root / "model" / "model.safetensors", metadata={"format": "pt"})
    return root


def tensors_of(path):
    opened = open_checkpoint(path)
    return {name: np.array(opened.tensors[name]) for name in opened.tensors}


def equal(one, other):
    assert list(one) == list(other)
    for name, array in one.items():
        assert (array.dtype, array.tobytes()) == (other[name].dtype, other[name].tobytes()), name


# What each form is, to others


def test_the_jax_form_is_ready_for_a_scan(made, tmp_path):
    """Each stack is one array over the layers, by the safetensors library."""
    bridge.convert(made / "model", tmp_path / "jax", "jax")
    stored = load_file(tmp_path / "jax" / "model.safetensors")
    whole = load_file(made / "model" / "model.safetensors")
    for name, array in stored.items():
        rest = name.removeprefix("model.layers.*.")
        layers = (0, 2) if rest.startswith("bridge.") else (0, 1, 2)
        names = [f"model.layers.{i}.{rest}" for i in layers] if rest != name else [name]
        want = np.stack([whole[n] for n in names]) if rest != name else whole[name]
        assert array.tobytes() == want.tobytes() and array.shape == want.shape, name
    # embedding, norm and head; nine host tensors and five of a block a layer
    assert len(stored) == 3 + 9 + 5


def test_transformers_reads_the_host_of_the_torch_form(made, tmp_path):
    from transformers import AutoModelForCausalLM

    bridge.convert(made / "model", tmp_path / "jax", "jax")
    bridge.convert(tmp_path / "jax", tmp_path / "torch", "torch", shard_size="50kB")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "torch", dtype="auto").state_dict()
    host = tensors_of(made / "host")
    assert theirs.keys() == host.keys()
    for name, array in host.items():
        assert theirs[name].numpy().tobytes() == array.tobytes(), name


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tied", [False, True])
def test_quantised_is_what_mlx_lm_makes_of_the_host(tmp_path, bits, tied):
    """The same tensors, to the byte; and mlx-lm loads ours, blocks beside them or not."""
    import mlx.core as mx
    from mlx_lm.utils import load_model, quantize_model

    sizes = {"hidden_size": 64, "intermediate_size": 96, "rms_norm_eps": 1e-6}
    host = write_host(tmp_path / "host", tie_word_embeddings=tied, **sizes)
    init(host, tmp_path / "model", heads=2, head_dim=32)
    said = bridge.convert(tmp_path / "model", tmp_path / "ours", quantize=bits, group_size=32)
    assert said.quantization == {"bits": bits, "group_size": 32, "mode": "affine"}
    model, _ = load_model(host)
    theirs, config = quantize_model(model, json.loads((host / "config.json").read_text()), 32, bits)
    from mlx.utils import tree_flatten

    want = dict(tree_flatten(theirs.parameters()))
    got = load_file(tmp_path / "ours" / "model.safetensors")
    assert want.keys() == got.keys()
    for name, array in want.items():
        assert np.array(array).tobytes() == got[name].tobytes(), name
    raw = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert raw["quantization"] == raw["quantization_config"] == config["quantization"]
    tokens = mx.array([[1, 2, 3]])
    assert mx.array_equal(load_model(tmp_path / "ours")[0](tokens), theirs(tokens))
    assert (
        open_checkpoint(tmp_path / "ours").tensors.packed("model.layers.0.bridge.q_proj.weight")
        is None
    )


# Quantised checkpoints


def test_blocks_are_quantised_where_asked_for(made, tmp_path):
    bridge.convert(made / "model", tmp_path / "q", quantize=8, group_size=32, quantize_blocks=True)
    tensors = open_checkpoint(tmp_path / "q").tensors
    matrices = [name for name, spec in tensors.specs.items() if len(spec.shape) == 2]
    assert all(tensors.packed(name) is not None for name in matrices)


def test_a_quantised_checkpoint_stays_one_in_mlx_and_nowhere_else(made, tmp_path):
    kept = bridge.convert(made / "model", tmp_path / "q", quantize=4, group_size=32)
    again = bridge.convert(tmp_path / "q", tmp_path / "again")
    same_directories(tmp_path / "q", tmp_path / "again")
    assert (again.bytes, again.dequantised) == (kept.bytes, False)
    floats = tensors_of(tmp_path / "q")
    for form in ("torch", "jax"):
        said = bridge.convert(tmp_path / "q", tmp_path / form, form)
        assert (said.quantization, said.dequantised) == (None, True)
        equal(tensors_of(tmp_path / form), floats)
        assert filecmp.cmp(tmp_path / form / "config.json", made / "model" / "config.json", False)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"dtype": "f32"}, "leave --dtype out"),
        ({"quantize": 4}, "is quantised already"),
    ],
)
def test_what_would_lose_silently_is_refused(made, tmp_path, options, message):
    bridge.convert(made / "model", tmp_path / "q", quantize=8, group_size=32)
    with pytest.raises(BridgeError, match=message):
        bridge.convert(tmp_path / "q", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_blocks_init_on_a_quantised_host_make_a_checkpoint_of_floats(made, tmp_path):
    bridge.convert(made / "host", tmp_path / "q", quantize=8, group_size=32)
    init(tmp_path / "q", tmp_path / "model", heads=2, head_dim=4)
    assert "quantization" not in json.loads((tmp_path / "model" / "config.json").read_text())
    host = tensors_of(tmp_path / "q")
    got = tensors_of(tmp_path / "model")
    equal(host, {name: got[name] for name in host})


# Adapters


@pytest.mark.parametrize("form", ["torch", "jax", "mlx"])
def test_blocks_apart_and_put_back(made, tmp_path, form):
    said = bridge.convert(made / "model", tmp_path / "adapter", form, adapter=True)
    whole = tensors_of(made / "model")
    blocks = {name: array for name, array in whole.items() if ".bridge." in name}
    assert said.adapter and said.bytes == sum(array.nbytes for array in blocks.values())
    opened = open_checkpoint(tmp_path / "adapter")  # on the model itself, whose host counts
    assert (opened.form, opened.base and opened.base.path) == (form, made / "model")
    equal(tensors_of(tmp_path / "adapter"), whole)
    bridge.convert(tmp_path / "adapter", tmp_path / "named", "torch")
    bridge.convert(tmp_path / "adapter", tmp_path / "merged", "torch", merge=made / "host")
    bridge.convert(made / "model", tmp_path / "model", "torch")
    same_directories(tmp_path / "named", tmp_path / "model")
    same_directories(tmp_path / "merged", tmp_path / "model")
    assert bridge.load(tmp_path / "adapter", backend="numpy").config == opened.config


@pytest.mark.parametrize("form", ["torch", "jax", "mlx"])
def test_blocks_apart_are_in_a_file_that_no_library_takes_for_a_host(made, tmp_path, form):
    """By `init` and `convert`, however small the shards. Where they were before they are read."""
    path = tmp_path / "adapter"
    bridge.convert(made / "model", path, form, adapter=True, shard_size=1)
    held = {"config.json", "bridge_adapter.json", "bridge.safetensors"}
    assert {file.name for file in path.iterdir()} == held
    init(made / "host", tmp_path / "fresh", heads=2, head_dim=16, adapter=True)
    assert {file.name for file in (tmp_path / "fresh").iterdir()} == held

    (path / "bridge.safetensors").rename(path / "model.safetensors")
    opened = open_checkpoint(path)
    assert opened.form == form and opened.base is not None
    equal(tensors_of(path), tensors_of(made / "model"))
    bridge.convert(path, tmp_path / "again", form, adapter=True)
    assert {file.name for file in (tmp_path / "again").iterdir()} == held
    (path / "model.safetensors").unlink()
    with pytest.raises(BridgeError, match=r"adapter: has no bridge\.safetensors; copy"):
        open_checkpoint(path)


def test_an_adapter_stays_an_adapter_without_its_base(made, tmp_path):
    bridge.convert(made / "model", tmp_path / "model", "torch")
    bridge.convert(tmp_path / "model", tmp_path / "one", "jax", adapter=True)
    (tmp_path / "model").rename(tmp_path / "moved")
    bridge.convert(tmp_path / "one", tmp_path / "two", "torch", adapter=True)
    with pytest.raises(BridgeError, match=r"its base .* is not there"):
        bridge.convert(tmp_path / "one", tmp_path / "whole", "torch")
    (tmp_path / "moved").rename(tmp_path / "model")
    equal(tensors_of(tmp_path / "two"), tensors_of(made / "model"))


def test_another_base_is_refused_unless_any_will_do(made, tmp_path):
    bridge.convert(made / "model", tmp_path / "adapter", "torch", adapter=True)
    bridge.convert(made / "host", tmp_path / "narrow", "torch", dtype="bf16")
    out = tmp_path / "out"
    with pytest.raises(BridgeError, match=r"is not the base of .*--any-base"):
        bridge.convert(tmp_path / "adapter", out, "torch", merge=tmp_path / "narrow")
    assert not out.exists()
    bridge.convert(tmp_path / "adapter", out, "torch", merge=tmp_path / "narrow", any_base=True)
    narrow, whole = tensors_of(tmp_path / "narrow"), tensors_of(made / "model")
    equal(tensors_of(out), {name: narrow.get(name, array) for name, array in whole.items()})
    base = {"base": tmp_path / "narrow", "backend": "numpy"}
    with pytest.raises(BridgeError, match="is not the base of"):
        bridge.load(tmp_path / "adapter", **base)
    bridge.load(tmp_path / "adapter", any_base=True, **base)


def test_the_bases_hash_is_of_its_numbers_whatever_its_form(made, tmp_path):
    bridge.convert(made / "model", tmp_path / "adapter", "torch", adapter=True)
    bridge.convert(made / "host", tmp_path / "stacked", "jax", shard_size="20kB")
    bridge.convert(tmp_path / "adapter", tmp_path / "out", "torch", merge=tmp_path / "stacked")
    equal(tensors_of(tmp_path / "out"), tensors_of(made / "model"))


def test_an_adapter_on_a_quantised_base_keeps_it_quantised(made, tmp_path):
    bridge.convert(made / "model", tmp_path / "q", quantize=4, group_size=32)
    bridge.convert(tmp_path / "q", tmp_path / "adapter", "mlx", adapter=True)
    bridge.convert(tmp_path / "adapter", tmp_path / "whole", "mlx")
    same_directories(tmp_path / "whole", tmp_path / "q")


# Code


@pytest.mark.parametrize(
    "form,key,name",
    [("torch", "auto_map", "modeling_bridge.py"), ("mlx", "model_file", "bridge_mlx_lm.py")],
)
def test_code_comes_and_goes_with_its_key(made, tmp_path, form, key, name):
    bridge.convert(made / "model", tmp_path / "with", form, remote_code=True)
    assert key in json.loads((tmp_path / "with" / "config.json").read_text())
    assert (tmp_path / "with" / name).is_file()
    bridge.convert(tmp_path / "with", tmp_path / "without", "jax")
    assert not (tmp_path / "without" / name).exists()
    assert filecmp.cmp(tmp_path / "without" / "config.json", made / "model" / "config.json", False)


def test_code_of_others_stays_in_the_config(made, tmp_path):
    bridge.convert(made / "host", tmp_path / "host", "torch")
    raw = json.loads((tmp_path / "host" / "config.json").read_text())
    raw["auto_map"] = {"AutoModelForCausalLM": "modeling_theirs.Theirs"}
    (tmp_path / "host" / "config.json").write_text(json.dumps(raw))
    bridge.convert(tmp_path / "host", tmp_path / "jax", "jax")
    assert json.loads((tmp_path / "jax" / "config.json").read_text()) == raw


# Dtypes


def neighbours(x, dtype):
    """The two numbers of `dtype` around a float64, which holds each exactly."""
    bits = np.array(x, np.float64).astype(dtype).view(np.uint16).astype(np.int64)
    around = np.clip(np.array([bits - 1, bits, bits + 1]), 0, 0xFFFF).astype(np.uint16)
    return around, around.view(dtype).astype(np.float64)


FINITE = st.floats(-60000, 60000)
# Halfway between two numbers of bfloat16 or float16, or beside it by less than float32 can tell.
TIES = st.builds(
    lambda halves, m, e, lift, sign: sign * (1 + (2 * m + 1) / halves + lift) * 2.0**e,
    st.sampled_from([256, 2048]),
    st.integers(0, 127),
    st.integers(-14, 14),
    st.sampled_from([0.0, 2.0**-40, -(2.0**-40)]),
    st.sampled_from([1, -1]),
)


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float16)], ids=str)
@given(x=st.one_of(FINITE, TIES))
def test_float64_is_rounded_once_to_the_nearest(dtype, x):
    got = rounded(np.array([x]), dtype, "x")
    bits, values = neighbours(x, dtype)
    distance = [abs(v - x) if np.isfinite(v) else np.inf for v in values]
    nearest = [b for b, d in zip(bits, distance, strict=True) if d == min(distance)]
    even = [b for b in nearest if b % 2 == 0] if len(nearest) > 1 else nearest
    assert float(got[0]) == float(np.array(even[:1], np.uint16).view(dtype)[0])


@pytest.mark.parametrize("alias,torch_name", [("bf16", "bfloat16"), ("f16", "float16")])
def test_dtypes_are_rounded_as_torch_does(made, tmp_path, alias, torch_name):
    import torch

    for form in ("torch", "jax"):
        said = bridge.convert(made / "model", tmp_path / form, form, dtype=alias)
        assert said.dtype == torch_name
        for name, array in tensors_of(made / "model").items():
            want = torch.from_numpy(array).to(getattr(torch, torch_name)).view(torch.int16).numpy()
            assert open_checkpoint(tmp_path / form).tensors[name].tobytes() == want.tobytes()
    bridge.convert(tmp_path / "jax", tmp_path / "wide", "torch", dtype="f32")
    narrow = tensors_of(tmp_path / "torch")
    equal(tensors_of(tmp_path / "wide"), {n: a.astype(np.float32) for n, a in narrow.items()})


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_hosts_own_key_says_the_dtype(tmp_path, key):
    changes: Any = {key: "float32"}
    host = write_host(tmp_path / "host", **changes)
    bridge.convert(host, tmp_path / "out", "torch", dtype="bf16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())[key] == "bfloat16"


def test_what_does_not_fit_float16_is_refused_by_name(made, tmp_path):
    (tmp_path / "src").mkdir()
    tensors = tensors_of(made / "host")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 70000
    raw = json.loads((made / "host" / "config.json").read_text())
    write_source(tmp_path / "big", raw, tensors, 2, None)
    with pytest.raises(BridgeError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.* 70000"):
        bridge.convert(tmp_path / "big", tmp_path / "out", "jax", dtype="f16")
    bridge.convert(tmp_path / "big", tmp_path / "wide", "jax", dtype="bf16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big", "src", "wide"]


# The rest


@pytest.mark.parametrize(
    "text,size",
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("2GiB", 2**31), (" 1.5 kb ", 1500), (4096, 4096)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5 apples", "0", "0.1B", "1e9", "5GB 2"])
def test_what_is_no_size(text):
    with pytest.raises(BridgeError, match="is no size"):
        parse_size(text)


def test_no_file_is_above_the_shard_size_but_for_one_tensor(made, tmp_path):
    bridge.convert(made / "model", tmp_path / "out", "jax", shard_size="30kB")
    files = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 3
    for path in files:
        stored = load_file(path)
        assert len(stored) == 1 or sum(a.nbytes for a in stored.values()) <= 30_000


def test_progress_counts_every_byte(made, tmp_path):
    heard = []
    said = bridge.convert(
        made / "model", tmp_path / "out", "jax", progress=lambda *pair: heard.append(pair)
    )
    assert heard[-1] == (said.bytes, said.bytes) and heard == sorted(heard)
    assert said.bytes == sum(4 * prod(a.shape) for a in tensors_of(made / "model").values())


def test_overwriting_takes_a_checkpoint_alone_and_not_what_is_read(made, tmp_path):
    bridge.convert(made / "model", tmp_path / "out", "jax")
    bridge.convert(made / "model", tmp_path / "out", "torch", overwrite=True)
    equal(tensors_of(tmp_path / "out"), tensors_of(made / "model"))
    bridge.convert(tmp_path / "out", tmp_path / "adapter", "torch", adapter=True)
    for src in ("out", "adapter"):
        with pytest.raises(BridgeError, match="is what is converted"):
            bridge.convert(tmp_path / src, tmp_path / "out", "torch", overwrite=True)


def test_a_real_model_goes_through_all_forms(smollm2, tmp_path):
    """SmolLM2-135M with blocks, in bf16: as torch rounds it, and then byte for byte."""
    import torch
    from safetensors.torch import load_file as load_torch

    init(smollm2, tmp_path / "model", heads=2, head_dim=32)
    bridge.convert(tmp_path / "model", tmp_path / "first", "torch", dtype="bf16")
    wide, narrow = (load_torch(tmp_path / p / "model.safetensors") for p in ("model", "first"))
    assert all(torch.equal(wide[name].bfloat16(), narrow[name]) for name in wide)
    bridge.convert(tmp_path / "first", tmp_path / "jax", "jax", shard_size="100MB")
    bridge.convert(tmp_path / "jax", tmp_path / "mlx", "mlx", shard_size="50MB")
    bridge.convert(tmp_path / "mlx", tmp_path / "torch", "torch")
    same_directories(tmp_path / "first", tmp_path / "torch")
