"""What the JAX backend promises of training: what is computed once, what is never there, and what
compiles (clauses 7.14 to 7.16)."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from test_jax import RAW

from bridge.config import LoraConfig, lora_names, parse_config, tensor_shapes
from bridge.contract import GRPO, SFT, AdamW, Batch
from bridge_conformance.cases import random_tensors
from bridge_conformance.tolerance import allowance, error
from bridge_jax import attention, leaves, losses, train
from bridge_jax import model as transformer
from bridge_jax.backend import JaxBackend
from bridge_jax.compiled import fine, known_options
from bridge_ref.backend import Reference

WINDOW = {**RAW, "model_type": "mistral", "sliding_window": 21}


@pytest.fixture(autouse=True)
def as_large_models(monkeypatch):
    """Small models are laid out as large ones are."""
    monkeypatch.setattr(transformer, "SMALL", 0)


def load(raw=RAW, lora=None, dtype="float32", by_layer=True):
    config = replace(parse_config(raw), lora=lora)
    model = JaxBackend().load(config, random_tensors(config, 0, dtype), device="cpu", dtype=dtype)
    model.transformer.quick, model.transformer.by_layer = True, by_layer
    return model


def grouped(widths, prompt, response, seed=0, vocab=40):
    """Rows that share their group's prompt, of ragged responses, one with a hole; all learn from
    what follows the prompt."""
    rng, B, S = np.random.default_rng(seed), sum(widths), prompt + response
    groups = np.repeat(np.arange(len(widths)), widths)
    tokens = rng.integers(0, vocab, (B, S))
    prompts = rng.integers(0, vocab, (len(widths), prompt))
    tokens[:, :prompt] = prompts[groups]
    lengths = prompt + rng.integers(1, response + 1, B)
    lengths[0] = S
    active = np.arange(S) < lengths[:, None]
    active[groups == groups[0], 2] = False  # a hole that the rows of a group share
    mask = active & (np.arange(S) >= prompt - 1)
    targets = rng.integers(0, vocab, (B, S))
    old = np.log(rng.random((B, S)))
    given = rng.permutation(B)  # in any order
    return Batch(
        tokens[given],
        groups[given],
        active[given],
        targets[given],
        mask[given],
        None,
        rng.normal(size=B),
        old,
        old - 0.1,
    )


def lowered(model, batch, trainable, objective=None, chunk=64, checkpoint=False):
    """The compiled gradient of some of a model's tensors."""
    pieces, table, targets = train._planned(model.transformer, batch, chunk)
    chosen = leaves.choose(model.config, trainable)
    return train.value_and_grads.full.lower(
        leaves.take_leaves(model.transformer.params, chosen),
        model.transformer.params,
        pieces,
        table,
        targets,
        1.0,
        config=model.config,
        chosen=chosen,
        objective=objective or GRPO(),
        checkpoint=checkpoint,
    ).compile(compiler_options=known_options())


def test_a_fine_size_is_at_most_a_quarter_larger():
    for n in range(2000):
        assert n <= fine(n) <= 1.25 * n and fine(fine(n)) == fine(n)


@pytest.mark.parametrize("queries", [64, 2048])
def test_gradients_of_ragged_groups_are_those_of_all_rows_one_by_one(monkeypatch, queries):
    """Long enough that windows end within the prompt, and that attention goes in parts."""
    monkeypatch.setattr(attention, "QUERIES", queries)
    jax.clear_caches()
    batch = grouped([3, 1, 2], 30, 17)
    config, objective = parse_config(WINDOW), GRPO(beta=0.1, temperature=0.8)
    names = list(tensor_shapes(config))
    found = load(WINDOW).loss_and_grads(batch, objective, names)
    references = []
    for dtype in ("float64", "float32"):
        given = {n: a.astype(dtype) for n, a in random_tensors(config, 0, "float32").items()}
        model = Reference().load(config, given, device="cpu", dtype=dtype)
        references.append(model.loss_and_grads(batch, objective, names))
    for key, value in references[0][0].items():
        assert found[0][key] == pytest.approx(value, rel=1e-4), key
    got, exact, own = (
        np.concatenate([np.ravel(grads[name]) for name in names])
        for _, grads in (found, *references)
    )
    assert error(got, exact) <= allowance(exact, own, "float32")
    jax.clear_caches()


def test_a_shared_prompt_costs_what_one_row_would():
    model = load()
    names = list(tensor_shapes(model.config))
    one, eight, apart = (
        lowered(model, batch, names).cost_analysis()["flops"]
        for batch in (
            grouped([1], 64, 16),
            grouped([8], 64, 16),
            replace(grouped([8], 64, 16), tokens=np.arange(8 * 80).reshape(8, 80) % 37),
        )
    )
    # 80 cells, 64 + 8 * 16 of them, and 8 * 80.
    assert eight < 0.4 * apart and one < eight < 4 * one


def test_logits_are_never_all_there():
    """Neither is anything as large: twice the targets need no more than what is linear in them."""
    model = load({**RAW, "vocab_size": 20_000})
    names = [name for name in tensor_shapes(model.config) if ".bridge." in name]
    few, many = (
        lowered(model, grouped([8], 16, response), names).memory_analysis().temp_size_in_bytes
        for response in (32, 128)
    )
    part = 64 * 20_000 * 4
    assert many < few + part  # all logits would be 16 times a part, in three arrays
    assert few < 6 * part


def test_parts_of_a_loss_share_a_function_whatever_their_number(monkeypatch):
    """Lengths and numbers of targets that fall into one bucket compile once."""
    model, sizes = load(), set()
    original = train.value_and_grads

    class Spy:
        def __call__(self, *arguments, quick, **keywords):
            shapes = jax.tree.map(np.shape, arguments)
            sizes.add(str(shapes))
            return original(*arguments, quick=quick, **keywords)

    monkeypatch.setattr(train, "value_and_grads", Spy())
    trainer = model.trainer(SFT(), AdamW(), ["model.norm.weight"], loss_chunk=16)
    for seed, (prompt, response) in enumerate([(33, 17), (36, 19), (40, 20), (37, 18)]):
        trainer.step(grouped([4, 4], prompt, response, seed))
    assert len(sizes) == 1


def test_blocks_alone_compute_no_gradient_of_the_host():
    """Its products forward, those back through it, and no third one for a frozen matrix."""
    model = load({**RAW, "intermediate_size": 1024, "tie_word_embeddings": False})
    names = list(tensor_shapes(model.config))
    blocks = [name for name in names if ".bridge." in name]
    batch = grouped([4], 16, 48)
    few, most, whole = (
        lowered(model, batch, which).cost_analysis()["flops"]
        for which in (blocks, [n for n in names if ".mlp." not in n], names)
    )
    # The FFN is nearly all of it, so what its matrices' gradients cost is a third.
    assert few < 0.75 * whole and most < 0.75 * whole


LORA = LoraConfig(2, 3.0, ("q_proj", "o_proj", "down_proj"))


@pytest.mark.parametrize("by_layer", [True, False])
def test_decoders_see_each_update_of_low_rank(by_layer):
    """Merged matrices must not be those of before an update, nor be given back or trained."""
    model = load({**RAW, "model_type": "qwen2"}, LORA, by_layer=by_layer)
    host = {
        n: a for n, a in random_tensors(model.config, 0, "float32").items() if ".lora_" not in n
    }
    trainer = model.trainer(SFT(), AdamW(lr=0.05), lora_names(model.config))
    prompt, before = np.arange(5), None
    for _ in range(2):
        trainer.step(grouped([2], 5, 4))
        decoder = model.prefill([prompt], [1], 3)
        on = np.ones((1, 5), bool)
        alone = model.logits(prompt[None], np.zeros(1, int), on, np.arange(5)[None])[0, -1]
        np.testing.assert_allclose(decoder.logits()[0], alone, atol=1e-4)
        assert before is None or np.abs(alone - before).max() > 1e-3
        before = alone
        lp = decoder.logprobs(np.array([7]), 0.5)
        want = alone[7] / 0.5 - np.log(np.exp(alone / 0.5).sum())
        np.testing.assert_allclose(lp, [want], atol=1e-3)
    tensors = dict(model.tensors())
    assert list(tensors) == list(tensor_shapes(model.config))
    for name, array in host.items():
        np.testing.assert_array_equal(tensors[name], array)


def test_frozen_matrices_under_low_rank_updates_have_no_gradient_computed():
    model = load({**RAW, "intermediate_size": 1024}, LoraConfig(1, 1.0))
    batch, names = grouped([4], 16, 48), list(tensor_shapes(model.config))
    few, whole = (
        lowered(model, batch, which).cost_analysis()["flops"]
        for which in (lora_names(model.config), names)
    )
    assert few < 0.8 * whole


def test_room_for_targets_follows_from_the_pieces():
    model, batch = load(), grouped([4], 20, 9)
    everywhere = replace(batch, target_mask=batch.active)
    shapes = []
    for given in (batch, everywhere):
        pieces, _, targets = train._planned(model.transformer, given, 16)
        assert isinstance(targets, losses.Targets)
        assert int(targets.parts) == -(-int(given.target_mask.sum()) // 16)
        shapes.append(np.shape(targets.cells))
    assert pieces.shared.tokens.shape == (1, 20) and pieces.alone.tokens.shape == (4, 16)
    assert shapes == [(5, 16), (9, 16)]  # 4 * (16 + 1), and 4 * (20 + 16)
