"""Rewards that take long: others are scored beside them, in order, and hanging ones end a batch."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import bridge.tasks.scorer
from bridge.errors import BridgeError
from bridge.tasks import Problem, Scorer

LONG = 120.0  # seconds that are never used up, on a busy machine neither
SOURCE = """
import os, time
from pathlib import Path
from bridge.tasks import Problem

class Slow:
    name = "slow"
    def __init__(self, folder): self.folder = Path(folder)
    def size(self, split): return None
    def problem(self, split, number): return Problem(number, "?")
    def read_answer(self, response): return None
    def prepare(self):
        if (self.folder / "broken").exists(): raise OSError("no data")
    def score(self, problem, response):
        word, _, count = response.partition(" ")
        return globals()[word](self.folder, problem.number, int(count or 0))

def number(folder, number, count): return number
def meets(folder, number, count):  # returns when so many have come here
    (folder / f"came-{number}").touch()
    while len(list(folder.glob("came-*"))) < count: time.sleep(0.01)
    return number
def process(folder, number, count): return 0 * meets(folder, number, count) + os.getpid()
def hangs(folder, number, count):
    (folder / f"pid-{os.getpid()}").touch()
    time.sleep(1000)
def breaks(folder, number, count):
    (folder / "broken").touch()
    os._exit(3)
"""


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """The module above, which other processes find too."""
    folder = tmp_path_factory.mktemp("slow")
    (folder / "slow_rewards.py").write_text(SOURCE)
    sys.path.insert(0, str(folder))
    import slow_rewards  # pyright: ignore[reportMissingImports]

    yield slow_rewards
    sys.path.remove(str(folder))


@pytest.fixture
def task(slow, tmp_path):
    return slow.Slow(tmp_path)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(bridge.tasks.scorer, "PATIENCE", 0.05)


def pairs(*responses):
    return [(Problem(n, "?"), response) for n, response in enumerate(responses)]


def test_slow_rewards_are_scored_beside_each_other_and_come_in_order(task):
    """The first ends when all three have begun, and the last of them ends first."""
    asked = pairs("meets 3", "number", "meets 3", "meets 3", "number")
    with Scorer(task, time_limit=LONG, processes=3) as scorer:
        scores = scorer.score(asked)
    assert [(s.value, s.problem) for s in scores] == [(float(n), None) for n in range(5)]


def test_there_are_no_more_processes_than_asked_for(task):
    with Scorer(task, time_limit=LONG, processes=2) as scorer:
        scores = scorer.score(pairs(*["process 2"] * 6))
        assert len({s.value for s in scores}) == len(scorer.children) == 2
    with pytest.raises(BridgeError, match="processes must be 1 or above, not 0"):
        Scorer(task, processes=0)


def test_where_nothing_comes_in_time_it_says_so(task, monkeypatch):
    """After so many in a row, of several problems; what was in time between them counts."""
    monkeypatch.setattr(bridge.tasks.scorer, "HOPELESS", (2, 2))
    one, two = [(Problem(n, "?"), "hangs") for n in range(2)]
    with Scorer(task, time_limit=0.05, processes=1) as scorer:
        scores = scorer.score([one, one])
        assert {s.problem for s in scores} == {"the reward took more than 0.05 s"}
        with pytest.raises(BridgeError, match=r"3 rewards in a row took more than 0\.05 s") as e:
            scorer.score([two])
        assert "reward_seconds" in str(e.value) and "\n" not in str(e.value)
        scorer.score([one])
        scorer.time_limit = LONG
        assert scorer.score([(Problem(7, "?"), "number")])[0].value == 7
        scorer.time_limit = 0.05
        scorer.score([two])


def test_a_process_that_cannot_be_started_again_costs_its_response(task):
    with Scorer(task, time_limit=LONG, processes=1) as scorer:
        first, *more = scorer.score(pairs("breaks", "number", "number"))
        assert first.problem == "the reward ended its process (exit status 3)"
        assert {s.problem for s in more} == {"the task fails to load: OSError: no data"}
        (task.folder / "broken").unlink()
        assert scorer.score([(Problem(7, "?"), "number")])[0].value == 7


# Ends of our own process: of several that hang, none is left.

RUN = """
import sys
sys.path.insert(0, sys.argv[1])
import slow_rewards
import bridge.tasks.scorer
from bridge.tasks import Problem, Scorer
bridge.tasks.scorer.PATIENCE = 0.05
with Scorer(slow_rewards.Slow(sys.argv[2]), time_limit=1000, processes=2) as scorer:
    scorer.score([(Problem(0, "?"), "hangs")] * 3)
"""


def two_that_hang(folder: Path) -> list[str]:
    """Their processes, once both are at it."""
    end = time.monotonic() + LONG
    while len(pids := [path.name[4:] for path in folder.glob("pid-*")]) < 2:
        assert time.monotonic() < end, "they never were"
        time.sleep(0.02)
    return pids


def gone(pids: list[str]) -> None:
    """Wait until none of the processes is there, or else is no more than a zombie."""
    end = time.monotonic() + LONG
    while True:
        command = ["ps", "-o", "stat=", "-p", ",".join(pids)]
        said = subprocess.run(command, capture_output=True, text=True).stdout.split()
        if all(state.startswith("Z") for state in said):
            return
        assert time.monotonic() < end, "they are still there"
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal is Linux's")
def test_none_is_left_after_kill_9(slow, tmp_path):
    folder = str(Path(slow.__file__).parent)
    with subprocess.Popen([sys.executable, "-c", RUN, folder, str(tmp_path)]) as run:
        try:
            pids = two_that_hang(tmp_path)
        finally:
            run.kill()
    gone(pids)


@pytest.mark.usefixtures("no_collection")
def test_none_is_left_after_ctrl_c_and_the_scorer_works(task):
    here = threading.get_ident()

    def press():
        two_that_hang(task.folder)
        signal.pthread_kill(here, signal.SIGINT)

    with Scorer(task, time_limit=LONG, processes=2) as scorer:
        presser = threading.Thread(target=press, daemon=True)
        with pytest.raises(KeyboardInterrupt):
            presser.start()
            scorer.score(pairs("hangs", "hangs", "number"))
        presser.join()
        gone(two_that_hang(task.folder))
        assert [s.value for s in scorer.score(pairs("number", "number"))] == [0.0, 1.0]
