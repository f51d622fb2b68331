"""Rows that were cut off are no targets where `mask_truncated` says so; all else of them counts
(clause 7.13)."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from training_stops import Watch, run, toy_run
from training_toys import Graded

import bridge
from bridge.contract import GRPO
from bridge.errors import BridgeError
from bridge.training import grpo, read_settings
from bridge.training.batches import Group, make_batch, pack
from bridge.training.grpo import group_advantages
from bridge.training.log import read_log
from bridge.training.loop import Run

pytestmark = pytest.mark.usefixtures("one_thread")

P, Q, A, B, C, D, E, F, G, EOS = range(1, 11)
# Clause 2.5: the third row was cut off.
FIGURE = Group([P, Q], [[A, B, C, EOS], [D, EOS], [E, F, G]], np.array([1.0, 0.5, -1.5]))


def test_a_row_that_was_cut_off_has_no_target_and_is_read():
    whole = make_batch([FIGURE])
    batch = make_batch([replace(FIGURE, learnt=np.array([True, True, False]))])
    assert batch.target_mask.tolist() == [[0, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]
    for name in ("tokens", "active", "groups", "advantages"):
        assert np.array_equal(getattr(batch, name), getattr(whole, name))
    both = pack([FIGURE, replace(FIGURE, learnt=np.array([False, True, False]))], 100)
    assert [b.target_mask.any(axis=1).tolist() for b in both] == [[True] * 3 + [False, True, False]]


@pytest.fixture
def settings(toy_model, tmp_path):
    settings = toy_run(toy_model, tmp_path / "run")
    asked = {"steps": 1, "eval_every": 0, "width": 8, "max_new_tokens": 4, "gap_every": 1}
    return replace(settings, mask_truncated=True, **asked)


def heard(settings, monkeypatch, **options):
    """The rollouts of a run's steps, its batches, and its log."""
    rollouts, batches = [], []
    roll_out, update = grpo.roll_out, Run.update

    def rolls(*arguments, **keywords):
        rollouts.extend(found := roll_out(*arguments, **keywords))
        return found

    def updates(self, step, given, lr):
        batches.extend(given)
        return update(self, step, given, lr)

    monkeypatch.setattr(grpo, "roll_out", rolls)
    monkeypatch.setattr(Run, "update", updates)
    run(settings, **options)
    log = read_log(Path(settings.out) / "log.jsonl")
    return rollouts, batches, [record for record in log if record["kind"] == "step"]


def test_a_step_is_that_of_the_rows_that_ended(settings, monkeypatch):
    """Against the reference: the loss and gradient of a batch without the others' targets, with
    advantages of all rewards."""
    rollouts, [batch], [step] = heard(settings, monkeypatch)
    ended = [r.finish_reason != "length" for rollout in rollouts for r in rollout.responses]
    cut = ~np.array(ended)
    assert 2 < cut.sum() < 14 and step["cut_off"] == cut.mean()
    groups = [Group(r.prompt, r.tokens) for r in rollouts]
    rewards = np.concatenate([r.rewards for r in rollouts])
    numbers = np.repeat([0, 1], 8)
    by_hand = make_batch(groups)
    by_hand = replace(
        by_hand,
        advantages=group_advantages(rewards, numbers),
        target_mask=by_hand.target_mask & ~cut[:, None],
    )
    assert rewards[cut].any()  # they move the mean
    exact = bridge.load(settings.checkpoint, backend="numpy", dtype="float64").implementation
    names = [name for name, _ in exact.tensors()]
    metrics, grads = exact.loss_and_grads(by_hand, GRPO(0.2, 0.28), names)
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    assert step["tokens"] == metrics["tokens"] == by_hand.target_mask.sum()
    assert step["loss"] == pytest.approx(metrics["loss"], rel=1e-4)
    assert step["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert sorted(batch.target_mask.tolist()) == sorted(by_hand.target_mask.tolist())
    assert step["rows"] == 16 and step["idle_groups"] == step["dropped_groups"] == 0


def test_the_default_learns_from_all_rows(settings, monkeypatch):
    rollouts, [batch], [step] = heard(replace(settings, mask_truncated=False), monkeypatch)
    assert batch.target_mask.any(axis=1).all() and "idle_groups" not in step
    assert step["tokens"] == sum(len(tokens) for r in rollouts for tokens in r.tokens)


@pytest.mark.parametrize("more", [{}, {"minibatches": 2, "epochs": 2}, {"beta": 0.1}])
def test_a_group_that_was_cut_off_whole_is_left_out(settings, monkeypatch, more):
    """One of two groups ends in no row; where all do, nothing is learnt and a note says why."""
    original = grpo.roll_out

    def first_cut(*arguments, **keywords):
        first, *others = original(*arguments, **keywords)
        cut = [replace(response, finish_reason="length") for response in first.responses]
        return [replace(first, responses=cut), *others]

    monkeypatch.setattr(grpo, "roll_out", first_cut)
    rollouts, batches, [step] = heard(replace(settings, **more), monkeypatch)
    assert all(len(batch.groups) == 8 for batch in batches)
    assert step["dropped_groups"] == step["idle_groups"] == 1 and step["loss"] != 0
    expected = rollouts[1].tokens
    assert batches[0].target_mask.sum() == sum(
        len(tokens)
        for tokens, r in zip(expected, rollouts[1].responses, strict=True)
        if r.finish_reason != "length"
    )


def test_where_every_row_is_cut_off_nothing_is_learnt_and_it_is_said(settings):
    watch = Watch()
    settings = replace(settings, steps=3, max_new_tokens=1, stop=("+",), width=2)

    class Digits(Graded):
        def score(self, problem, response):
            return float(ord(response[0]) if response else 0)

    original = grpo.roll_out

    def cut(*arguments, **keywords):
        rolled = original(*arguments, **keywords)
        return [
            replace(r, responses=[replace(x, finish_reason="length") for x in r.responses])
            for r in rolled
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "roll_out", cut)
        result = run(settings, watch, task=Digits())
    before, after = (
        dict(bridge.load(path, backend="numpy").implementation.tensors())
        for path in (settings.checkpoint, result.final)
    )
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert "every row was cut off at max_new_tokens, and mask_truncated" in watch.notes[-1]


def test_it_is_a_setting_of_grpo():
    given = {"checkpoint": "x", "out": "y", "task": "z", "mask_truncated": True}
    assert read_settings("grpo", given).to_json()["mask_truncated"] is True
    with pytest.raises(BridgeError, match="mask_truncated is no setting of bridge train sft"):
        read_settings("sft", given)
