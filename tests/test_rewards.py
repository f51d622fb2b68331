"""Rewards that raise, hang, die, eat, print and lie: each costs its response 0, and no more."""

import json
import os
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

# Seconds that bound a hang and nothing else, and those after which what hangs is said to.
PATIENCE, SHORT = 300.0, 0.2
SOURCE = """
import ctypes, os, subprocess, sys, time
from bridge.tasks import Problem

class Bad:
    name = "bad"
    def size(self, split): return None
    def problem(self, split, number): return Problem(number, "?")
    def read_answer(self, response): return None
    def score(self, problem, response):
        return globals()[response](problem)

def right(problem): return 1
def number(problem): return problem.number
def pid(problem): return os.getpid()
def raises(problem): raise ValueError("one\\ntwo")
def hangs(problem): time.sleep(1000)
def hangs_in_c(problem): ctypes.PyDLL(None).sleep(1000)  # holds the interpreter's lock
def notes_and_hangs(problem):
    open(problem.prompt, "x").close()
    time.sleep(1000)
def spins(problem):
    while True:
        try: time.sleep(1000)
        except BaseException: pass
def leaves(problem): sys.exit(3)
def interrupts(problem): raise KeyboardInterrupt
def exits(problem): os._exit(3)
def crashes(problem): ctypes.string_at(0)
def eats(problem): return len(bytearray(64 << 30))
def hoards(problem):
    held = []
    while True: held.append(bytearray(16 << 20))
def prints(problem):
    print("LOUD"); print("LOUD", file=sys.stderr)
    os.write(1, b"LOUD"); os.write(2, b"LOUD"); os.system("echo LOUD")
    return 1
def reads(problem): return len(sys.stdin.read())
def recurses(problem): return recurses(problem)
def forks(problem): os.fork(); return 1
def babbles(problem):
    for line in range(3, 64):
        try: os.write(line, b"x" * 64)
        except OSError: pass
    return 1
def closes(problem): os.closerange(3, 64); return 1
def none(problem): return None
def text(problem): return "1"
def nan(problem): return float("nan")
def inf(problem): return float("-inf")
def huge(problem): return 10 ** 400
def array(problem): return [1.0]
def truth(problem): return True
def strange(problem):
    class Strange(Exception):
        def __str__(self): raise RuntimeError
    raise Strange
def orphans(problem):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    open(problem.prompt, "w").write(f"{os.getpid()} {child.pid}")
    ctypes.PyDLL(None).sleep(1000)
"""


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A task whose responses name what its reward does."""
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "bad_rewards.py").write_text(SOURCE)
    sys.path.insert(0, str(folder))
    import bad_rewards  # pyright: ignore[reportMissingImports]

    yield bad_rewards.Bad()
    sys.path.remove(str(folder))


HANGS = dict.fromkeys(("hangs", "hangs_in_c", "spins"), f"the reward took more than {SHORT} s")
BAD = HANGS | {
    "raises": "the reward raised ValueError: one two",
    "leaves": "the reward raised SystemExit: 3",
    "interrupts": "the reward raised KeyboardInterrupt",
    "exits": "the reward ended its process (exit status 3)",
    "crashes": "the reward killed its process (SIGSEGV)",
    "babbles": "the reward wrote into the line to its own process",
    "none": "the reward is no number but None",
    "text": "the reward is no number but str '1'",
    "nan": "the reward is nan, which is not finite",
    "inf": "the reward is -inf, which is not finite",
    "huge": "the reward is no number but int 1",
    "array": "the reward is no number but list [1.0]",
    "recurses": "the reward raised RecursionError",
    "strange": "the reward raised Strange",
    # Its line is closed before it has ended: what is seen first depends on the machine.
    "closes": ("the reward ended its process", "the reward closed the line to its own process"),
}


def test_whatever_a_reward_does_counts_0_and_the_next_is_scored(bad):
    problem = Problem(7, "?")
    scores = []
    with Scorer(bad) as scorer:
        for each in BAD:
            scorer.time_limit = SHORT if each in HANGS else PATIENCE
            scores += scorer.score([(problem, each)])
            scorer.time_limit = PATIENCE  # a machine may be busy, and these are quick
            scores += scorer.score([(problem, "right"), (problem, "number")])
    assert [s.value for s in scores] == [0.0, 1.0, 7.0] * len(BAD)
    for name, wrong, right, number in zip(BAD, *(scores[i::3] for i in range(3)), strict=True):
        assert wrong.problem is not None and wrong.problem.startswith(BAD[name]), name
        assert "\n" not in wrong.problem and len(wrong.problem) < 220
        assert right.problem is None and number.problem is None, name


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit memory")
def test_a_reward_that_eats_memory(bad):
    with Scorer(bad, memory=1 << 28, time_limit=PATIENCE) as scorer:
        pairs = [(Problem(0, "?"), name) for name in ("eats", "right", "hoards", "right")]
        eats, one, hoards, two = scorer.score(pairs)
    assert eats.problem == hoards.problem == "the reward raised MemoryError"
    assert one.value == two.value == 1.0


def test_what_is_harmless_is_scored(bad, capfd):
    names = ("prints", "truth", "reads", "forks", "number", "right")
    with Scorer(bad, time_limit=PATIENCE) as scorer:
        scores = scorer.score([(Problem(n, "?"), name) for n, name in enumerate(names)])
    assert [s.value for s in scores] == [1.0, 1.0, 0.0, 1.0, 4.0, 1.0]
    assert all(s.problem is None for s in scores)
    assert capfd.readouterr() == ("", "")


def test_scores_come_in_order_from_one_process_that_stays(bad, monkeypatch):
    monkeypatch.setattr(bridge.tasks.scorer, "PATIENCE", PATIENCE)  # else a busy machine has two
    with Scorer(bad, time_limit=PATIENCE, processes=1) as scorer:
        scores = scorer.score([(Problem(n, "?"), "number") for n in range(2000)])
        assert [s.value for s in scores] == list(range(2000))
        pids = {s.value for s in scorer.score([(Problem(0, "?"), "pid")] * 10)}
        assert len(pids) == 1 and pids != {os.getpid()}
        assert scorer.score([]) == []


def test_a_long_response_and_a_problem_that_cannot_be_sent(bad):
    with Scorer(bad, time_limit=PATIENCE) as scorer:
        long = Problem(3, "x" * 5_000_000)
        lost = Problem(4, "?", metadata={"f": lambda: None})
        one, two, three = scorer.score([(long, "number"), (lost, "number"), (long, "right")])
    assert (one.value, two.value, three.value) == (3.0, 0.0, 1.0)
    assert two.problem is not None and two.problem.startswith("problem 4 cannot be pickled")


def test_limits_and_tasks_that_are_refused(bad):
    for limit in (0, -1, float("nan"), float("inf")):
        with pytest.raises(BridgeError, match="time_limit must be above 0, not"):
            Scorer(bad, time_limit=limit)
    with pytest.raises(BridgeError, match="memory must be"):
        Scorer(bad, memory=0)

    class Local(type(bad)):
        pass

    with pytest.raises(BridgeError, match="cannot go to the process that scores"):
        Scorer(Local())
    scorer = Scorer(bad)
    scorer.close()
    scorer.close()
    with pytest.raises(ValueError, match="closed"):
        scorer.score([(Problem(0, "?"), "right")])


def test_a_task_that_does_not_load(bad, tmp_path, monkeypatch):
    (tmp_path / "sour.py").write_text(
        "import os\nimport bad_rewards\nclass Sour(bad_rewards.Bad):\n"
        "    def __setstate__(self, state):\n        raise OSError('no\\nmodel')\n"
        "    def __getstate__(self):\n        return {'a': 1}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import sour  # pyright: ignore[reportMissingImports]

    with pytest.raises(BridgeError) as caught:
        Scorer(sour.Sour())
    assert str(caught.value) == "the task fails to load: OSError: no model"


def test_the_working_directory_has_no_say_in_what_a_process_starts_with(bad, tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("import os; os._exit(9)")
    monkeypatch.chdir(tmp_path)
    with Scorer(bad, time_limit=PATIENCE) as scorer:
        assert scorer.score([(Problem(0, "?"), "right")])[0].value == 1.0


def test_a_task_of_the_script_itself_is_refused_in_one_line(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from bridge.tasks import Scorer\nfrom bridge.errors import BridgeError\n"
        "class Mine:\n    name = 'mine'\n"
        "try:\n    Scorer(Mine())\nexcept BridgeError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1 and "put it into a module" in done.stdout


# Ends of our own process: what is left of the reward's.

RUN = """
import sys
sys.path.insert(0, sys.argv[1])
import bad_rewards
from bridge.tasks import Problem, Scorer
with Scorer(bad_rewards.Bad(), time_limit=1000) as scorer:
    scorer.score([(Problem(0, sys.argv[2]), "orphans")])
"""


def alive(pid: int) -> bool:
    """Whether a process is there and not a zombie."""
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return done.stdout.strip() not in ("",) and not done.stdout.strip().startswith("Z")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal is Linux's")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_orphan_is_left_even_of_a_reward_that_holds_the_interpreter(bad, tmp_path, how):
    note = tmp_path / "pids"
    folder = str(Path(sys.modules["bad_rewards"].__file__ or "").parent)
    run = subprocess.Popen(
        [sys.executable, "-c", RUN, folder, str(note)],
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        wait_for(lambda: note.exists() and len(note.read_text().split()) == 2)
        pids = [int(pid) for pid in note.read_text().split()]
        assert all(map(alive, pids))
        os.killpg(run.pid, how)  # as a terminal does
        run.communicate(timeout=PATIENCE)
        wait_for(lambda: not any(map(alive, pids)))
    finally:
        run.kill()
        run.communicate()


def test_what_a_reward_started_dies_with_it(bad, tmp_path):
    note = tmp_path / "pids"
    with Scorer(bad) as scorer:
        for limit in (1, 4, 16, 64):  # the first by which it has started something
            scorer.time_limit = float(limit)
            [score] = scorer.score([(Problem(0, str(note)), "orphans")])
            assert score.problem == f"the reward took more than {limit} s"
            pids = note.read_text().split() if note.exists() else []
            if len(pids) == 2:
                break
        else:
            pytest.fail("a minute is not enough to start a process")
        wait_for(lambda: not any(alive(int(pid)) for pid in pids))


def wait_for(condition) -> None:
    """Until it holds; fails where it never does."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited for {PATIENCE:g} s"
        time.sleep(0.02)


@pytest.mark.usefixtures("no_collection")
def test_ctrl_c_within_a_score_leaves_a_scorer_that_works(bad, tmp_path):
    note, here = tmp_path / "scoring", threading.get_ident()

    def press():
        wait_for(note.exists)
        signal.pthread_kill(here, signal.SIGINT)

    with Scorer(bad, time_limit=PATIENCE) as scorer:
        presser = threading.Thread(target=press, daemon=True)
        with pytest.raises(KeyboardInterrupt):
            presser.start()
            scorer.score([(Problem(0, str(note)), "notes_and_hangs")])
        presser.join()
        scores = scorer.score([(Problem(5, "?"), "number"), (Problem(0, "?"), "right")])
        assert [s.value for s in scores] == [5.0, 1.0]


def test_a_formula_that_takes_for_ever_to_compare(tmp_path):
    from bridge.tasks import find_task

    path = tmp_path / "powers.jsonl"
    path.write_text(json.dumps({"prompt": "a?", "answer": "1", "split": "test"}) + "\n")
    task = find_task(str(path), match="math")
    problem = task.problem("test", 0)
    with Scorer(task, time_limit=1.0) as scorer:
        [tower] = scorer.score([(problem, r"\boxed{9^{9^{9^{9^9}}}}")])
        scorer.time_limit = PATIENCE
        [right] = scorer.score([(problem, "1")])
    assert tower.value == 0.0 and tower.problem == "the reward took more than 1 s"
    assert right.value == 1.0
