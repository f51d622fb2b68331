"""Runs that go wrong without an error: a loss that explodes, and rewards that teach nothing."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from training_toys import Graded, InProcess, Sums

import bridge
from bridge.contract import SFT, Batch
from bridge.errors import BridgeError
from bridge.training import GRPOSettings, SFTSettings, train
from bridge.training.health import Health
from bridge.training.watch import Silent

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def sft(toy_model, tmp_path):
    common = {"checkpoint": str(toy_model), "out": str(tmp_path / "run"), "backend": "torch"}
    given = {"task": "sums", "problems": 40, "samples": 16, "max_new_tokens": 2, "groups": 8}
    return SFTSettings(**common, **given, lr=1.0, warmup=0, trainable=("all",))


@pytest.fixture
def grpo(toy_model, tmp_path):
    common = {"checkpoint": str(toy_model), "out": str(tmp_path / "run"), "backend": "torch"}
    given = {"task": "sums", "problems": 2, "width": 2, "max_new_tokens": 2, "eval_every": 0}
    return GRPOSettings(**common, **given, steps=5)


class Notes(Silent):
    """Keeps the notes; `end`: the step after whose record it ends the run, with nothing saved."""

    def __init__(self, end=None):
        self.notes, self.end = [], end

    def note(self, text):
        self.notes.append(text)

    def record(self, record):
        if record["step"] == self.end:
            raise KeyboardInterrupt


def run(settings, task=None, watch=None):
    task = task or Sums(first=True)
    return train(settings, task=task, scorer=InProcess(task), watch=watch)


def test_a_loss_that_explodes_stops_and_can_be_computed_again(sft):
    """The command that the message names gets the weights before the step, and they and the batch
    that was kept give the loss that it was stopped for."""
    with pytest.raises(BridgeError, match=r"step 3: loss .* is above .*, and was 2\.554;") as error:
        run(sft)
    said = str(error.value)
    assert "the same command with save_every 1" in said and "raise stop_loss" in said
    with pytest.raises(BridgeError, match=re.escape(said.partition(";")[0])) as second:
        run(replace(sft, save_every=1))
    assert "may start from it" in str(second.value) and "may start" not in said
    out = Path(sft.out)
    before = bridge.load(out / "checkpoints" / "step-000002", backend="torch")
    with np.load(out / "failed" / "step-000003.npz") as kept:
        batch = Batch(**{name.partition(".")[2]: kept[name] for name in kept.files})
    names = [name for name, _ in before.implementation.tensors()]
    again, _ = before.implementation.loss_and_grads(batch, SFT(), names)
    assert f"loss {again['loss']:.4g} is above" in said


def test_a_larger_bound_goes_on_with_the_run(sft):
    with pytest.raises(BridgeError, match="step 3: loss"):
        run(replace(sft, save_every=2))
    assert run(replace(sft, save_every=2, stop_loss=1e6)).resumed_from == 2


def steps(*losses, **more):
    return [{"kind": "step", "loss": loss, **more} for loss in losses]


def sft_trouble(settings, losses, loss, vocab_size=13):
    found = Health(settings, vocab_size, steps(*losses)).trouble({"loss": loss}, [])
    return found and found[1]


def test_the_bound_of_sft_is_on_what_the_loss_was(sft):
    uniform = math.log(13)
    assert sft_trouble(sft, [], 1e9) is None  # nothing is known of it yet
    assert sft_trouble(sft, [0.01], uniform - 0.01) is None  # better than guessing at random
    assert sft_trouble(sft, [0.01], uniform + 0.01) == "stop_loss"
    assert sft_trouble(sft, [2.0, 2.0, 2.0], 7.9) is None
    assert sft_trouble(sft, [2.0, 2.0, 2.0], 8.1) == "stop_loss"
    assert sft_trouble(sft, [2.0, 2.0, 2.0, 0.5], 7.9) is None  # one easy batch is not a level
    slow = [1.05**i for i in range(29)]  # a median of recent steps alone would rise with it
    assert sft_trouble(sft, slow, 1.05**29) == "stop_loss"
    assert sft_trouble(replace(sft, stop_loss=50), slow, 1.05**29) is None


SCORED = {"rows": 4, "bad_rewards": 0}


def grpo_trouble(settings, entropies, loss=0.0, entropy=0.5, advantage=1.0):
    records = [
        {"kind": "step", "entropy": e, "equal_groups": 0, "accuracy": 0.5, **SCORED}
        for e in entropies
    ]
    where = np.ones((1, 1), bool)
    batch = Batch(
        where * 1, np.zeros(1, int), where, where * 1, where, advantages=np.array([advantage])
    )
    found = Health(settings, 13, records).trouble({"loss": loss, "entropy": entropy}, [batch])
    return found and found[1]


def test_the_bounds_of_grpo_are_on_ratios_and_entropy(grpo):
    uniform = math.log(13)
    for loss in (-1.0, -1e-9, 0.0, 1e-9, 1.0):  # around 0, of either sign, after a loss of 0
        assert grpo_trouble(grpo, [1.0], loss=loss) is None
    assert grpo_trouble(grpo, [1.0], loss=101.0) == "stop_loss"
    assert grpo_trouble(grpo, [1.0], loss=101.0, advantage=-2.0) is None
    assert grpo_trouble(grpo, [1.0], loss=101.0, advantage=0.0) == "stop_loss"  # of the KL
    assert grpo_trouble(grpo, [uniform], entropy=uniform) is None  # it begins so
    assert grpo_trouble(grpo, [1.0], entropy=0.89 * uniform) is None
    assert grpo_trouble(grpo, [1.0], entropy=0.91 * uniform) == "stop_entropy"
    assert grpo_trouble(replace(grpo, stop_entropy=1), [1.0], entropy=0.91 * uniform) is None


class Always(Sums):
    """Every reward is the same."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def score(self, problem, response):
        return self.value


WHY = [
    (0.0, "no response is correct; choose easier problems"),
    (1.0, "every response is correct; choose harder problems"),
    (2.0, "every response is correct; choose harder problems"),
    (0.5, "no response is correct; choose easier problems"),
]


@pytest.mark.parametrize("value, why", WHY)
def test_rewards_that_teach_nothing_are_noted_once_and_at_the_end(grpo, value, why):
    watch = Notes()
    run(grpo, Always(value), watch)
    first, last = watch.notes
    assert first.startswith("nothing to learn from in the first 3 steps: ") and why in first
    assert last.startswith("nothing was learnt in 5 steps: ") and why in last


def test_rewards_that_all_fail_are_no_hard_problems(grpo):
    """They are 0 all the same; where one step's do not fail, they are."""
    reasons = []
    for bad in (4, 3):
        notes = []
        health = Health(grpo, 13, note=notes.append)
        for failed in (4, 4, bad):
            given = {"equal_groups": 2, "accuracy": 0.0, "rows": 4, "bad_rewards": failed}
            health.record({"kind": "step", **given, "bad_reward": "the reward raised OSError: no"})
        reasons += [note.partition(": ")[2] for note in notes]
    all_failed, hard = reasons
    assert all_failed == (
        "every reward failed and counts as 0 (the reward raised OSError: no); mend the task"
    )
    assert "no response is correct" in hard


def test_a_run_that_goes_on_counts_the_steps_before(grpo):
    watch, again = Notes(end=2), Notes()
    with pytest.raises(KeyboardInterrupt):
        run(replace(grpo, save_every=1), Always(0.0), watch)
    assert watch.notes == []
    run(replace(grpo, save_every=1), Always(0.0), again)
    assert [note.partition(":")[0] for note in again.notes] == [
        "nothing to learn from in the first 3 steps",
        "nothing was learnt in 5 steps",
    ]


def test_rewards_that_teach_are_not_noted(grpo):
    watch = Notes()
    run(replace(grpo, width=8), Graded(), watch)
    assert watch.notes == []
