"""What the JAX backend promises beyond the contract: compilations, costs, and rows that leave."""

import os
import sys
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.compilation_cache import compilation_cache

from bridge.config import parse_config, tensor_shapes
from bridge.contract import GRPO, SFT, AdamW, Batch, Sampling
from bridge.errors import BridgeError
from bridge_conformance import checks_model, checks_train, strategies
from bridge_conformance.cases import ModelCase, TrainCase, random_tensors, rows_of
from bridge_conformance.checks import CASES, CHECKS
from bridge_conformance.trial import Target
from bridge_jax import attention, backend, compiled, leaves, losses, steps, train
from bridge_jax import model as transformer
from bridge_jax.backend import JaxBackend
from bridge_jax.block import Layout
from bridge_jax.compiled import bucket, known_options
from bridge_jax.sampling import Settings, inverse, sample
from bridge_ref.sampling import sample as reference_sample

RAW = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
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
PROMPT = np.arange(10)


@pytest.fixture(autouse=True)
def as_large_models(monkeypatch):
    """Small models too are laid out, and compiled unless a test says so, as large ones are; but
    what is compiled is not kept."""
    monkeypatch.setattr(transformer, "SMALL", 0)
    monkeypatch.setattr(backend, "keep", lambda: None)


def load(dtype="float32", *, in_one=False, **changes):
    """A model laid out as a large one is, and compiled with little effort: what is counted here is
    the same either way. `in_one`: it decodes by one compiled function, as on an accelerator."""
    config = parse_config({**RAW, **changes})
    model = JaxBackend().load(config, random_tensors(config, 0, dtype), device="cpu", dtype=dtype)
    model.transformer.quick, model.transformer.by_layer = True, not in_one
    return model


@pytest.fixture
def compilations():
    """One entry for whatever XLA compiles meanwhile, be it a function or a stray operation; what
    other tests compiled is forgotten."""
    jax.clear_caches()
    durations = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            durations.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield durations
    jax.monitoring.unregister_event_duration_listener(listen)


def flops(function, *arguments, **keywords):
    """Of the whole function, as XLA counts them after its optimisations."""
    lowered = function.full.lower(*arguments, **keywords)
    return lowered.compile(compiler_options=known_options()).cost_analysis()["flops"]


def called(monkeypatch, module, name, run):
    """The arguments of the calls of `module.name` that `run` makes."""
    calls, original = [], getattr(module, name)

    class Spy:
        def __call__(self, *arguments, quick, **keywords):
            calls.append((arguments, keywords))
            return original(*arguments, quick=quick, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, Spy())
        run()
    return calls


def test_a_growing_sequence_another_prompt_and_fewer_rows_compile_nothing(compilations):
    model = load()
    decoder = model.prefill([PROMPT], [8], 60)
    decoder.sample(Sampling(top_k=3, seed=1))
    decoder.advance()
    assert compilations
    compilations.clear()
    for step in range(40):
        decoder.sample(Sampling(temperature=1 + step / 7, top_p=0.5 + step / 100, seed=step))
        decoder.advance()
    decoder.sample(Sampling(temperature=0))
    decoder.advance(np.zeros(8, int), np.arange(8) != 2)
    decoder.advance(np.zeros(7, int), np.arange(7) > 1)
    assert decoder.logits().shape == (5, 40)
    other = load().prefill([np.arange(3)], [8], 60)  # the same config, loaded again
    other.sample(Sampling())
    other.advance()
    assert not compilations
    decoder.advance(np.zeros(5, int), np.arange(5) > 0)  # four fit a smaller bucket
    # What moves there: a cache and its logits, and what is computed there: a layer, the start and
    # the end of a step.
    assert len(compilations) == 5


@pytest.mark.parametrize("layers", [[0, 1], [1]])
def test_depth_is_a_loop_and_not_a_longer_function(layers):
    def lines(depth):
        blocks = [i + n for n in range(0, depth, 2) for i in layers]
        model = load(num_hidden_layers=depth, bridge={**RAW["bridge"], "layers": blocks})
        batch, _, table = model.transformer.batch(*teacher_forced(model.config))
        lowered = transformer.logits.full.lower(
            model.transformer.params, batch, table, config=model.config
        )
        return len(lowered.as_text().splitlines())

    assert lines(2) == lines(12)


def teacher_forced(config, rows=4, timesteps=12, groups=None):
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (rows, timesteps))
    groups = np.repeat(np.arange(rows // 2), 2) if groups is None else groups
    positions = np.broadcast_to(np.arange(timesteps), tokens.shape)
    return tokens, groups, np.ones(tokens.shape, bool), positions


def test_a_prompt_is_read_once_whatever_the_width(monkeypatch):
    model = load(in_one=True)

    def cost(width):
        run = lambda: model.prefill([PROMPT], [width], 4)  # noqa: E731
        [(arguments, keywords)] = called(monkeypatch, steps, "read", run)
        assert arguments[1].shared.tokens.shape == (1, 16) and not arguments[1].alone.tokens.size
        return flops(steps.read, *arguments, **keywords)

    assert cost(1) == cost(16)


def step_cost(monkeypatch, widths):
    """Of a decoding step with so many rows in each group."""
    decoder = load(in_one=True).prefill([PROMPT] * len(widths), widths, 8)
    run = lambda: decoder.advance(np.zeros(sum(widths), int))  # noqa: E731
    [(arguments, keywords)] = called(monkeypatch, steps, "step", run)
    return flops(steps.step, *shapes(arguments), **keywords)


def shapes(arguments):
    """In place of arrays, some of which have been given away."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x, arguments
    )


def block_cost(monkeypatch, widths):
    model = load()
    groups = np.repeat(np.arange(len(widths)), widths)
    stream, on = np.zeros((len(groups), 1, 16), np.float32), np.ones((len(groups), 1), bool)
    run = lambda: model.block(0, stream, groups, on)  # noqa: E731
    [(arguments, keywords)] = called(monkeypatch, backend, "block_of_layer", run)
    return flops(backend.block_of_layer, *arguments, **keywords)


def test_groups_cost_their_number_times_the_square_of_their_width(monkeypatch):
    single = block_cost(monkeypatch, [4])
    double, eight = (block_cost(monkeypatch, [4] * groups) for groups in (2, 8))
    assert double <= 2 * single and eight <= 8 * single
    # What is linear in the rows is the same in both; pairs are 32^2 against 8 * 4^2.
    whole, pairs = block_cost(monkeypatch, [32]), 32**2 - 8 * 4**2
    assert whole - eight > pairs * 2 * 2 * 16  # scores and values of E = 16


def test_ragged_groups_do_not_pad_the_linear_layers(monkeypatch):
    ragged = step_cost(monkeypatch, [8, 1, 1, 1, 1, 1, 1, 1])  # 15 rows, in a grid of 64 cells
    assert ragged < step_cost(monkeypatch, [8] * 8) / 2


def test_rows_that_end_leave_the_computation(monkeypatch):
    decoder = load(in_one=True).prefill([PROMPT, PROMPT[:4]], [16, 16], 8)
    decoder.advance(np.zeros(32, int))
    full = called(monkeypatch, steps, "step", lambda: decoder.advance(np.zeros(32, int)))
    keep = np.isin(np.arange(32), [0, 3, 5])
    fewer = called(monkeypatch, steps, "step", lambda: decoder.advance(np.zeros(32, int), keep))
    costs = [flops(steps.step, *shapes(a), **k) for [(a, k)] in (full, fewer)]
    assert costs[1] < costs[0] / 6
    assert decoder.logits().shape == (3, 40) and decoder.next_logits.shape[0] == 4
    assert decoder.prefix.k.shape[1] == 1 and decoder.own.k.shape[1] == 4
    decoder.advance(np.zeros(3, int), np.zeros(3, bool))
    assert decoder.sample(Sampling()).shape == (0,) and decoder.logits().shape == (0, 40)


@pytest.mark.parametrize("in_one", [True, False])
def test_only_tokens_go_to_the_host_and_caches_stay_where_they_are(monkeypatch, in_one):
    decoder = load(in_one=in_one).prefill([PROMPT], [4], 8)
    decoder.sample(Sampling(top_k=5))
    decoder.advance()
    moved, original = [], jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: moved.append(x.shape) or original(x))
    places = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(decoder.own)]
    with jax.transfer_guard_device_to_host("disallow"):
        for _ in range(4):
            decoder.sample(Sampling(top_k=5))
            decoder.advance()
    assert moved == [(4,)] * 4
    # Updated in place, not copied.
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(decoder.own)] == places


def test_runs_ahead_share_one_function_whatever_their_length_settings_and_ends(compilations):
    decoder = load(in_one=True).prefill([PROMPT], [4], 60)
    decoder.advance(decoder.sample_ahead(Sampling(), 4, ())[:, -1])
    assert compilations
    compilations.clear()
    for ahead, ends in ((2, ()), (7, (40, 41)), (3, (99,))):
        said = decoder.sample_ahead(Sampling(top_k=ahead, seed=ahead), ahead, ends)
        assert said.shape == (4, ahead)
        decoder.advance(said[:, 0], back=np.full(4, ahead - 1))
    assert not compilations
    assert decoder.rows.steps.tolist() == [7] * 4
    assert decoder.sample_ahead(Sampling(), 8, range(40)).shape == (4, 1)  # all have ended


def test_groups_that_come_take_free_places_and_move_nobody(compilations):
    decoder = load().prefill([PROMPT, PROMPT[:7]], [4, 4], 20)
    decoder.sample(Sampling())
    decoder.advance(keep=np.arange(8) > 3)
    decoder.admit([PROMPT[3:]], [4], 20)
    decoder.sample(Sampling())
    decoder.advance(keep=np.arange(8) > 3)
    compilations.clear()
    held = decoder.layout.places.copy()
    decoder.admit([PROMPT[2:]], [3], 20)
    assert not compilations and len(decoder.rows) == 7
    assert (decoder.layout.places[:4] == held).all()


def test_weights_are_in_one_form_at_a_time_and_the_same_in_both():
    model = load(model_type="qwen2", bridge={**RAW["bridge"], "layers": [1]})
    given, weights = random_tensors(model.config, 0, "float32"), model.transformer.weights

    def check(by_layer):
        assert (weights._layers is not None, weights._stacks is not None) == (
            by_layer,
            not by_layer,
        )
        found = dict(model.tensors())
        assert list(found) == list(tensor_shapes(model.config))
        for name, tensor in found.items():
            np.testing.assert_array_equal(tensor, given[name])

    check(by_layer=True)
    model.logits(*teacher_forced(model.config))
    check(by_layer=False)
    model.prefill([PROMPT], [2], 2)
    check(by_layer=True)


def test_what_is_compiled_is_kept_unless_the_user_says_otherwise(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        jax.config.update(names[0], None)
        jax.config.update(names[1], 0)
        compiled.keep()
        where = Path(jax.config.jax_compilation_cache_dir)
        assert where.parent == tmp_path / "bridge"
        jax.jit(lambda x: x * 3 + 1)(np.arange(5.0))
        assert list(where.iterdir())
        jax.config.update(names[0], "theirs")
        compiled.keep()
        assert jax.config.jax_compilation_cache_dir == "theirs"
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_a_gpu_is_not_taken_whole_where_torch_is(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    monkeypatch.setitem(sys.modules, "torch", sys)
    JaxBackend().devices()
    assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "true"  # as the user said
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE")
    JaxBackend().devices()
    assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"


def test_a_decoder_says_when_it_is_misused():
    decoder = load().prefill([PROMPT], [2], 2)
    with pytest.raises(BridgeError, match="call sample first"):
        decoder.advance()
    decoder.advance(np.zeros(2, np.int64))
    with pytest.raises(BridgeError, match="past the max_new_tokens that a row"):
        decoder.advance(np.zeros(2, np.int64))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=20), st.sampled_from([1, 4]))
def test_a_layout_holds_every_row_once(groups, floor):
    layout = Layout.of(groups, floor, floor)
    grid, places, size = layout.grid, layout.places, layout.size
    assert len(set(places.tolist())) == len(groups) and size <= bucket(len(groups), floor**2)
    rows = np.zeros((size, 1), np.float32)
    rows[places, 0] = 1 + np.arange(len(groups))
    cells = np.asarray(grid.spread(jnp.asarray(rows)))
    assert (np.asarray(grid.collect(jnp.asarray(cells)))[places] == rows[places]).all()
    held = [[groups[int(x) - 1] for x in line.ravel() if x] for line in cells]
    assert sorted(g for line in held for g in line) == sorted(groups)
    assert all(len(set(line)) <= 1 for line in held)
    assert ((cells[..., 0] > 0) == grid.filled).all()


@pytest.mark.parametrize("n", range(1, 200))
def test_a_bucket_is_at_most_half_as_large_again(n):
    assert n <= bucket(n) < max(2 * n, 2) and (n < 8 or bucket(n) <= 1.5 * n)
    assert bucket(bucket(n)) == bucket(n)


FULLY = (
    "permuting_rows_permutes_the_block",
    "inactive_cells_have_no_influence",
    "repeating_rows_changes_no_logits",
    "cached_decoding_equals_teacher_forcing",
    "ended_rows_leave_other_groups_unchanged",
    "sampled_tokens_follow_the_rule",
    "groups_that_come_are_answered_as_if_alone",
    "accumulated_batches_are_one_update",
)


def fully():
    """All but what compiles for long: decoding in bfloat16, and training, which a long batch does
    below."""
    for dtype, name in product(("float32", "bfloat16"), FULLY):
        dear = name != FULLY[0] if dtype == "bfloat16" else name == FULLY[-1]
        yield pytest.param(dtype, name, marks=[pytest.mark.slow] if dear else [])


@pytest.mark.parametrize("dtype,name", list(fully()))
def test_what_large_models_run_conforms_too(name, dtype):
    """Full effort of the compiler, buckets from 1 on, layouts that gather: on a few cases."""
    check = CHECKS[name]

    @settings(max_examples=3, report_multiple_bugs=False)
    @given(CASES[check.cases].filter(check.applies))
    def run(case):
        check.run(Target(JaxBackend(), "cpu", dtype, check.clause), case)

    run()


@pytest.mark.parametrize("tied", [True, False])
def test_training_and_decoding_take_turns(tied):
    """The model must see each update, and only that, and so must a decoder already under way."""
    model = load(tie_word_embeddings=tied)
    tokens, groups, active, positions = arguments = teacher_forced(model.config)
    batch = Batch(tokens, groups, active, np.roll(tokens, -1, 1), active)
    names = [name for name, _ in model.tensors()]
    trainer = model.trainer(SFT(), AdamW(lr=0.01), names)
    before = model.logits(*arguments)
    under_way = model.prefill([tokens[0]], [1], 3)
    trainer.step(batch)
    after = model.logits(*arguments)
    assert np.abs(after - before).max() > 1e-3
    fresh = JaxBackend().load(model.config, dict(model.tensors()), device="cpu", dtype="float32")
    fresh.transformer.quick = True  # as the model, or it would be rounded otherwise
    np.testing.assert_array_equal(fresh.logits(*arguments), after)
    decoder = model.prefill([tokens[0]], [1], 1)
    alone = model.logits(tokens[:1], [0], active[:1], positions[:1])
    np.testing.assert_allclose(decoder.logits()[0], alone[0, -1], atol=1e-5)
    under_way.sample(Sampling())
    under_way.advance()
    trainer.step(batch)
    under_way.advance(np.zeros(1, int))
    assert np.isfinite(under_way.logits()).all()


def gradient_of(model, trainable, checkpoint=False):
    """The compiled gradient of some of a model's tensors."""
    tokens, groups, active, positions = teacher_forced(model.config, 8, 64)
    pieces, places, table = model.transformer.batch(tokens, groups, active, positions)
    batch = Batch(tokens, groups, active, tokens, active, positions, np.ones(len(tokens)))
    chosen = leaves.choose(model.config, trainable)
    return train.value_and_grads.full.lower(
        leaves.take_leaves(model.transformer.params, chosen),
        model.transformer.params,
        pieces,
        table,
        losses.Targets.of(batch, pieces, places, 64),
        float(tokens.size),
        config=model.config,
        chosen=chosen,
        objective=GRPO(),
        checkpoint=checkpoint,
    ).compile(compiler_options=known_options())


def test_what_is_frozen_has_no_gradient_computed():
    model = load(intermediate_size=256)
    names = [name for name, _ in model.tensors()]
    few, all_ = ([n for n in names if want in n] for want in (".bridge.", ""))
    cost = [gradient_of(model, which).cost_analysis()["flops"] for which in (few, all_)]
    # Two products a weight for what flows through it, a third for its gradient.
    assert cost[0] < 0.8 * cost[1]


def test_checkpointed_activations_take_less_memory():
    model = load(num_hidden_layers=12, bridge={**RAW["bridge"], "layers": list(range(12))})
    names = [name for name, _ in model.tensors()]
    plain, again = (
        gradient_of(model, names, checkpoint).memory_analysis().temp_size_in_bytes
        for checkpoint in (False, True)
    )
    assert again < plain / 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_long_batch_is_the_same_in_parts(monkeypatch, dtype):
    """Attention of some queries at a time: the numerics rule on 64 timesteps, 16 at a time."""
    monkeypatch.setattr(attention, "QUERIES", 16)
    jax.clear_caches()
    config = {**RAW, "model_type": "mistral", "sliding_window": 21}
    widths, patterns = [2, 1], ["full", "left", "gaps"]
    rows = rows_of(ModelCase(config, 3), widths, 64, patterns, False, 5)
    target = Target(JaxBackend(), "cpu", dtype, "5.4")
    checks_model.logits_are_within_the_numerics_rule(target, rows)
    names = tuple(name for name in tensor_shapes(rows.model.config))
    case = TrainCase(rows, SFT(), names, 7)
    checks_train.loss_and_gradients_are_within_the_numerics_rule(target, case)
    jax.clear_caches()


def test_attention_of_a_long_batch_takes_memory_as_its_length(monkeypatch):
    """And not as its square, from the length on at which it is computed in parts."""

    def memory(timesteps):
        model = load(max_position_embeddings=4096)
        batch, _, table = model.transformer.batch(*teacher_forced(model.config, 2, timesteps))
        lowered = transformer.logits.full.lower(
            model.transformer.params, batch, table, config=model.config
        )
        made = lowered.compile(compiler_options=known_options())
        return made.memory_analysis().temp_size_in_bytes

    # Scores of 256 queries and what is linear in the length double; all scores would be 16 times.
    assert memory(2048) < 2.5 * memory(1024)


@settings(max_examples=40)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.3, 1.0, 5.0]),
    st.sampled_from([None, 1, 7, 10_000]),
    st.sampled_from([None, 0.05, 0.9, 0.9999]),
    st.sampled_from([None, 0.01, 0.5]),
)
def test_draws_from_a_real_vocabulary_follow_the_rule(seed, spread, top_k, top_p, min_p):
    """Large nuclei and ties, among 6016 tokens; one compilation for all settings."""
    rng = np.random.default_rng(seed)
    logits = np.round(rng.normal(size=(4, 6016)) * spread * 8).astype(np.float32) / 8
    uniform = rng.random((1, 4), dtype=np.float32)
    options = Sampling(temperature=0.8, top_k=top_k, top_p=top_p, min_p=min_p)
    got = np.asarray(sample(logits, uniform, 0, Settings.of(options, 4), quick=False))
    filters = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "temperature": 0.8}
    nearby = [reference_sample(logits, uniform[0] + d, **filters) for d in (0, -1e-4, 1e-4)]
    # Sums of 6016 weights differ in their last places: a draw may fall to a neighbour.
    assert all(nearby[1][i] <= got[i] <= nearby[2][i] or got[i] == nearby[0][i] for i in range(4))


def test_a_draw_at_the_very_end_has_weight():
    """The largest uniform, and weights that end long before the vocabulary does."""
    w = np.zeros((2, 1024), np.float32)
    w[0, :300], w[1, 5] = 0.1, 1e-30
    got = np.asarray(inverse(jnp.asarray(w), np.float32([1 - 2**-24, 1 - 2**-24])))
    assert got.tolist() == [299, 5]


@given(strategies.models())
@settings(max_examples=10)
def test_a_missing_or_misshapen_tensor_is_named(case: ModelCase):
    tensors = case.tensors("float32")
    name = sorted(tensors)[case.seed % len(tensors)]
    lacking = {n: a for n, a in tensors.items() if n != name}
    with pytest.raises(BridgeError, match="is missing") as caught:
        JaxBackend().load(case.config, lacking, device="cpu", dtype="float32")
    assert name in str(caught.value)
    wrong = {**tensors, name: tensors[name][:-1]}
    with pytest.raises(BridgeError, match=", need "):
        JaxBackend().load(case.config, wrong, device="cpu", dtype="float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_logits_beyond_a_dtype_are_infinite(dtype):
    config = parse_config({**RAW, "vocab_size": 3, "tie_word_embeddings": False})
    most = float(jnp.finfo(dtype).max) / 2
    rows = jnp.array([[most] * 16, [-most] * 16, [0.25] * 16], dtype)
    params = {"model.norm.weight": jnp.ones(16, dtype), "lm_head.weight": rows}
    h = jnp.ones((1, 16), dtype)
    for head in (transformer.head, jax.jit(transformer.head, static_argnums=2)):
        np.testing.assert_allclose(head(params, h, config), [[np.inf, -np.inf, 4.0]], rtol=1e-5)
