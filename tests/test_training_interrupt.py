"""Ctrl-C where what is done may be dropped: in evaluations, rollouts and sampling it ends a run at
once, the last boundary is kept, and the run that goes on is the run that was not stopped."""

from dataclasses import replace
from pathlib import Path

import pytest
import training_stops as stops
from training_kills import outcome
from training_stops import Watch, interrupt, toy_run
from training_toys import Graded, InProcess

from bridge.decoding.engine import Engine
from bridge.training import SFTSettings
from bridge.training.log import read_log

pytestmark = pytest.mark.usefixtures("one_thread")


class Presses(InProcess):
    """Ctrl-C comes after the first score of call number `at`; `after` counts those that follow.
    With `deaf`, whoever is in the middle of it hears nothing, and goes on."""

    def __init__(self, at=None, deaf=False):
        super().__init__(Graded())
        self.at, self.deaf, self.calls, self.after = at, deaf, 0, 0

    def score(self, pairs):
        self.calls += 1
        found = []
        for pair in pairs:
            self.after += self.at is not None and self.calls >= self.at and bool(found)
            found += super().score([pair])
            if self.calls == self.at and len(found) == 1:
                try:
                    interrupt()
                except KeyboardInterrupt:
                    if not self.deaf:
                        raise
        return found


@pytest.fixture(scope="module")
def settings(toy_model, tmp_path_factory):
    run = toy_run(toy_model, tmp_path_factory.mktemp("interrupt") / "run")
    return replace(run, steps=4, eval_every=2, save_every=100)


@pytest.fixture(scope="module")
def undisturbed(settings):
    """What the run comes to; beside the last one, nothing is saved by rule."""
    run(settings)
    return outcome(Path(settings.out))


def run(settings, scorer=None, watch=None):
    return stops.run(settings, watch, scorer=scorer or Presses())


def goes_on(settings, undisturbed, saved):
    """The same run again, from where it was saved, ends as if nothing had been."""
    assert run(settings).resumed_from == saved
    found = outcome(Path(settings.out))
    assert {name: found[name] for name in undisturbed} == undisturbed


# The calls of a run: an evaluation, two steps, an evaluation, two steps, an evaluation.
CALLS = {1: None, 2: None, 4: 2, 5: 2, 7: 4}


@pytest.mark.parametrize("call, saved", CALLS.items())
def test_ctrl_c_in_a_reward_ends_the_run_at_once(settings, undisturbed, tmp_path, call, saved):
    chosen = replace(settings, out=str(tmp_path / "run"))
    scorer, watch = Presses(call), Watch()
    with pytest.raises(KeyboardInterrupt):
        run(chosen, scorer, watch)
    assert (scorer.calls, scorer.after) == (call, 0)
    kept = [f"saved {chosen.out}/checkpoints/step-00000{saved}"] if saved else []
    assert [note.partition(";")[0] for note in watch.notes] == kept
    goes_on(chosen, undisturbed, saved)


@pytest.mark.parametrize("call, saved", [(4, 2), (5, 2)])
def test_ctrl_c_while_decoding_ends_the_run_at_once(
    settings, undisturbed, tmp_path, monkeypatch, call, saved
):
    chosen, original, engines = replace(settings, out=str(tmp_path / "run")), Engine.step, []

    def step(self):
        if self not in engines:
            engines.append(self)
        events = original(self)
        if len(engines) == call and self.stats.tokens and not self.idle:
            interrupt()
        return events

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", step)
        with pytest.raises(KeyboardInterrupt):
            run(chosen)
    assert len(engines) == call and engines[-1].running
    goes_on(chosen, undisturbed, saved)


def test_ctrl_c_that_is_swallowed_ends_the_evaluation_after_it(settings, undisturbed, tmp_path):
    chosen = replace(settings, out=str(tmp_path / "run"))
    scorer = Presses(4, deaf=True)
    with pytest.raises(KeyboardInterrupt):
        run(chosen, scorer)
    assert scorer.calls == 4 and scorer.after == 7  # of two problems with four rows
    records = read_log(Path(chosen.out) / "log.jsonl")
    assert [r["step"] for r in records if r["kind"] == "evaluation"] == [0]
    goes_on(chosen, undisturbed, 2)


def test_ctrl_c_while_sampling_drops_the_batch_alone(settings, tmp_path):
    names = ("checkpoint", "task", "backend", "max_new_tokens")
    given = {name: getattr(settings, name) for name in names}
    sft = SFTSettings(
        **given, out=str(tmp_path / "run"), problems=24, samples=8, max_rows=16, epochs=1
    )
    scorer = Presses(3)
    with pytest.raises(KeyboardInterrupt):
        run(sft, scorer)
    samples = Path(sft.out) / "samples.jsonl"
    assert scorer.after == 0 and len(samples.read_bytes().splitlines()) == 16
    run(sft)
    again = replace(sft, out=str(tmp_path / "again"))
    run(again)
    assert outcome(Path(sft.out)) == outcome(Path(again.out))
    assert samples.read_bytes() == (Path(again.out) / "samples.jsonl").read_bytes()
