"""The worst cases of conformance: that they are as bad as they say, and what they then show.

What each fault of theirs needs is asserted here, so that no change of a seed or a size makes a case
harmless.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.config import tensor_shapes
from bridge.contract import GRPO, Sampling
from bridge.decoding.inputs import default_positions
from bridge_conformance import checks_trainable, strategies, worst
from bridge_conformance.cases_ends import EndsCase
from bridge_conformance.cases_life import Doing
from bridge_conformance.checks_ahead import Saying, may_draw
from bridge_conformance.checks_coming import drive, samplings
from bridge_conformance.checks_decode import acceptable_tokens
from bridge_conformance.checks_ends import HALVES, above, below
from bridge_conformance.checks_long import cells_by_step
from bridge_conformance.trial import Target, Trial
from bridge_ref.backend import Reference
from bridge_ref.sampling import sampling_weights

WINDOWS, LONG, PROMPT = worst.LONG


def ends(case):
    """The step with which each row ends, by prompt."""
    return [case.alive.sum(axis=0)[case.row_prompt == p] for p in range(len(case.widths))]


def test_windows_meet_rows_and_prompts_that_leave_in_turn():
    windows = WINDOWS.model.config.sliding_windows
    assert windows and None in windows
    window = min(w for w in windows if w is not None)
    first, wide, other, last = ends(WINDOWS)
    # The longest prompt is the first to leave, and its window is past before the others' are.
    assert WINDOWS.lengths[0] == max(WINDOWS.lengths) > window + max(WINDOWS.lengths[1:])
    assert first.max() < min(wide.min(), other.min(), last.min())
    # A wide prompt loses rows one by one, another leaves whole, and rows are left to the end.
    assert len(wide) > 4 and len(set(wide)) >= 5 and np.sort(wide)[1] < other.max() < wide.max()
    assert max(wide.max(), last.max()) == WINDOWS.steps > 2 * window
    assert min(WINDOWS.lengths) < window < WINDOWS.steps


def test_a_long_decode_passes_every_table():
    assert LONG.steps > 300 and LONG.alive[-1].any()
    leave = np.flatnonzero(np.diff(LONG.alive.sum(axis=1))) + 1
    spans = np.diff(np.array([0, *leave, LONG.steps]))
    assert len(leave) >= 2 and (spans > 64).any()  # tables of draws are made anew as rows leave
    assert max(LONG.lengths) + LONG.steps > 256 + 50
    assert (np.concatenate(ends(LONG)) > 256).sum() >= 2


def test_a_long_prompt_has_short_ones_beside_it():
    assert max(PROMPT.lengths) > 384 and min(PROMPT.lengths) < 4  # past one and a half of 256
    assert PROMPT.alive.sum(axis=0).min() >= 3


def test_groups_come_out_of_step_and_to_nobody_and_go_back_to_an_end():
    (case,) = worst.COMING
    text, trial = case.text, Trial(Target(Reference(), "cpu", "float64"), case.model)
    seen = drive(trial, case)
    assert sum(len(set(timestep.steps)) > 1 for timestep in seen) >= 4  # rows out of step
    assert max(len(timestep.rows) for timestep in seen) >= 6
    # The last wave comes when no other row is left; those before it, to rows under way.
    first, second, third, last = (
        next(n for n, timestep in enumerate(seen) if w in case.wave_of[timestep.rows])
        for w in range(4)
    )
    assert set(case.wave_of[seen[last].rows]) == {3} and case.waves[3].after > len(seen)
    assert len(set(case.wave_of[seen[third].rows])) > 1 < len(set(case.wave_of[seen[second].rows]))
    # What comes is longer and wider than what is there, and then shorter.
    assert first < second < third and text.lengths[2] > max(text.lengths[:2])
    assert text.lengths[3] < min(text.lengths[:2]) and text.widths[2] > max(text.widths[:2])
    assert text.widths[0] > 1  # rows of a group that could go back by two numbers
    assert max(case.limits) > min(case.limits)
    assert len(set(samplings(case))) > 6
    ahead, back = (Saying(trial, case, back=back) for back in (False, True))
    ahead.judge()
    back.judge()
    # Rows end within a table while others of their group go on, and go on themselves.
    assert ahead.left_alone and back.left_alone and back.revived >= 3


def test_draws_may_go_either_way_where_logits_may():
    logits, plain = np.log(np.array([[0.2, 0.3, 0.5]], np.float32)), Sampling()

    def those(u, allowed, sampling=plain):
        uniform = np.array([u], np.float32)
        return [t for t in range(3) if may_draw(t, logits, uniform, sampling, allowed)]

    assert those(0.1, 0.0) == [0] and those(0.35, 0.01) == [1] and those(0.9, 0.1) == [2]
    assert those(0.198, 0.02) == [0, 1] and those(0.502, 0.02) == [1, 2]
    assert those(0.9, 0.2, Sampling(temperature=0.0)) == [2]
    assert those(0.9, 0.3, Sampling(temperature=0.0)) == [1, 2]
    assert those(0.1, 0.1, Sampling(top_k=1)) == [2] and those(0.1, 0.3, Sampling(top_k=1)) == [
        1,
        2,
    ]


def test_a_life_has_all_that_can_be_done():
    (life,) = worst.LIFE
    doing, both, after = Doing(), False, False
    prefilled, updated = [], False
    for do in life.program:
        assert doing.may(do)
        doing.note(do)
        both = both or (do.what == "advance" and len(doing.decoders) == 2)
        updated = updated or do.what == "step"
        after = after or (do.what == "prefill" and updated and do.detail in prefilled)
        prefilled += [do.detail] if do.what == "prefill" else []
    assert both and after
    did = [do.what for do in life.program]
    assert set(did) == {"prefill", "advance", "step", "restore", "read", "score", "save", "export"}
    assert did.count("restore") >= 3 and did.count("step") >= 5 and did[-2:] == ["export", "read"]
    # A rate is given before the optimizer's own is asked for.
    assert [do.number for do in life.program if do.what == "step"][:2] == [0, 1]


def test_some_tensors_of_every_sort_are_trained():
    deep, _ = worst.TRAINABLE
    config, chosen = deep.rows.model.config, set(deep.trainable)
    names = set(tensor_shapes(config))
    assert config.bridge is not None and isinstance(deep.objective, GRPO)
    assert config.tie_word_embeddings and "model.embed_tokens.weight" in chosen < names
    blocks = config.bridge.layers
    assert 1 < len(blocks) < config.num_hidden_layers  # a layer's number is not its block's

    def of(layer, part):
        return f"model.layers.{layer}.{part}" in chosen

    for stack in (["q", "k", "v"], ["gate", "up"]):  # of what may be one matrix, a part
        part = "mlp" if "up" in stack else "self_attn"
        some = [of(0, f"{part}.{one}_proj.weight") for one in stack]
        assert any(some) and not all(some)
    assert of(2, "self_attn.v_proj.bias") and not of(2, "self_attn.v_proj.weight")
    assert of(2, "mlp.down_proj.weight") and not of(
        0, "mlp.down_proj.weight"
    )  # not a stack's first
    assert of(2, "bridge.o_proj.weight") and not of(0, "bridge.o_proj.weight")
    assert any(of(1, f"{norm}.weight") for norm in ("input_layernorm", "self_attn.k_norm"))
    batch = deep.batch(np.zeros((*deep.rows.tokens.shape, config.vocab_size)))
    assert batch.ref_logprobs is not None and not deep.objective.beta
    assert checks_trainable.is_short(deep)


def test_a_common_token_has_more_cells_than_a_narrow_sum_can_hold():
    _, long = worst.TRAINABLE
    assert checks_trainable.is_long(long) and long.trainable == ("model.embed_tokens.weight",)
    assert not long.rows.model.config.tie_word_embeddings  # all that it learns is of its cells
    cells = long.rows.tokens[long.rows.active]
    assert np.bincount(cells).max() > 1024 > 512 > len(cells) - np.bincount(cells).max()


@given(strategies.long_cases())
def test_long_cases_have_prompts_and_rows_that_leave(case):
    assert strategies.leaves_in_turn(case)
    gone, *others = ends(case)
    assert gone.max() < case.steps == max(rows.max() for rows in others)
    cells = cells_by_step(case)
    assert cells[0].start == 0 and cells[-1].stop == case.alive.sum()


@given(st.data())
def test_programs_are_such_as_can_be_done(data):
    program = []
    doing = Doing()
    machine = strategies.Lives()
    machine.born(data)
    for _ in range(data.draw(st.integers(0, 12))):
        rule = data.draw(st.sampled_from(["prefill", "step", "look", "advance", "restore"]))
        if rule == "prefill":
            machine.prefill(data.draw(st.integers(0, 1)), data.draw(st.integers(0, 2)))
        elif rule == "step":
            machine.step(data.draw(st.integers(0, 1)))
        elif rule == "look":
            machine.look(data.draw(st.sampled_from(("read", "score", "save", "export"))))
        elif rule == "restore" and machine.doing.saved:
            machine.restore(data)
        elif rule == "advance" and any(d.more and d.left for d in machine.doing.decoders.values()):
            machine.advance(data)
        program = machine.program
    for do in program:
        assert doing.may(do)
        doing.note(do)


@pytest.mark.parametrize("dtype", ("float64", "float32", "bfloat16", "float16"))
def test_ends_have_the_weights_that_they_say(dtype):
    case = EndsCase(16, 3)
    model = Reference().load(case.config, case.tensors(dtype), device="cpu", dtype=dtype)
    tokens = np.arange(4)[:, None]
    active = np.ones((4, 1), bool)
    logits = model.logits(tokens, np.arange(4), active, default_positions(active))[:, 0]
    logits -= logits.max(-1, keepdims=True)
    assert np.array_equal(logits.astype(np.float32), case.levels)
    sums = sampling_weights(logits[:1], temperature=HALVES)[0]
    assert sorted(sums[sums > 0]) == [0.25, 0.25, 0.5, 1.0]
    for top_p, kept in ((0.5, 1), (above(0.5), 2), (below(0.75), 2), (0.75, 2), (above(0.75), 4)):
        weights = sampling_weights(logits[:1], temperature=HALVES, top_p=top_p)
        assert (weights > 0).sum() == kept, top_p
    near = sampling_weights(logits[1:2], temperature=1e-6)[0]
    assert (near == 1).sum() == 2 and (near > 0).sum() == 2  # though the others are near
    assert (sampling_weights(logits[1:2], temperature=1e-3)[0] > 0.3).sum() > 3


def test_a_filter_that_meets_a_sum_may_be_a_rounding_off_unless_all_is_exact():
    logits = np.log(np.array([[0.5, 0.25, 0.25]]))
    sampling = Sampling(top_p=0.5)
    u = np.array([0.9], np.float32)
    assert acceptable_tokens(logits, u, sampling, filters=False).max() == 0
    assert set(acceptable_tokens(logits, u, sampling).ravel()) == {0, 2}


def test_the_likeliest_token_stays_whatever_rounding_does():
    logits, u = np.array([[0.0, -1.0, -2.0]]), np.array([0.99], np.float32)
    for sampling in (Sampling(top_p=1e-30), Sampling(min_p=1.0)):
        assert set(acceptable_tokens(logits, u, sampling).ravel()) == {0}
