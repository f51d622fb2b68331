"""What training at real size costs on the MLX backend, beyond what conformance asks: cells that are
computed, memory, and low-rank updates beside packed matrices."""

from dataclasses import replace

import numpy as np
import pytest

from bridge.checkpoints.packing import quantise
from bridge.config import LoraConfig, lora_names, parse_config
from bridge.config.quantization import Quantization
from bridge.contract import GRPO, SFT, AdamW, Batch
from bridge.errors import BridgeError
from bridge_conformance.cases import random_tensors

mx = pytest.importorskip("mlx.core")

from bridge_mlx import attention  # noqa: E402
from bridge_mlx.backend import MlxBackend, to_numpy  # noqa: E402
from bridge_mlx.linear import Quantised  # noqa: E402
from bridge_mlx.model import Head  # noqa: E402
from bridge_mlx.train import choose, loss_and_grads  # noqa: E402

RAW = {
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
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
ROUNDING = 256 * float(np.finfo(np.float32).eps)


class Held(dict):
    """Tensors, of which some are packed."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.packings = {}

    def packed(self, name):
        return self.packings.get(name)


def load(lora=None, packed=False, **changes):
    """A model, its low-rank updates random; with `packed` its matrices are integers. And the same
    numbers as floats."""
    config = replace(parse_config({**RAW, **changes}), lora=lora)
    tensors = Held(random_tensors(config, 0, "float32"))
    if packed:
        tensors.packings = {
            name: quantise(array, Quantization(4, 32))
            for name, array in tensors.items()
            if name.endswith("_proj.weight") and ".bridge." not in name
        }
        for name, integers in tensors.packings.items():
            tensors[name] = integers.dequantise()
    loaded = MlxBackend().load(config, tensors, device="cpu", dtype="float32")
    return loaded, dict(tensors)


def prompt_and_rows(widths=(4, 4), prompt=12, own=5, vocabulary=48):
    """Groups whose rows begin with one prompt; every token after it is a target."""
    rng, rows = np.random.default_rng(0), sum(widths)
    groups = np.repeat(np.arange(len(widths)), widths)
    prompts = rng.integers(0, vocabulary, (len(widths), prompt))[groups]
    said = rng.integers(0, vocabulary, (rows, own))
    said[:, 0] = np.arange(rows)  # no two rows of a group go on alike
    tokens = np.concatenate([prompts, said], axis=1)
    mask = np.zeros(tokens.shape, bool)
    mask[:, prompt - 1 : -1] = True
    active = np.ones(tokens.shape, bool)
    advantages = rng.normal(size=rows)
    return Batch(tokens, groups, active, np.roll(tokens, -1, 1), mask, advantages=advantages)


def arguments(batch):
    """As `logits` takes them."""
    S = batch.tokens.shape[1]
    return (
        batch.tokens,
        batch.groups,
        batch.active,
        np.broadcast_to(np.arange(S), (1, S)).repeat(len(batch.tokens), 0),
    )


@pytest.mark.parametrize("widths", [(4, 4), (1, 3), (8,)])
def test_a_prompt_is_computed_once_a_group(widths):
    loaded, _ = load()
    batch = prompt_and_rows(widths)
    cells = loaded.transformer.cells(*arguments(batch))
    alone = sum(width for width in widths if width > 1)
    if min(widths) > 1:
        assert len(cells.ids) == 12 * len(widths) + 5 * alone
    assert cells.masks[-1][None] is None or min(widths) == 1  # no mask where all prompts are alike
    assert loaded.transformer.forward(cells).shape == (len(cells.ids), 32)


@pytest.mark.parametrize("objective", [SFT(), GRPO(temperature=0.7)])
@pytest.mark.parametrize("tied", [True, False])
def test_parts_of_any_size_add_up_to_the_whole(monkeypatch, objective, tied):
    loaded, tensors = load(tie_word_embeddings=tied)
    batch, seen = prompt_and_rows(), []
    call = Head.__call__
    monkeypatch.setattr(Head, "__call__", lambda head, h: seen.append(len(h)) or call(head, h))

    def by(chunk):
        seen.clear()
        leaves = choose(loaded.transformer, list(tensors))
        return loss_and_grads(loaded.transformer, leaves, batch, objective, loss_chunk=chunk)

    (whole, want), counts = by(1000), list(seen)
    (parts, got), most = by(7), max(seen)
    assert counts == [40] and most == 7 and sum(seen) == 40  # 8 rows with 5 targets each
    assert parts == pytest.approx(whole, rel=ROUNDING)
    for name, grad in want.items():
        allowed = ROUNDING * float(mx.abs(grad).max()) + 1e-9
        np.testing.assert_allclose(to_numpy(got[name]), to_numpy(grad), atol=allowed, rtol=0)


@pytest.mark.parametrize("trained", ["blocks", "all"])
def test_memory_does_not_follow_the_number_of_targets(trained):
    """256 targets of a vocabulary of 20,000 would be 20 MB of logits, several times over."""
    loaded, tensors = load(vocab_size=20_000)
    names = [name for name in tensors if trained == "all" or ".bridge." in name]
    batch = prompt_and_rows((8,), prompt=4, own=32, vocabulary=20_000)

    def peak(chunk):
        trainer = loaded.trainer(GRPO(), AdamW(), names, loss_chunk=chunk)
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        trainer.step(batch)
        return mx.get_peak_memory() - before

    logits = 256 * 20_000 * 4
    assert peak(256) > 2 * logits > 2 * peak(8)


def test_scores_of_some_timesteps_at_a_time_give_the_same_numbers(monkeypatch):
    """Forward and backward, with and without masks."""
    loaded, tensors = load()
    plain = prompt_and_rows()
    active = np.array(plain.active)
    active[1, 14] = active[5, 16] = False
    holes = replace(plain, active=active, target_mask=plain.target_mask & active)
    for batch in (plain, holes):
        monkeypatch.setattr(attention, "SCORES", 2**24)
        whole = loaded.loss_and_grads(batch, SFT(), list(tensors))
        monkeypatch.setattr(attention, "SCORES", 8 * 4 * 17 * 2)  # two timesteps of the rows
        some = loaded.loss_and_grads(batch, SFT(), list(tensors))
        assert some[0] == pytest.approx(whole[0], rel=ROUNDING)
        for name, want in whole[1].items():
            allowed = ROUNDING * np.abs(want).max() + 1e-9
            np.testing.assert_allclose(some[1][name], want, atol=allowed, rtol=0, err_msg=name)


LORA = LoraConfig(4, 8.0, ("q_proj", "v_proj", "down_proj"))


@pytest.mark.parametrize("packed", [False, True])
def test_updates_are_the_matrices_with_them(packed):
    """Logits, decoding and gradients, against a model whose matrices have the updates in them."""
    loaded, tensors = load(LORA, packed)
    whole = {name: array for name, array in tensors.items() if ".lora_" not in name}
    pairs = [name for name in lora_names(loaded.config) if ".lora_A." in name]
    for name in pairs:
        module = name.removesuffix(".lora_A.weight")
        added = tensors[f"{module}.lora_B.weight"].astype(np.float64) @ tensors[name]
        whole[f"{module}.weight"] = (tensors[f"{module}.weight"] + 2.0 * added).astype(np.float32)
    config = replace(loaded.config, lora=None)
    want = MlxBackend().load(config, whole, device="cpu", dtype="float32")
    batch = prompt_and_rows()
    exact = want.logits(*arguments(batch))
    allowed = 4 * ROUNDING * np.abs(exact).max()
    np.testing.assert_allclose(loaded.logits(*arguments(batch)), exact, atol=allowed, rtol=0)
    decoders = [model.prefill([batch.tokens[0]], [2], 3) for model in (loaded, want)]
    for decoder in decoders:
        decoder.advance(np.array([3, 4]))
    np.testing.assert_allclose(decoders[0].logits(), decoders[1].logits(), atol=allowed, rtol=0)
    kinds = {type(w) for layer in decoders[0].model.layers for w in layer.qkv.weights}
    assert kinds == ({Quantised} if packed else {mx.array})
    _, grads = loaded.loss_and_grads(batch, SFT(), lora_names(loaded.config))
    modules = [name.removesuffix(".lora_A.weight") for name in pairs]
    _, of_whole = want.loss_and_grads(batch, SFT(), [f"{module}.weight" for module in modules])
    for module in modules:
        dW, A, B = (
            x.astype(np.float64)
            for x in (
                of_whole[f"{module}.weight"],
                tensors[f"{module}.lora_A.weight"],
                tensors[f"{module}.lora_B.weight"],
            )
        )
        for which, exact in (("A", 2.0 * B.T @ dW), ("B", 2.0 * dW @ A.T)):
            got = grads[f"{module}.lora_{which}.weight"]
            np.testing.assert_allclose(got, exact, atol=1e-3 * np.abs(exact).max(), rtol=0)


def test_a_decoders_matrices_live_as_long_as_it_does():
    loaded, _ = load(LORA)
    transformer = loaded.transformer
    first, second = (loaded.prefill([np.arange(3)], [1], 2) for _ in range(2))
    assert first.model is second.model is not transformer
    trainer = loaded.trainer(SFT(), AdamW(lr=0.1), lora_names(loaded.config))
    trainer.step(prompt_and_rows())
    learnt = loaded.prefill([np.arange(3)], [1], 2)
    assert learnt.model is not first.model
    assert np.abs(learnt.logits() - first.logits()).max() > 1e-4
    del first, second, learnt
    assert transformer._merged() is None


def test_a_packed_matrix_is_not_swapped_and_all_else_is():
    loaded, tensors = load(LORA, packed=True)
    name, matrix = lora_names(loaded.config)[0], "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(BridgeError, match=f"swap: {matrix} is quantised"):
        loaded.swap({name: tensors[name] * 2, matrix: tensors[matrix]})
    assert dict(loaded.tensors())[name].tobytes() == tensors[name].tobytes()
    there = loaded.swap({name: tensors[name] * 2})
    assert there[name].tobytes() == tensors[name].tobytes()
    assert dict(loaded.tensors())[name].tobytes() == (tensors[name] * 2).tobytes()
