"""The experiment at toy size: every arm, stages that are not done twice, the report of it all.

Figures mean nothing here: models have a few thousand parameters, and learn for two steps.
"""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training_toys import InProcess

import bridge
from bridge.errors import BridgeError
from bridge.tasks import find_task
from bridge.training.batches import Group, make_batch
from bridge.training.rollouts import decoder_logprobs

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments" / "replication"))
import ablations
import collect
import plans
import report
import run
from base import Size

from bridge_torch.block import Grid, mix
from bridge_torch.decode import step

pytestmark = pytest.mark.usefixtures("one_thread")

TOY = replace(
    plans.PLANS["search"],
    options={"numbers": 2, "modulus": 5},
    demonstration={"trials": 1},
    new_tokens=6,
    size=Size(width=16, ffn=32, layers=2, heads=2, context=16),
    pretrain_steps=150,
    pretrain_rows=24,
    heads=2,
    head_dim=4,
    warm_problems=24,
    warm_epochs=1,
    steps=2,
    problems=4,
    width=4,
    test_problems=8,
    test_widths=(1, 2, 4),
)
T_OF_TWO = 12.7062  # Student's t of two seeds, as tables print it: 97.5 %, one degree of freedom
ALL = plans.ARMS | plans.ABLATIONS


class Near(InProcess):
    """Scores without a process, one a stage; the stages done again below have their own."""

    def __init__(self, task, time_limit):
        super().__init__(task)

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        pass


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of the three arms, and one of the ablations."""
    root = tmp_path_factory.mktemp("experiment") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bridge.tasks.Scorer", Near)
        run.run_seed(root / "search" / "seed-0", TOY, 0, ALL)
        run.run_seed(root / "search" / "seed-1", TOY, 1, plans.ARMS)
    return root


def test_each_arm_is_what_it_is_called(runs):
    here = runs / "search" / "seed-0"
    configs = {name: here / f"{name}-grpo/final/config.json" for name in ALL}
    settings = {name: json.loads(path.read_text()).get("bridge") for name, path in configs.items()}
    assert settings["rlvr"] is None and settings["pmatch"]["kind"] == "mlp"
    for name, found in settings.items():
        if name not in ("rlvr", "pmatch"):
            assert found["kind"] == "attention", name
            assert found["layers"] == ([0] if name == "half-layers" else [0, 1]), name
    warmed = {name for name in ALL if (here / f"{name}-warm").exists()}
    assert warmed == ALL.keys() - {"rlvr", "no-warmup"}
    finals = [(here / f"{name}-grpo/final/model.safetensors").read_bytes() for name in ALL]
    assert len(set(finals)) == len(ALL)  # what is changed in an ablation changes what is learnt


def test_a_stage_that_is_gone_is_done_again_with_the_same_bytes(runs, tmp_path):
    here = tmp_path / "moved"  # a seed that is done may be moved
    shutil.copytree(runs / "search" / "seed-0", here)
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    run.run_seed(here, TOY, 0, ALL)
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before
    for gone in ("bridge-grpo", "bridge-test", "rlvr-test", "cut-gradients-warm/final"):
        shutil.rmtree(here / gone)
    for gone in ("bridge.json", "rlvr.json"):
        (here / gone).unlink()
    config = here / "cut-gradients-warm/config.toml"
    config.write_text(config.read_text().replace(str(runs / "search" / "seed-0"), str(here)))
    run.run_seed(here, TOY, 0, ALL)
    stay = ("bridge.json", "rlvr.json", "bridge-grpo/final/model.safetensors",
            "cut-gradients-warm/final/model.safetensors", "rlvr-test/results.jsonl")  # fmt: skip
    for name in stay:
        assert (here / name).read_bytes() == before[here / name], name


def test_another_plan_is_refused(runs):
    with pytest.raises(BridgeError, match=r"plan\.json: steps is 2, and now 3"):
        run.run_seed(runs / "search" / "seed-0", replace(TOY, steps=3), 0, ALL)


def test_the_report_says_what_the_runs_hold(runs, tmp_path):
    out = tmp_path / "results"
    report.write_report(runs, out)
    names = ["search-curves.json", "search-tau.png", "search-training.png", "search-widths.png",
             "search.json", "tables.md"]  # fmt: skip
    assert sorted(path.name for path in out.iterdir()) == names
    for name in names:
        if name.endswith("png"):
            assert (out / name).stat().st_size < 150_000
    found = json.loads((out / "search.json").read_text())
    each = {arm: [_accuracy(runs, seed, arm, 4) for seed in (0, 1)] for arm in ("bridge", "pmatch")}
    for arm, values in each.items():
        said = found["arms"][arm]["widths"]["4"]["pass@1"]
        assert said["each"] == pytest.approx(values, abs=1e-6)
        half = T_OF_TWO * np.std(values, ddof=1) / np.sqrt(2)
        bounds = np.mean(values) - half, np.mean(values) + half
        assert (said["low"], said["high"]) == pytest.approx(bounds, abs=1e-5)
    apart = np.subtract(each["bridge"], each["pmatch"])
    said = found["differences"]["bridge - pmatch"]["4"]["pass@1"]
    half = T_OF_TWO * np.std(apart, ddof=1) / np.sqrt(2)
    assert (said["low"], said["high"]) == pytest.approx(
        (apart.mean() - half, apart.mean() + half), abs=1e-5
    )
    text = (out / "tables.md").read_text()
    assert f" {100 * apart.mean():+.1f} ± {100 * half:.1f} |" in text
    assert "### Ablations" in text and "seeds 0." in text
    assert found["arms"]["no-warmup"]["seeds"] == [0]
    curves = json.loads((out / "search-curves.json").read_text())
    assert len(curves["arms"]["rlvr"]["1"]["reward_mean"]) == 1  # two steps are less than a point
    again = tmp_path / "again"
    report.write_report(runs, again)
    assert all((out / name).read_bytes() == (again / name).read_bytes() for name in names)


def test_what_is_changed_is_told_beside_what_is_not(runs, tmp_path):
    root = tmp_path / "runs"
    for task, seeds in (("search", (0, 1)), ("search-width-4", (1,))):
        for seed in seeds:
            shutil.copytree(runs / f"search/seed-{seed}", root / task / f"seed-{seed}")
    report.write_report(root, tmp_path / "results")
    assert (tmp_path / "results/search-width-4.json").exists()
    assert not (tmp_path / "results/search-width-4-curves.json").exists()
    text = (tmp_path / "results/tables.md").read_text()
    _, changed = text.split("## search, with one thing changed")
    before, after = changed.split("### Trained at width 4, in twice as many groups; seeds 1")
    # The toy has nothing changed: the same seed says the same, and the other is not in it.
    assert before.split("seeds 1")[1].strip() == after.strip()
    assert f"| Bridge | {100 * _accuracy(runs, 1, 'bridge', 1):.1f} [" in after


@pytest.mark.parametrize("name", plans.CHANGED)
def test_a_changed_plan_fits_its_context(name):
    """What a demonstration says, with its end, is no longer than a response may be."""
    plan = plans.CHANGED[name]
    assert name in report.CHANGES and plan != plans.PLANS["search"]
    task, rng = find_task(plan.task, **plan.options, seed=0), np.random.default_rng(0)
    for i in range(20):
        problem = task.problem("train", i)
        said = task.demonstrate(problem, rng=rng, **plan.demonstration)
        assert len(said.split()) + 1 == plan.new_tokens
        assert len(problem.prompt.split()) + plan.new_tokens <= plan.size.context


def _accuracy(runs, seed, arm, width):
    """From the responses themselves."""
    lines = (runs / f"search/seed-{seed}/{arm}-test/results.jsonl").read_text().splitlines()
    groups = [json.loads(line) for line in lines]
    scores = [row["score"] for group in groups if group["width"] == width for row in group["rows"]]
    assert len(scores) == 8 * width
    return np.mean(scores)


def test_a_report_of_nothing_is_refused(tmp_path):
    with pytest.raises(BridgeError, match="no arm is done"):
        collect.collect(tmp_path)


def _cells(rng, R=5, S=3, H=2, d=4):
    """Rows of two groups, in any order, that are not all active everywhere."""
    qkv = torch.tensor(rng.normal(size=(R, S, 3 * H * d)), requires_grad=True)
    groups, active = np.array([1, 0, 1, 1, 0]), torch.ones(R, S, dtype=torch.bool)
    active[0, 2] = active[4, 1] = active[2, 1] = False
    return qkv, H, groups, Grid.of(groups, "cpu"), active


def test_a_row_excluded_from_what_it_reads_reads_the_others():
    qkv, H, groups, grid, active = _cells(np.random.default_rng(0))
    y = ablations.read(qkv.chunk(3, -1), H, grid, active, "self-excluded").detach().numpy()
    q, k, v = qkv.detach().numpy().reshape(5, 3, 3, H, 4).transpose(2, 0, 1, 3, 4)
    for b, s, n in np.argwhere(np.broadcast_to(active.numpy()[..., None], (5, 3, H))):
        read = [o for o in range(5) if groups[o] == groups[b] and o != b and active[o, s]] or [b]
        score = np.array([q[b, s, n] @ k[o, s, n] / 2 for o in read])
        p = np.exp(score) / np.exp(score).sum()
        expected = sum(w * v[o, s, n] for w, o in zip(p, read, strict=True))
        np.testing.assert_allclose(y[b, s, 4 * n : 4 * n + 4], expected, rtol=1e-12)


def test_cut_gradients_are_the_same_numbers_and_stay_in_their_row():
    qkv, H, _, grid, active = _cells(np.random.default_rng(1))
    y = ablations.read(qkv.chunk(3, -1), H, grid, active, "cut-gradients")
    whole = mix(qkv.chunk(3, -1), H, grid, active)
    there = active.numpy()
    np.testing.assert_allclose(y.detach()[there], whole.detach()[there], rtol=1e-12)
    for mixed, alone in ((y, True), (whole, False)):
        [gradient] = torch.autograd.grad(mixed[3].square().sum(), qkv, retain_graph=True)
        others = gradient[[0, 2]][active[[0, 2]]]
        assert (others.abs().max() == 0) == alone and gradient[3].abs().min() > 0
    # What a row's own query, key and value do to it is as always.
    own = [torch.autograd.grad(m[3].square().sum(), qkv, retain_graph=True)[0][3]
           for m in (y, whole)]  # fmt: skip
    np.testing.assert_allclose(*own, rtol=1e-10)


@pytest.mark.parametrize("mixing", ["self-excluded", "cut-gradients"])
def test_decoding_says_what_training_learns_from(runs, mixing):
    """In an ablation as without one; and outside of it nothing is changed."""
    place = runs / "search/seed-0" / f"{mixing}-grpo" / "final"
    model = bridge.load(place, backend="torch", dtype="float64")
    prompt, said = model.encode("3 + 4 = 2 ?"), [[9, 3, 11, 0], [5, 0], [10, 4, 12, 13, 5, 0]]
    batch = make_batch([Group(prompt, said)])
    usual = model.implementation.logprobs(batch)
    with ablations.changed(mixing):
        found = model.implementation.logprobs(batch)
        decoded = decoder_logprobs(model, prompt, said, 1.0)
        plain = bridge.load(place, backend="torch").implementation
        assert plain.prefill([np.array(prompt)], [3], 4).forward is step
    for row, values in enumerate(decoded):
        np.testing.assert_allclose(found[row][batch.target_mask[row]], values, rtol=1e-9)
    assert np.array_equal(model.implementation.logprobs(batch), usual)
    differs = np.abs(found - usual).max() > 1e-6
    assert differs == (mixing == "self-excluded")
