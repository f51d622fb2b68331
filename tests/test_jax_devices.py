"""The JAX backend on devices that are not here: a mesh of eight virtual ones, and TPUs."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from bridge.config import LoraConfig, parse_config
from bridge.contract import GRPO, AdamW, Batch, Sampling
from bridge_conformance.cases import random_tensors
from bridge_conformance.tolerance import allowance, error
from bridge_jax import adamw, backend, leaves, losses, pieces, steps, train, weights
from bridge_jax import model as transformer
from bridge_jax.backend import JaxBackend
from bridge_jax.block import Layout
from bridge_jax.sampling import Settings, sample
from bridge_ref.backend import Reference

RAW = {
    "model_type": "qwen2",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "use_sliding_window": True,
    "sliding_window": 5,
    "max_window_layers": 2,
    "bridge": {
        "spec_version": "1.0",
        "kind": "attention",
        "num_heads": 8,
        "head_dim": 4,
        "layers": [0, 2],
        "norm_eps": 1e-6,
    },
}
PROMPTS = [np.arange(9), np.arange(5)]
ROWS = 4


CONFIG = replace(parse_config(RAW), lora=LoraConfig(2, 3.0, ("q_proj", "o_proj", "down_proj")))


def load(dtype="float32"):
    config = CONFIG
    return JaxBackend().load(config, random_tensors(config, 0, dtype), device="cpu", dtype=dtype)


def reference(dtype):
    config = CONFIG
    tensors = {n: a.astype(dtype) for n, a in random_tensors(config, 0, "float32").items()}
    return Reference().load(config, tensors, device="cpu", dtype=dtype)


def teacher_forced():
    tokens = np.random.default_rng(0).integers(0, 64, (ROWS, 12))
    positions = np.broadcast_to(np.arange(12), tokens.shape)
    return tokens, np.array([0, 1, 0, 1]), np.ones(tokens.shape, bool), positions


def results(model):
    """Logits, teacher-forced and decoded, and a gradient step, on whatever the model lies."""
    tokens, groups, active, _ = arguments = teacher_forced()
    decoder = model.prefill(PROMPTS, [2, 2], 9)
    decoded = [decoder.logits()]
    for step in range(3):
        decoder.advance(tokens[:, step])
        decoded.append(decoder.logits())
    decoder.admit(PROMPTS[:1], [2], 9)
    ahead = decoder.sample_ahead(Sampling(temperature=0), 3, ())
    decoder.advance(ahead[:, -1])
    decoded.append(decoder.logits())
    batch = Batch(tokens, groups, active, tokens, active)
    names = [name for name, _ in model.tensors()]
    metrics = model.trainer(GRPO(), AdamW(), names).step(batch_with_advantages(batch))
    return [model.logits(*arguments), *decoded, np.array([metrics["loss"], metrics["grad_norm"]])]


def batch_with_advantages(batch):
    return Batch(**{**vars(batch), "advantages": np.array([1.0, -1.0, 0.5, 2.0])})


def on_a_mesh():
    """Runs in a process with eight devices; prints what the test reads."""
    whole, spread = load(), load()
    kinds = (jax.sharding.AxisType.Auto,)
    spread.transformer.shard(jax.make_mesh((8,), ("model",), axis_types=kinds))
    params = spread.transformer.params
    pieces = {
        key: [list(array.shape), list(array.addressable_shards[0].data.shape)]
        for key, array in params.items()
    }
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compiled.append(event) if "backend_compile" in event else None
    )
    decoder = spread.prefill(PROMPTS, [2, 2], 8)
    decoder.advance(np.zeros(4, int))
    first = len(compiled)
    decoder.advance(np.zeros(4, int))
    decoder.advance(np.zeros(4, int))
    later = len(compiled) - first
    cache = decoder.own.k.sharding.shard_shape(decoder.own.k.shape), decoder.own.k.shape
    references = (reference(dtype) for dtype in ("float64", "float32"))
    exact, own, alone, together = map(results, (*references, whole, spread))
    errors = [
        (error(b, a), 2 * allowance(want, near, "float32"))
        for a, b, want, near in zip(alone, together, exact, own, strict=True)
    ]
    print(json.dumps({"pieces": pieces, "errors": errors, "later": later, "cache": cache}))


@pytest.fixture(scope="module")
def mesh():
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", "import test_jax_devices as t; t.on_a_mesh()"],
        cwd=os.path.dirname(__file__),
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_model_on_a_mesh_gives_the_same_numbers(mesh):
    """Each within its allowance of the exact ones (clause 10.2), so two apart."""
    for worst, allowed in mesh["errors"]:
        assert worst <= allowed


def test_heads_and_ffn_are_split_and_whole_heads_stay_together(mesh):
    layer = "model.layers.*."
    columns = [f"self_attn.{p}_proj" for p in "qkv"] + [f"bridge.{p}_proj" for p in "qkv"]
    columns += ["mlp.gate_proj", "mlp.up_proj"]
    split = {f"{layer}{name}.weight": 1 for name in columns}
    split |= {f"{layer}self_attn.{p}_proj.bias": 1 for p in "qkv"}
    split |= {f"{layer}{n}.weight": 2 for n in ("self_attn.o_proj", "mlp.down_proj")}
    split |= {f"{layer}bridge.o_proj.weight": 2}
    split |= {f"{layer}self_attn.q_proj.lora_B.weight": 1}
    split |= {f"{layer}{n}.lora_A.weight": 2 for n in ("self_attn.o_proj", "mlp.down_proj")}
    split |= {"model.embed_tokens.weight": 0, "lm_head.weight": 0}
    for key, (whole, piece) in mesh["pieces"].items():
        want = list(whole)
        if key in split:
            want[split[key]] //= 8
        assert piece == want, key
    piece, whole = mesh["cache"]
    assert np.prod(piece) * 8 == np.prod(whole)


def test_a_mesh_compiles_nothing_from_step_to_step(mesh):
    assert mesh["later"] == 0


def exported(function, *arguments, **keywords):
    """The function lowered for TPUs alone, as text."""
    made = jax.export.export(function.full, platforms=["tpu"])(*arguments, **keywords)
    assert made.platforms == ("tpu",)
    return made.mlir_module()


def for_tpu(dtype):
    """Everything that a model runs, lowered for a TPU."""
    model = load(dtype)
    t, config = model.transformer, model.config
    tokens, groups, active, positions = teacher_forced()
    batch, places, table = t.batch(tokens, groups, active, positions)
    layout = Layout.of(groups)
    blocks = {key: p for key, p in t.params.items() if ".bridge." in key}
    hidden = np.zeros((layout.size, 16, 32), model.transformer.dtype)
    on = np.ones((layout.size, 16), bool)
    decoder = model.prefill(PROMPTS, [2, 2], 6)
    prompt = pieces.Piece(*np.ones((2, 2, 16), np.int32), np.ones((2, 16), bool))
    prompts = pieces.Pieces(prompt, pieces.Piece.none(), Layout.of([0, 1]).grid)
    chosen = leaves.choose(config, [name for name, _ in model.tensors()])
    own = {key: t.params[key] for key, _ in chosen}
    state = adamw.start(own, chosen=chosen, quick=True)
    learn = batch_with_advantages(Batch(tokens, groups, active, tokens, active, positions))
    targets = losses.Targets.of(learn, batch, places, 16)
    yield exported(backend.block_of_layer, blocks, 0, hidden, layout.grid, on, bridge=config.bridge)
    yield exported(transformer.logits, t.params, batch, table, config=config)
    yield exported(steps.read, t.params, prompts, table, config=config)
    R = decoder.layout.size
    settings = Settings.of(Sampling(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1), R)
    draws = steps.Draws(np.zeros((64, R), np.float32), 0, settings, np.zeros(8, np.int32))
    where = steps.Places(decoder.layout.grid, np.ones(R, bool), *np.ones((3, R), np.int32))
    fed = np.zeros(R, np.int32)
    yield exported(steps.step, *decoder._now(), fed, where, config=config)
    yield exported(
        steps.run, *decoder._now(), decoder.next_logits, fed, where, draws, 4, config=config
    )
    halves = (t.params[f"model.layers.*.mlp.down_proj.{x}.weight"] for x in ("lora_A", "lora_B"))
    matrix = t.params["model.layers.*.mlp.down_proj.weight"]
    yield exported(weights.with_update, matrix, *halves, scale=1.5)
    yield exported(steps.of_tokens, decoder.next_logits, fed, 0.7)
    yield exported(sample, decoder.next_logits, draws.table, 0, settings)
    for checkpoint in (False, True):
        yield exported(
            train.value_and_grads,
            state.master,
            t.params,
            batch,
            table,
            targets,
            float(tokens.size),
            config=config,
            chosen=chosen,
            objective=GRPO(),
            checkpoint=checkpoint,
        )
    yield exported(
        adamw.update, state, state.master, own, 0.1, 0.001, 0.01, options=AdamW(), chosen=chosen
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_is_lowered_for_tpus_without_the_host(dtype):
    """No callback, and no product that a TPU would take apart or round: float32 means float32, and
    narrow operands stay narrow and add up in float32, backward too."""
    products = 0
    for text in for_tpu(dtype):
        called = set(re.findall(r"custom_call @(\w+)", text))
        assert not called, called
        assert "callback" not in text and "infeed" not in text and "outfeed" not in text
        for line in re.findall(r"stablehlo\.dot_general.*", text):
            operands, result = line.rsplit("->", 1)
            kinds = re.findall(r"tensor<[^>]*?(bf16|f32|f16)>", operands)
            assert "f32>" in result
            if dtype == "float32":
                assert kinds == ["f32", "f32"] and "[HIGHEST, HIGHEST]" in line
            else:
                assert kinds == ["bf16", "bf16"]
            products += 1
    assert products > 100


def test_devices_are_named_as_users_know_them(monkeypatch):
    class Device:
        def __init__(self, platform):
            self.platform = platform

    cpu = [Device("cpu")]
    for platform, names in (
        ("gpu", ["cuda:0", "cuda:1", "cpu"]),
        ("tpu", ["tpu:0", "tpu:1", "cpu"]),
    ):
        found = [Device(platform), Device(platform)]
        monkeypatch.setattr(
            jax, "local_devices", lambda backend=None, found=found: cpu if backend else found
        )
        assert JaxBackend().devices() == names
    assert JaxBackend().dtypes("tpu:0")[0] == "bfloat16"
    assert JaxBackend().dtypes("cpu")[0] == "float32"
