"""What mlx-lm makes of our checkpoints, and we of its own, against the reference.

mlx-lm loads the host part as it is, and with the code that a checkpoint carries the whole model.
Its results are held to the numerics rule (clause 10.2) where it computes what the spec says.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_host import write_host

import bridge
from bridge.checkpoints.packing import Packed
from bridge.checkpoints.reading import open_checkpoint
from bridge.checkpoints.safetensors_io import specs_of, write_safetensors
from bridge.config import FAMILIES
from bridge.config.quantization import Quantization
from bridge.contract import SFT, AdamW, Batch
from bridge.errors import BridgeError
from bridge_conformance import checks_decode, checks_model, strategies
from bridge_conformance.cases import ModelCase, rows_of
from bridge_conformance.trial import Target, Trial

mx = pytest.importorskip("mlx.core")
mlx_lm = pytest.importorskip("mlx_lm")

from mlx_lm_backend import MlxLm, suited, write_mlx  # noqa: E402
from test_mlx_quantised import Held, Quantised, quantised  # noqa: E402

from bridge_mlx.backend import to_numpy  # noqa: E402
from bridge_mlx.linear import Quantised as PackedByMlx  # noqa: E402


def on_mlx_lm(model, **options):
    backend: Any = MlxLm(model.raw, **options)  # it has what these checks ask for, and no more
    return Target(backend, "cpu", "float32")


def with_suited(model):
    """The same case, of a config that mlx-lm can compute."""
    return replace(model, raw=suited(model.raw))


@st.composite
def rows_without_gaps(draw, quantise=False):
    """Rows without gaps, whose positions are then a row's own timesteps, up to where it begins."""
    case = draw(strategies.rows_cases(magnitudes=("plain",)))
    case = draw(quantised(st.just(case))) if quantise else case
    B, S = case.active.shape
    patterns = st.sampled_from(["full", "left", "right", "both", "none"])
    patterns = draw(st.lists(patterns, min_size=B, max_size=B))
    _, widths = np.unique(case.groups, return_counts=True)
    return rows_of(
        with_suited(case.model), widths.tolist(), S, patterns, False, draw(st.integers(0, 2**32))
    )


@st.composite
def decoded(draw, quantise=False):
    case = draw(strategies.decode_cases())
    case = draw(quantised(st.just(case))) if quantise else case
    model = case.model if quantise else ModelCase(case.model.raw, case.model.seed)
    return replace(case, model=with_suited(model))


@pytest.mark.parametrize("quantise", [False, True], ids=["floats", "quantised"])
@settings(max_examples=25)
@given(data=st.data())
def test_the_code_for_mlx_lm_is_the_model(quantise, data):
    """Every family, ragged groups, padding, ended rows; teacher-forced, and in mlx-lm's caches."""
    rows = data.draw(rows_without_gaps(quantise))
    checks_model.logits_are_within_the_numerics_rule(on_mlx_lm(rows.model), rows)
    case = data.draw(decoded(quantise))
    checks_decode.cached_decoding_equals_teacher_forcing(on_mlx_lm(case.model), case)


def plain(family="llama", **changes):
    """A config that says all that mlx-lm reads, in the spelling that each of its models knows."""
    return {
        "model_type": family,
        "vocab_size": 40,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        **({"sliding_window": None} if family == "mistral" else {}),
        "bridge": {
            "spec_version": "1.0",
            "kind": "attention",
            "num_heads": 2,
            "head_dim": 8,
            "layers": [0, 2],
            "norm_eps": 1e-6,
        },
        **changes,
    }


def of_one_prompt(model):
    """Rows of two groups, none of them padded."""
    return rows_of(model, [2, 1], 7, ["full"] * 3, False, 0)


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_mlx_lm_loads_the_host_part_unchanged(family, tied, bits):
    """By its own strict loader and with its own model, though blocks lie beside the host. Fresh
    blocks do nothing (clause 3.8), so the reference is the same with them."""
    raw = plain(family, tie_word_embeddings=tied)
    how = Quantization(bits, 32) if bits else None
    case = of_one_prompt(Quantised(raw, 0, hows=(how,), fresh=True))
    target = on_mlx_lm(case.model, code=False)
    checks_model.logits_are_within_the_numerics_rule(target, case)


@pytest.mark.parametrize("family", FAMILIES)
def test_where_a_config_is_silent_transformers_defaults_hold(family):
    """mlx-lm takes some of them otherwise, and asks for others."""
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "bridge")
    raw = {k: v for k, v in plain(family).items() if k in ("model_type", *needed)}
    raw |= {"num_attention_heads": 32 if family == "qwen2" else 8, "hidden_size": 128}
    if family == "qwen3":
        raw |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    case = of_one_prompt(ModelCase(raw, 0))
    checks_model.logits_are_within_the_numerics_rule(on_mlx_lm(case.model), case)


YARN = {"rope_type": "yarn", "factor": 2.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "model_type 'gemma'"),
        ({"bridge": None}, "or no bridge"),
        ({"rope_scaling": {**YARN, "attention_factor": 1.5}}, "attention_factor"),
        ({"rope_scaling": {**YARN, "truncate": False}}, "truncate"),
        ({"rope_parameters": {**YARN, "rope_theta": 10.0, "mscale": 1.5}}, "mscale alone"),
        ({"rope_scaling": {**YARN, "mscale_all_dim": 1.5}}, "mscale alone"),
        ({"rope_scaling": {**YARN, "mscale": 1.5, "mscale_all_dim": 0}}, "mscale alone"),
        ({"model_type": "qwen2", "head_dim": 64}, "head_dim of 32 alone"),
        ({"model_type": "qwen3", "attention_bias": True}, "no attention_bias"),
    ],
)
def test_what_mlx_lm_does_not_compute_is_refused(tmp_path, changes, message):
    write_mlx(tmp_path, plain(), ModelCase(plain(), 0).tensors("float32"))
    config = tmp_path / "config.json"
    said = {**json.loads(config.read_text()), **changes}
    config.write_text(json.dumps({k: v for k, v in said.items() if v is not None}))
    with pytest.raises(ValueError, match=message):
        mlx_lm.utils.load_model(tmp_path, trust_remote_code=True)


def host_on_disk(path, family, **changes):
    """A tiny host with a tokenizer, as Hugging Face writes one."""
    raw = {k: v for k, v in plain(family, **changes).items() if k != "bridge"}
    return write_host(path, **{**raw, "vocab_size": 257})


RECIPES = {
    "floats": {},
    "bfloat16": {"dtype": "bfloat16"},
    "4 bits": {"quantize": True, "q_bits": 4, "q_group_size": 32},
    "8 bits": {"quantize": True, "q_bits": 8, "q_group_size": 64},
    "3 bits, half": {"quantize": True, "q_bits": 3, "q_group_size": 64, "dtype": "float16"},
    "mixed": {"quantize": True, "q_group_size": 32, "quant_predicate": "mixed_4_6"},
}


@dataclass(frozen=True)
class Written(ModelCase):
    """What a directory holds: the exact values, in float64 those of what is packed."""

    path: Path = Path()
    fresh: bool = False

    def tensors(self, dtype: str, *, fresh: bool = False) -> Held:
        stored, held = open_checkpoint(self.path).tensors, Held()
        packed = {name: stored.packed(name) for name in stored}
        held.packings = {name: how for name, how in packed.items() if how is not None}
        for name, how in packed.items():
            held[name] = stored[name] if how is None else how.dequantise(dtype=np.float64)
            if self.fresh and name.endswith(".bridge.o_proj.weight"):
                held[name] = np.zeros_like(held[name])
        return held


def written(path, dtype="float32", **options):
    """A trial of what a directory holds; a batch; its exact logits, and their allowance."""
    case = of_one_prompt(Written(open_checkpoint(path).raw_config, 0, path=path, **options))
    trial = Trial(replace(on_mlx_lm(case.model), dtype=dtype), case.model)
    return trial, case, *trial.allowance(lambda model: model.logits(*case.arguments))


def packed_in(trial) -> dict[str, Packed]:
    """What of a trial's model is packed."""
    return trial.tensors.packings


def logits_of_mlx_lm(path, case, **options):
    """By `mlx_lm.load`, as a user calls it."""
    model, _ = mlx_lm.load(str(path), trust_remote_code=bool(options))
    with mx.stream(mx.cpu):
        return to_numpy(model(mx.array(case.tokens), **options).astype(mx.float32))


def logits_of(path, case, backend):
    """By our backend, which, if it is bridge_mlx, holds packed what is packed."""
    loaded = bridge.load(path, backend=backend, device="cpu", dtype="float32")
    if backend == "mlx":
        parts: Any = loaded.implementation
        held = {n for n, part in parts.transformer.parts() if isinstance(part, PackedByMlx)}
        assert held == case.model.tensors("float32").packings.keys()
    return loaded.logits(case.tokens, groups=case.groups)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_mlx_lm_wrote_is_loaded(tmp_path, family, recipe):
    """A directory of `mlx_lm.convert`, by bridge_mlx, which keeps it packed, by torch, and by
    mlx-lm: all within the numerics rule around the exact value of what it holds."""
    options = {"tie_word_embeddings": family != "qwen2", "num_hidden_layers": 4}
    host = host_on_disk(tmp_path / "host", family, **options)
    path = tmp_path / "mlx"
    mlx_lm.convert(str(host), str(path), **RECIPES[recipe])
    stored = open_checkpoint(path)
    trial, case, exact, allowed = written(path)
    packed = packed_in(trial)
    kinds = {"floats": 0, "bfloat16": 0, "mixed": 2}.get(recipe, 1)
    assert stored.form == "mlx" and len({how.bits for how in packed.values()}) == kinds
    trial.same(logits_of(path, case, "mlx"), exact, allowed, "logits of bridge_mlx", case)
    if stored.dtype == "float32":  # mlx-lm computes in the dtype that is stored
        trial.same(logits_of_mlx_lm(path, case), exact, allowed, "logits of mlx-lm", case)
    if packed:  # torch reads them dequantised, in the dtype of their scales
        trial, case, exact, allowed = written(path, stored.dtype)
    trial.same(logits_of(path, case, "torch"), exact, allowed, "logits of torch", case)


@pytest.fixture
def with_blocks(tmp_path):
    """A directory of the form `torch` with blocks that do something, and a tokenizer."""
    host = host_on_disk(tmp_path / "host", "llama", tie_word_embeddings=True)
    raw = {**plain(tie_word_embeddings=True), "vocab_size": 257}
    raw["bridge"] = {**raw["bridge"], "head_dim": 16}
    tensors = ModelCase(raw, 0).tensors("float32")
    (host / "config.json").write_text(json.dumps(raw))
    write_safetensors(host / "model.safetensors", specs_of(tensors), tensors.items())
    return host


@pytest.mark.parametrize(
    ("bits", "options"),
    [
        (None, {}),
        (None, {"shard_size": 20_000}),
        (4, {}),
        (8, {"shard_size": "20KB"}),
        (4, {"quantize_blocks": True}),
        (8, {"quantize_blocks": True}),
    ],
)
def test_what_convert_writes_runs_in_mlx_lm(with_blocks, tmp_path, bits, options):
    """The whole model and the plain host, in bridge_mlx and in mlx-lm, around the exact value."""
    packing = {"quantize": bits, "group_size": 32} if bits else {}
    path, plain_ = tmp_path / "mlx", tmp_path / "plain"
    bridge.convert(with_blocks, path, to="mlx", remote_code=True, **packing, **options)
    trial, case, exact, allowed = written(path)
    packed = packed_in(trial)
    assert bool(packed) == bool(bits)
    assert any(".bridge." in name for name in packed) == bool(options.get("quantize_blocks"))
    trial.same(logits_of(path, case, "mlx"), exact, allowed, "logits of bridge_mlx", case)
    got = logits_of_mlx_lm(path, case, groups=case.groups.tolist())
    trial.same(got, exact, allowed, "logits of mlx-lm", case)

    bridge.convert(with_blocks, plain_, to="mlx", **packing, **options)
    trial, case, exact, allowed = written(plain_, fresh=True)  # as its host (clause 3.8)
    trial.same(logits_of_mlx_lm(plain_, case), exact, allowed, "logits of the host", case)


@pytest.mark.parametrize("form", ["torch", "mlx"])
def test_an_adapter_is_no_model_for_mlx_lm(with_blocks, tmp_path, form):
    bridge.convert(with_blocks, tmp_path / "adapter", to=form, adapter=True)
    with pytest.raises(FileNotFoundError, match="No safetensors found"):
        mlx_lm.load(str(tmp_path / "adapter"))


ROPES = {
    "default": {"rope_theta": 100.0},
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 100.0,
    },
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 100.0,
    },
    "yarn of the context": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 100.0},
}


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_mlx_lm_reads_the_rope_settings_of_transformers_5(tmp_path, family, kind, outside):
    """Most of its models read the older spelling alone; converted back, the config is as it was."""
    rope = dict(ROPES[kind])
    theta = {"rope_theta": rope.pop("rope_theta")} if outside else {}
    raw = {k: v for k, v in plain(family).items() if k not in ("rope_theta", "bridge")}
    source = write_host(tmp_path / "host", **{**raw, **theta, "rope_parameters": rope})
    bridge.convert(source, tmp_path / "mlx", to="mlx")
    trial, case, exact, allowed = written(tmp_path / "mlx")
    trial.same(logits_of_mlx_lm(tmp_path / "mlx", case), exact, allowed, "logits", case)
    bridge.convert(tmp_path / "mlx", tmp_path / "back", to="torch")
    before, after = (
        json.loads((tmp_path / d / "config.json").read_text()) for d in ("host", "back")
    )
    assert list(after.items()) == list(before.items())


def test_blocks_of_a_converted_model_are_trained_and_packed_tensors_are_not(with_blocks, tmp_path):
    bridge.convert(with_blocks, tmp_path / "a", to="mlx", quantize=4, group_size=32)
    model = bridge.load(tmp_path / "a", backend="mlx", device="cpu")
    tokens = np.arange(12).reshape(2, 6)
    active = np.ones((2, 6), bool)
    batch = Batch(tokens, np.zeros(2, int), active, np.roll(tokens, -1, 1), active)
    losses = [each["loss"] for each in steps_of(model.trainer(SFT(), AdamW(lr=0.01)), batch)]
    assert losses[-1] < losses[0]
    with pytest.raises(BridgeError, match="is quantised, which cannot be trained"):
        model.trainer(SFT(), AdamW(), trainable="all")
    bridge.convert(
        with_blocks, tmp_path / "b", to="mlx", quantize=4, group_size=32, quantize_blocks=True
    )
    packed = bridge.load(tmp_path / "b", backend="mlx", device="cpu")
    with pytest.raises(BridgeError, match=r"bridge\..* is quantised, which cannot be trained"):
        packed.trainer(SFT(), AdamW())


def steps_of(trainer, batch):
    return [trainer.step(batch) for _ in range(3)]
