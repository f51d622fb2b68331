"""Which run a directory holds, and who may go on with it: its own settings, its own checkpoint, one
process; what is refused leaves nothing."""

import fcntl
import json
from dataclasses import replace
from pathlib import Path

import pytest
from training_stops import Watch, die, interrupt, run, toy_run
from training_toys import Graded, write_model

from bridge.errors import BridgeError
from bridge.training import SFTSettings
from bridge.training.directory import RunDirectory, check_same
from bridge.training.schedule import problem_number

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def settings(toy_model, tmp_path):
    return toy_run(toy_model, tmp_path / "run")


class Wordy(Graded):
    """Of a split, the second prompt is long."""

    def __init__(self, split):
        super().__init__()
        self.split, self.second = split, problem_number(80, 0, 1) if split == "train" else 1

    def problem(self, split, number):
        found = super().problem(split, number)
        long = split == self.split and number == self.second
        return replace(found, prompt="1+" * 10 + found.prompt) if long else found


def test_a_run_goes_on_only_with_its_own_settings(settings, toy_model, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(settings, Watch(2, interrupt))
    changes = {
        "lr": 0.5,
        "seed": 9,
        "width": 5,
        "backend": "mlx",
        "temperature": 0.5,
        "trainable": ("bridge",),
        "system": "x",
        "task_options": {"a": 1},
    }
    for name, value in changes.items():
        with pytest.raises(BridgeError, match=f"config.toml: {name} was .*, and now is ") as error:
            run(replace(settings, **{name: value}))
        assert "\n" not in str(error.value)
    more = replace(settings, save_every=1, keep=5, steps=7, reward_seconds=20)  # what may change
    assert run(more, resume=True).resumed_from == 2
    assert run(more).steps == 7  # done already
    assert run(replace(more, steps=8)).resumed_from == 7
    linear = replace(settings, schedule="linear", out=settings.out + "2")
    with pytest.raises(KeyboardInterrupt):
        run(linear, Watch(2, interrupt))
    with pytest.raises(BridgeError, match="steps was 6, and now is 5"):
        run(replace(linear, steps=5))


def test_a_run_that_has_saved_nothing_may_begin_with_other_settings(settings):
    with pytest.raises(KeyboardInterrupt):
        run(replace(settings, max_new_tokens=3), Watch(1, die))
    assert "max_new_tokens = 3\n" in (Path(settings.out) / "config.toml").read_text()
    assert run(settings).steps == 6
    assert "max_new_tokens = 2\n" in (Path(settings.out) / "config.toml").read_text()


LONG = r"task sums: the prompt of problem \d+ of {} has {} tokens.* goes past the context of 64"
REFUSED = [
    ({"max_new_tokens": 61}, Graded(), LONG.format("train", 4)),
    ({"max_new_tokens": 50}, Wordy("train"), LONG.format("train", 24)),
    ({"max_new_tokens": 50}, Wordy("validation"), LONG.format("validation", 24)),
    ({"micro_batch_tokens": 7}, Graded(), r"4 rows of up to 5 tokens, of which 4 .* are 8 cells"),
]


@pytest.mark.parametrize("kind", ["grpo", "sft"])
@pytest.mark.parametrize("change, task, message", REFUSED)
def test_what_is_refused_leaves_nothing(settings, kind, change, task, message):
    if kind == "sft":
        names = ("checkpoint", "out", "task", "backend", "width", "max_new_tokens", "eval_every")
        settings = SFTSettings(**{name: getattr(settings, name) for name in names})
    with pytest.raises(BridgeError, match=message) as error:
        run(replace(settings, **change), task=task)
    assert "\n" not in str(error.value) and not Path(settings.out).exists()


def test_what_an_older_run_was_asked_is_the_default_yet(settings, tmp_path):
    older, now = (replace(settings, max_new_tokens=n) for n in (256, None))
    check_same(older, now, tmp_path)
    check_same(now, older, tmp_path)
    with pytest.raises(BridgeError, match="max_new_tokens was 255, and now is 256"):
        check_same(replace(now, max_new_tokens=255), now, tmp_path)


def test_a_best_checkpoint_is_worth_keeping(settings):
    """Even where nothing else was saved; that of the start is not, since it is the start."""
    slow = replace(settings, save_every=100, lr=1e30, eval_every=1)
    with pytest.raises(BridgeError, match=r"step 2: loss is nan.*there is no checkpoint yet"):
        run(slow)
    kept = Path(settings.out) / "best" / "training.json"
    assert json.loads(kept.read_text())["evaluation"]["step"] == 0
    with pytest.raises(KeyboardInterrupt):
        run(replace(slow, lr=1e-2), Watch(1, die, "evaluation"))
    said = json.loads(kept.read_text())
    kept.write_text(json.dumps({**said, "evaluation": {"step": 1}}))
    with pytest.raises(BridgeError, match=r"lr was 0.01, and now is 0.02"):
        run(replace(slow, lr=2e-2))


def test_what_the_directory_must_not_be(settings, tmp_path, monkeypatch):
    with pytest.raises(BridgeError, match="holds no run to resume"):
        run(settings, resume=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(BridgeError, match="exists already and holds no run; choose another name"):
        run(settings)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(BridgeError, match="exists already and holds no run"):
        run(replace(settings, out=str(file)))
    with pytest.raises(BridgeError, match="cannot be made"):
        run(replace(settings, out=str(file / "run")))


def test_a_second_process_is_kept_out(settings):
    directory = RunDirectory.open(settings)
    with pytest.raises(BridgeError, match="another process is at this run"):
        run(settings)
    with directory:
        pass
    run(settings)
    with (Path(settings.out) / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_changed_checkpoint_is_noticed(settings, tmp_path):
    mine = write_model(tmp_path / "mine")
    settings = replace(settings, checkpoint=str(mine))
    with pytest.raises(KeyboardInterrupt):
        run(settings, Watch(2, interrupt))
    other = write_model(tmp_path / "other", seed=1)
    (other / "model.safetensors").replace(mine / "model.safetensors")
    with pytest.raises(BridgeError, match=r"mine: has changed since .* started from it"):
        run(settings)
