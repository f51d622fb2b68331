"""`benchmarks/accelerator.py`: rehearsed on a CPU, from a checkout that nobody installed, and how
it deals with stages that hang, die or lack something. No figure is asserted, only that they are
there and add up.
"""

import json
import os
import signal
import subprocess
import sys
import venv
from argparse import Namespace
from pathlib import Path
from sysconfig import get_path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "accelerator.py"
sys.path.append(str(SCRIPT.parent))

import accelerator  # noqa: E402
import accelerator_speed  # noqa: E402
import accelerator_train  # noqa: E402
import operations  # noqa: E402

from bridge.decoding.shared import SharedPlan  # noqa: E402

STAGES = "torch-quick,torch-kernels,torch-ahead,torch-padding,torch-decode,torch-update,torch-train"
STAGES += ",mlx-decode,torch-peers"


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A Python that has all packages but this one."""
    home = tmp_path_factory.mktemp("bare")
    venv.create(home / "venv", with_pip=False)
    packages = home / "packages"
    packages.mkdir()
    for entry in Path(get_path("purelib")).iterdir():
        if not entry.name.startswith(("bridge", "_bridge", "__")) and entry.suffix != ".pth":
            (packages / entry.name).symlink_to(entry)
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment = {**kept, "PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1"}
    return home / "venv" / "bin" / "python", environment


def test_a_plain_checkout_is_rehearsed_on_a_cpu(bare, tmp_path):
    python, environment = bare
    absent = subprocess.run(
        [python, "-c", "import bridge"], env=environment, cwd=tmp_path, capture_output=True
    )
    assert b"No module named 'bridge'" in absent.stderr
    command = [python, SCRIPT, "--size", "tiny", "--stages", STAGES, "--out", tmp_path]
    done = subprocess.run(
        [*command, "--device", "cpu"], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [table] = tmp_path.glob("accelerator-*.txt")
    results = json.loads(table.with_suffix(".json").read_text())
    assert list(results["stages"]) == ["machine", *STAGES.split(",")]
    assert {stage["status"] for stage in results["stages"].values()} == {"done"}
    assert results["machine"]["bandwidth"] > 0 and results["packages"]["torch"]
    for dtype in ("float32", "bfloat16", "float16"):
        found = results["stages"]["torch-quick"]["figures"][dtype]
        assert found["passed"] and found["complete"] and found["level"] == "L1"
        assert found["checks_passed"] == found["checks"] >= 10 and not found["failures"]
        assert found["versions"]["bridge"] != "?"
    for backend in ("torch", "mlx"):
        decoding = results["stages"][f"{backend}-decode"]["figures"]
        for rows in (1, 8, 64):
            figures = decoding[f"{rows} rows"]
            step = figures["step"]["on"]
            assert figures["tokens_per_second"]["on"] == pytest.approx(rows / step)
            assert figures["on_against_off"] == pytest.approx(step / figures["step"]["off"])
            assert 0 < figures["share_of_bandwidth"]["off"] < 1
    beside = results["stages"]["torch-peers"]["figures"]
    for engine in ("bridge torch, bfloat16, blocks", "transformers, bfloat16"):
        assert list(beside[engine]["widths"]) == ["1", "8", "64"]
        assert all(found["new"] == 4 for found in beside[engine]["widths"].values())
    ahead = results["stages"]["torch-ahead"]["figures"]
    for rows in (1, 8, 64):
        assert ahead[f"{rows} rows"]["agree"] == {"one at a time": 1, "8 in turns": 1}
    for stage in ("torch-kernels", "torch-padding"):
        for figures in results["stages"][stage]["figures"].values():
            assert figures is None or all(s > 0 for s in figures["seconds"].values())
    updates = results["stages"]["torch-update"]["figures"]
    assert list(updates) == ["all", "blocks alone", "blocks, LoRA of rank 2"]
    assert all(0 < figures["share_of_gemm"] < 1 for figures in updates.values())
    training = results["stages"]["torch-train"]["figures"]
    assert list(training) == ["blocks alone", "all, blocks on", "all, blocks off"]
    assert all(0 < figures["share_of_gemm"] < 1 for figures in training.values())
    assert "8 rows" in table.read_text() and "all, blocks off" in table.read_text()


FAKE = """
import json, signal, sys, time
asked = json.loads(sys.argv[1])
open(asked["out"], "w").write(json.dumps({"lines": [], "figures": {"a": 1}}))
print("it began", flush=True)
"""
ENDS = {
    "hangs": ("time.sleep(600)", "out of time"),
    "hangs and will not end": (
        "signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)",
        "out of time",
    ),
    "dies": ("raise SystemExit('no such kernel')", "died"),
    "is killed": ("import os; os.kill(os.getpid(), 9)", "died"),
}


@pytest.mark.parametrize("end", ENDS)
def test_what_a_stage_had_measured_outlives_it(tmp_path, monkeypatch, end):
    program, status = ENDS[end]
    (tmp_path / "accelerator_stages.py").write_text(FAKE + program)
    monkeypatch.setattr(accelerator, "GRACE", 2.0)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    stage = accelerator.Stage("x", "what", 60, ())
    options = Namespace(size="tiny", device=None)
    seconds = 5 if status == "out of time" else 60
    found, said = accelerator.carry_out(stage, seconds, options, {}, environment)
    assert found["status"] == status and found["figures"] == {"a": 1} and "it began" in said
    if end == "dies":
        assert found["why"] == "no such kernel"


def test_a_failure_outlives_the_time(tmp_path, monkeypatch):
    program = """
import json, sys, time
out = json.loads(sys.argv[1])["out"]
open(out, "w").write(json.dumps({"figures": {"float32": {"failed": 2}, "float16": {}}}))
time.sleep(600)
"""
    (tmp_path / "accelerator_stages.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    stage = accelerator.Stage("x", "what", 60, ())
    options = Namespace(size="tiny", device=None)
    found, _ = accelerator.carry_out(stage, 5, options, {}, environment)
    assert (found["status"], found["why"]) == ("failed", "out of time")
    assert accelerator.failed(found)


WITHOUT_SIGINT = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.argv[1:] = ['{"stage": "slow-quick", "out": "/dev/null"}']
import accelerator_stages as stages

def slow(*_):
    import time
    try:  # "ready" within it: a signal that comes at once finds us here
        yield "a", 1, "it began"
        print("ready", flush=True)
        time.sleep(600)
    finally:
        print("it was told to end", flush=True)

stages.conformance = slow
stages._keep = lambda *_: None
stages.main()
"""


@pytest.mark.parametrize("how", ["ctrl-c", "the parent is gone"])
def test_a_stage_ends_when_it_is_told_to(how):
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}
    with subprocess.Popen(
        [sys.executable, "-c", WITHOUT_SIGINT],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as stage:
        while stage.stdout.readline() != b"ready\n":
            pass
        if how == "ctrl-c":  # which whoever started it ignores
            stage.send_signal(signal.SIGINT)
            assert stage.stdout.read() == b"it was told to end\n"
        else:
            stage.stdin.close()
        assert stage.wait(60) != 0


def test_another_run_adds_to_the_same_files(tmp_path, monkeypatch):
    results = {
        "machine": {"device": "ACME(R) G100 @ 2.5GHz"},
        "started": "then",
        "size": "tiny",
        "stages": {"torch-ci": {"status": "done", "seconds": 1}},
    }
    accelerator.write(results, "log", tmp_path)
    assert (tmp_path / "accelerator-acme-g100-2-5ghz.json").exists()
    assert accelerator.earlier(results, tmp_path) == results["stages"]
    assert accelerator.earlier({**results, "size": "1.5b"}, tmp_path) == {}
    (tmp_path / "accelerator-acme-g100-2-5ghz.json").write_text("{")
    assert accelerator.earlier(results, tmp_path) == {}


def test_a_stage_that_lacks_something_or_has_no_time_is_left_out(tmp_path):
    chosen = [
        accelerator.Stage("lacks", "what", 60, ("numpy", "not_there", "nor_this")),
        accelerator.Stage("late", "what", 60, ("numpy",)),
    ]
    options = Namespace(budget=accelerator.GRACE + 5, size="tiny", device=None, out=tmp_path)
    results = accelerator.run(chosen, options, {})
    assert results["stages"] == {
        "lacks": {"status": "skipped", "why": "not_there, nor_this missing"},
        "late": {"status": "skipped", "why": "no time left"},
    }
    assert results["packages"]["not_there"] is None
    assert (
        "lacks: skipped (not_there, nor_this missing)"
        in (tmp_path / "accelerator-unknown.txt").read_text()
    )


def test_a_stage_that_is_not_known_is_named():
    known = accelerator.stages(("torch", "jax"))
    assert [s.name for s in accelerator.choose(known, "jax-ci")] == ["machine", "jax-ci"]
    assert accelerator.choose(known, "jax-quack").startswith("stage 'jax-quack' is not known; use ")
    done = subprocess.run([sys.executable, SCRIPT, "--stages", "x"], capture_output=True, text=True)
    assert done.returncode == 2 and "stage 'x' is not known" in done.stderr


def test_what_a_step_must_read_and_multiply():
    config = accelerator_speed.configs("tiny")["off"]
    layer = 32 * 32 * 2 + 2 * 32 * 16 + 32 + 2 * 16 + 3 * 32 * 64 + 2 * 32  # q o, k v, biases, ...
    head = 128 * 32
    assert accelerator_speed.parameters(config, embedding=False) == 2 * layer + 32 + head
    work = {"prompt": 10, "steps": 4}
    cache = 2 * 2 * 16 * (2 * 10 + 6 * 2)  # k and v, layers, K d, two prompts and six rows' cells
    read = accelerator_speed._bytes(config, [3, 3], work)
    assert read == 2 * (2 * layer + 32 + head + cache)
    did = operations.update(config, ["lm_head.weight"], operations.Work(1, 4, 0, 8))
    forward_and_back = 4 * (2 * layer + 32 + head) * 32
    scores = 3 * 2 * 2 * 2 * 32 * 32 * 8 / 2  # thrice, layers, q k and p v, 2 H d, cells, half of S
    assert did == forward_and_back + 2 * head * 32 + scores


def test_a_prompt_counts_once_a_group_and_the_head_at_targets():
    work = operations.Work(2, 3, 6, 4)
    batch = accelerator_train._batch(work, 128)
    positions = np.broadcast_to(np.arange(batch.tokens.shape[1]), batch.tokens.shape)
    plan = SharedPlan.of(batch.tokens, batch.groups, batch.active, positions)
    assert plan.cells == work.cells == 2 * (6 + 3 * 3)
    assert batch.target_mask.sum() == work.targets == 2 * 3 * 4
    assert work.pairs == 2 * (6 * 6 / 2 + 3 * (3 * 6 + 3 * 3 / 2))


def test_random_weights_are_of_the_size_of_trained_ones():
    tensors = accelerator_speed.RandomTensors(accelerator_speed.configs("tiny")["on"])
    weight = np.asarray(tensors["model.layers.1.bridge.q_proj.weight"], np.float32)
    assert weight.shape == (16, 32) and np.all((abs(weight) >= 2**-6) & (abs(weight) < 2**-5))
    assert abs(np.sign(weight).mean()) < 0.3
    assert np.all(np.asarray(tensors["model.norm.weight"], np.float32) == 1)
