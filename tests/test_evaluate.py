"""Evaluations: what they find, that interruptions change nothing, what they refuse, comparisons."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from string import ascii_letters, digits

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import bridge
from bridge.checkpoints.initialise import init
from bridge.errors import BridgeError
from bridge.evaluation.batches import Decoding
from bridge.evaluation.evaluate import evaluate
from bridge.evaluation.records import RESULTS, SETTINGS, Group, Row
from bridge.evaluation.summary import Evaluation, compare, summarise, values
from bridge.evaluation.voting import majority
from tests.tiny_host import write_host
from tests.toy_task import Score, ToyScorer, ToyTask

SHORT = Decoding(max_new_tokens=4, seed=5)
WIDTHS = (1, 2, 4)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A host, a Bridge model whose blocks do something, and a P-Match model that does too."""
    out = tmp_path_factory.mktemp("models")
    write_host(out / "host")
    for name, kind, layer in (("bridge", "attention", "o_proj"), ("mlp", "mlp", "down_proj")):
        init(out / "host", out / name, heads=2, head_dim=4, kind=kind)
        tensors = load_file(out / name / "model.safetensors")
        rng = np.random.default_rng(1)
        for tensor in tensors:
            if tensor.endswith(f"bridge.{layer}.weight"):
                tensors[tensor] = rng.normal(size=tensors[tensor].shape).astype(np.float32)
        save_file(tensors, out / name / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def model(paths):
    return bridge.load(paths / "bridge", backend="numpy")


@pytest.fixture(scope="module")
def host(paths):
    return bridge.load(paths / "host", backend="numpy")


def run(model, directory=None, task=None, scorer=None, **options):
    """A small evaluation: 12 problems, in batches of 8 rows."""
    task = task or ToyTask()
    options = {"widths": WIDTHS, "decoding": SHORT, "max_rows": 8, **options}
    scorer = scorer or ToyScorer(task)
    return evaluate(model, task, directory=directory, scorer=scorer, **options)


def test_groups_are_what_the_model_says_to_each_problem(model):
    task = ToyTask()
    found = run(model, groups=2)
    assert len(found.found) == len(WIDTHS) * 12 * 2
    for (width, number, g), group in found.found.items():
        [answers] = model.generate(
            task.problem("test", number).prompt,
            width=width,
            max_new_tokens=4,
            seed=5,
            prompt_ids=[number + (g << 20)],
        )
        assert [row.text for row in group.rows] == [r.text for r in answers.responses]
        assert [row.tokens for row in group.rows] == [len(r.tokens) for r in answers.responses]
        for row in group.rows:
            assert row.answer == task.read_answer(row.text)
            assert row.score == task.score(task.problem("test", number), row.text)
    said = [[r.text for p in found.problems for r in found.found[4, p, g].rows] for g in (0, 1)]
    assert said[0] != said[1]  # each group draws for itself


def test_values_are_what_groups_came_to(model):
    found = run(model, groups=2)
    for width in WIDTHS:
        got = values(found, width)
        for i, number in enumerate(found.problems):
            groups = [found.found[width, number, g].rows for g in (0, 1)]
            right = [[row.score == 1 for row in rows] for rows in groups]
            assert got["pass@1"][i] == np.mean(right)
            assert got["coverage"][i] == np.mean([any(r) for r in right])
            assert got["gpass@1.0"][i] == np.mean([all(r) for r in right])
            assert got["gpass@0.5"][i] == np.mean([2 * sum(r) >= max(width, 2) for r in right])
            assert got["best"][i] == got["coverage"][i]  # scores are 0 and 1
            for j, share in enumerate(got["curve"][:, i], 1):
                assert share == np.mean([sum(r) >= j for r in right])
            votes = [
                majority([f"The answer is {row.answer}." if row.answer else "" for row in rows])
                for rows in groups
            ]
            if not any(vote.tied for vote in votes):
                won = np.mean([vote.answer == str(number % 3) for vote in votes])
                assert got["majority"][i] == won
    assert {0 < got["pass@1"].mean() < 1, got["coverage"].mean() > got["pass@1"].mean()} == {True}


def test_rows_that_cannot_see_each_other_are_decoded_once(paths, host):
    pmatch = bridge.load(paths / "mlp", backend="numpy")
    for independent in (host, pmatch):
        found = run(independent)
        assert found.independent and found.decoded == (4,)
        assert {width for width, _, _ in found.found} == {4}
        one, four = values(found, 1), values(found, 4)
        assert (one["pass@1"] == four["pass@1"]).all()
        np.testing.assert_allclose(one["coverage"], one["pass@1"], atol=1e-15)
        # What its own rows say at width 1 is the first row at width 4.
        alone = run(independent, widths=(1,))
        for number in found.problems:
            assert alone.found[1, number, 0].rows == found.found[4, number, 0].rows[:1]


def test_blocks_make_rows_depend_on_their_width(model):
    found = run(model)
    assert not found.independent
    first = [found.found[width, p, 0].rows[0].text for p in found.problems for width in WIDTHS]
    assert len(set(first)) > len(found.problems)


# Interruptions


def bytes_of(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_what_is_there_is_not_done_again(model, tmp_path):
    first = run(model, tmp_path / "out")
    before, task = bytes_of(tmp_path / "out"), ToyTask()
    scorer = ToyScorer(task)
    again = run(model, tmp_path / "out", task=task, scorer=scorer)
    assert scorer.batches == [] and bytes_of(tmp_path / "out") == before
    assert again == first == run(model)  # nor does a directory change what is found


@pytest.mark.parametrize(("backend", "cuts", "part"), [("numpy", 8, 2), ("torch", 2, 8)])
def test_a_file_cut_anywhere_is_completed_to_the_same_bytes(
    paths, tmp_path, monkeypatch, backend, cuts, part
):
    monkeypatch.setattr("bridge.evaluation.batches.PART", part)
    model, first = bridge.load(paths / "bridge", backend=backend), ToyScorer(ToyTask())
    # Rows end at their own times, and others come then.
    uneven = replace(SHORT, max_new_tokens=7, stop=tuple(ascii_letters + digits))
    found = run(model, tmp_path / "whole", scorer=first, decoding=uneven)
    assert {row.finish_reason for g in found.found.values() for row in g.rows} >= {"stop", "length"}
    whole = bytes_of(tmp_path / "whole")
    size = len(whole[RESULTS])
    for cut in (0, size - 1, *np.random.default_rng(0).integers(1, size, cuts).tolist()):
        out, second = tmp_path / f"cut{cut}", ToyScorer(ToyTask())
        out.mkdir()
        (out / SETTINGS).write_bytes(whole[SETTINGS])
        (out / RESULTS).write_bytes(whole[RESULTS][:cut])
        run(model, out, scorer=second, decoding=uneven)
        assert bytes_of(out) == whole
        # Batches are cut as before, whatever is left of them: others would be rounded otherwise.
        assert second.batches and second.batches == first.batches[-len(second.batches) :]


def test_a_part_is_decoded_as_a_whole_whatever_is_known_of_it(model, tmp_path, monkeypatch):
    """Else the same rows would not be computed together, and be rounded otherwise."""
    monkeypatch.setattr("bridge.evaluation.batches.PART", 2)
    read = []

    def prefill(prompts, *arguments, original=model.implementation.prefill, **options):
        read.append(options["prompt_ids"])
        return original(prompts, *arguments, **options)

    monkeypatch.setattr(model.implementation, "prefill", prefill)
    run(model, tmp_path / "out", widths=(4,))
    # Rows of such short answers end together, so none comes while others are there.
    assert read == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    results = tmp_path / "out" / RESULTS
    whole = results.read_bytes()
    lines = whole.splitlines(keepends=True)
    read.clear()
    results.write_bytes(b"".join(lines[:7]))
    run(model, tmp_path / "out", widths=(4,))
    assert read == [[4, 5], [6, 7], [8, 9], [10, 11]] and results.read_bytes() == whole


PROGRAM = """
import sys
from pathlib import Path
from string import ascii_letters, digits
import bridge
from bridge.evaluation.batches import Decoding
from bridge.evaluation.evaluate import evaluate
from tests.toy_task import ToyScorer, ToyTask
task = ToyTask()
evaluate(bridge.load(sys.argv[1], backend="numpy"), task, widths=(1, 2, 4), max_rows=8,
         decoding=Decoding(max_new_tokens=4, seed=5), directory=Path(sys.argv[2]),
         scorer=ToyScorer(task, kill_at=int(sys.argv[3])))
"""


def test_a_killed_evaluation_goes_on_where_it_stopped(model, paths, tmp_path):
    run(model, tmp_path / "whole")
    out = tmp_path / "killed"
    command = [sys.executable, "-c", PROGRAM, str(paths / "bridge"), str(out), "3"]
    lines = []
    for _ in range(3):  # each gets three batches further
        done = subprocess.run(command, cwd=Path(__file__).parent.parent)
        assert done.returncode == -signal.SIGKILL
        lines.append((out / RESULTS).read_bytes().count(b"\n"))
    # Of width 1 two batches hold 8 and 4 problems; of width 2 three hold 4, of width 4 six hold 2.
    assert lines == [16, 26, 32]
    scorer = ToyScorer(ToyTask())
    run(model, out, scorer=scorer)
    assert len(scorer.batches) == 2
    assert bytes_of(out) == bytes_of(tmp_path / "whole")


def test_widths_problems_and_groups_may_grow(model, tmp_path):
    task = ToyTask()
    scorer = ToyScorer(task)
    run(model, tmp_path / "out", task, scorer, widths=(2,), problems=4)
    grown = run(model, tmp_path / "out", task, scorer, problems=12, groups=2)
    want = run(model, problems=12, groups=2)
    assert grown.found.keys() == want.found.keys()
    texts = [
        [[row.text for row in e.found[key].rows] for key in sorted(e.found)] for e in (grown, want)
    ]
    assert texts[0] == texts[1]  # draws do not depend on what is evaluated beside them
    fewer = run(model, tmp_path / "out", widths=(1,), problems=3)
    assert fewer.problems == (0, 1, 2) and summarise(fewer)[0].metrics["pass@1"]


def test_progress_counts_to_the_end(model, tmp_path):
    seen = []
    run(model, tmp_path / "out", progress=seen.append)
    assert [p for p in seen if p.width == 4][-1].done == 12
    assert all(p.of == 12 for p in seen)
    for width in WIDTHS:
        done = [p.done for p in seen if p.width == width]
        assert done == sorted(done) and done[-1] == 12
    total = sum(
        row["tokens"]
        for line in (tmp_path / "out" / RESULTS).read_text().splitlines()
        for row in json.loads(line)["rows"]
    )
    assert seen[-1].tokens == total
    again = []
    run(model, tmp_path / "out", progress=again.append)
    assert [(p.width, p.done, p.accuracy) for p in again] == [
        (width, 12, [p for p in seen if p.width == width][-1].accuracy) for width in WIDTHS
    ]


# What is refused


def refused(model, named, directory=None, **options):
    with pytest.raises(BridgeError) as caught:
        run(model, directory, **options)
    message = str(caught.value)
    assert named in message and "\n" not in message


@pytest.mark.parametrize(
    ("named", "options"),
    [
        ("width must be 1", {"widths": ()}),
        ("width must be 1", {"widths": (0, 2)}),
        ("groups must be in 1..4096, not 0", {"groups": 0}),
        ("problems must be in 1..12", {"problems": 13}),
        ("problems must be 1 or above", {"problems": 0}),
        ("max_rows must be 1", {"max_rows": 0}),
        ("temperature must be 0", {"decoding": replace(SHORT, temperature=-1.0)}),
        ("max_new_tokens must be 1", {"decoding": replace(SHORT, max_new_tokens=0)}),
        ("stop must hold", {"decoding": replace(SHORT, stop=("",))}),
        ("problem 11 of test has 23 tokens", {"decoding": replace(SHORT, max_new_tokens=199_996)}),
        ("problem 0 of test is empty", {"task": ToyTask(ask=" ")}),
    ],
)
def test_bad_requests_are_refused_before_anything_is_written(model, tmp_path, named, options):
    refused(model, named, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_directory_of_something_else_is_refused_and_left_alone(model, tmp_path):
    run(model, tmp_path / "out", widths=(1,), problems=2)
    before = bytes_of(tmp_path / "out")
    for named, options in (
        ("seed is 5, and now 6", {"decoding": replace(SHORT, seed=6)}),
        ("split is 'test', and now 'validation'", {"split": "validation"}),
        ("model is '', and now 'other'", {"name": "other"}),
        ("problem 0 of test was another one", {"task": ToyTask(ask="why {}?")}),
    ):
        refused(model, named, tmp_path / "out", **options)
        assert bytes_of(tmp_path / "out") == before
    refused(model, "cannot be written (No such file", tmp_path / "no" / "where")
    (tmp_path / "file").write_text("mine")
    refused(model, "cannot be written (File exists)", tmp_path / "file")


def test_damage_is_named_by_its_line(model, tmp_path):
    out = tmp_path / "out"
    run(model, out, widths=(2,), problems=3)
    first, second, third = (out / RESULTS).read_text().splitlines(keepends=True)
    row = json.loads(second)["rows"][0]["score"]
    for lines, named in (
        ([first, "{}\n", third], "line 2: is damaged"),
        ([first, second.replace(f'"score": {row}', '"score": NaN', 1)], "line 2: is damaged"),
        ([first, second.replace('"width": 2', '"width": 3')], "line 2: is damaged"),
        ([first, second, first], "line 3: is there twice"),
    ):
        (out / RESULTS).write_text("".join(lines))
        refused(model, named, out, widths=(2,), problems=3)
    (out / RESULTS).write_text(first)
    (out / SETTINGS).write_text("[")
    refused(model, "settings.json: is damaged", out, widths=(2,))
    (out / SETTINGS).unlink()
    refused(model, "settings.json: is missing", out, widths=(2,))


def test_two_cannot_write_to_one_directory(model, tmp_path):
    class Second(ToyScorer):
        def score(self, pairs):
            refused(model, "another evaluation is writing here", tmp_path / "out", widths=(1,))
            return super().score(pairs)

    task = ToyTask()
    run(model, tmp_path / "out", task, Second(task), widths=(1,), problems=2)
    assert (tmp_path / "out" / RESULTS).read_text().count("\n") == 2


def test_a_full_disk_is_one_line_and_nothing_is_lost(model, tmp_path, monkeypatch):
    out, write = tmp_path / "out", os.write
    written = []

    def full(descriptor, data):
        if len(written) == 2:  # the second batch gets half of its bytes in
            raise OSError(28, "No space left on device")
        written.append(data)
        return write(descriptor, data[: len(data) // 2] if len(written) == 2 else data)

    monkeypatch.setattr("bridge.evaluation.records.os.write", full)
    refused(model, "results.jsonl: cannot be written (No space left", out)
    monkeypatch.undo()
    run(model, out)
    run(model, tmp_path / "whole")
    assert bytes_of(out) == bytes_of(tmp_path / "whole")


def test_what_could_not_be_scored_counts_nothing_and_is_said(model):
    class Troubled(ToyScorer):
        def score(self, pairs):
            return [Score(0.0, "took longer than 10 s")] * len(pairs)

    found = run(model, scorer=Troubled(ToyTask()), widths=(2,), problems=3)
    assert found.troubles() == ["took longer than 10 s"] * 6
    assert summarise(found)[0].metrics["pass@1"].mean == 0


# Figures and comparisons


def made(rows, independent=False, asked=("p", "q"), width=2):
    """An evaluation from the scores and answers of each problem's groups."""
    found = {
        (width, p, g): Group(width, p, g, "", tuple(Row("", 3, "eos", a, s) for s, a in pairs))
        for p, groups in enumerate(rows)
        for g, pairs in enumerate(groups)
    }
    settings = {"task": "toy", "split": "test"}
    problems = tuple(range(len(rows)))
    widths = (1, width) if independent else (width,)
    return Evaluation(settings, widths, problems, len(rows[0]), 1.0, independent, asked, found)


def test_a_percentage_votes_with_the_number_that_other_rows_give_for_it():
    rows = [[[(1.0, "25"), (0.0, "3"), (0.0, "3"), (1.0, "25%"), (1.0, "25%")]]]
    assert values(made(rows, width=5), 5)["majority"].tolist() == [1]


def test_figures_by_hand():
    rows = [
        [[(1.0, "a"), (0.0, "b")], [(1.0, "a"), (1.0, "a")]],
        [[(0.0, None), (0.5, "c")], [(0.0, None), (0.0, None)]],
    ]
    groups = values(made(rows), 2)
    assert groups["pass@1"].tolist() == [0.75, 0]
    assert groups["coverage"].tolist() == [1, 0]
    assert groups["majority"].tolist() == [0.75, 0]  # a tie of a and b, then a
    assert groups["gpass@1.0"].tolist() == [0.5, 0]
    assert groups["best"].tolist() == [1, 0.25]
    assert groups["no_answer"].tolist() == [0, 0.75]
    # The same rows, had they been independent: pairs out of three a and one b.
    pool = values(made(rows, independent=True), 2)
    assert pool["pass@1"].tolist() == [0.75, 0]
    assert pool["coverage"].tolist() == [1, 0]
    assert pool["gpass@1.0"].tolist() == [0.5, 0]
    assert pool["majority"].tolist() == [0.75, 0]
    assert pool["best"].tolist() == [1, 0.25]
    one = values(made(rows, independent=True), 1)
    assert one["coverage"].tolist() == [0.75, 0]


def test_a_comparison_is_paired_and_needs_the_same_problems(model, host):
    ours, theirs = run(model), run(host)
    [one, two, four] = compare(ours, theirs)
    assert [f.width for f in (one, two, four)] == list(WIDTHS)
    got = values(ours, 4)["coverage"] - values(theirs, 4)["coverage"]
    assert four.metrics["coverage"].mean == pytest.approx(got.mean(), abs=1e-15)
    assert four.metrics["coverage"].low <= got.mean() <= four.metrics["coverage"].high
    assert all(not i.excludes_zero for f in compare(ours, ours) for i in f.metrics.values())
    other = run(host, task=ToyTask(ask="why {}?"))
    with pytest.raises(BridgeError, match="other problems"):
        compare(ours, other)
    assert json.loads(json.dumps(four.to_json()))["curve"][0] == asdict(four.curve[0])


@pytest.mark.parametrize(
    ("method", "gives", "said"),
    [
        ("size", lambda _: 1 / 0, "size of test fails (ZeroDivisionError: division by zero)"),
        ("problem", lambda *_: {}["x"], "problem 0 of test fails (KeyError: 'x')"),
        ("problem", lambda *_: ("how?", "so"), "problem 0 of test fails (AttributeError: "),
        ("read_answer", lambda _: sys.exit(), "a response to problem 0 fails (SystemExit)"),
        ("read_answer", lambda _: "a".index("b"), "read_answer of a response to problem 0 fails ("),
        ("read_answer", lambda _: [], "[], which is neither a text nor None); mend the task"),
    ],
)
def test_a_task_that_raises_is_named(model, tmp_path, monkeypatch, method, gives, said):
    task = ToyTask()
    scorer = ToyScorer(ToyTask())
    monkeypatch.setattr(task, method, gives)
    with pytest.raises(BridgeError) as error:
        run(model, tmp_path / "out", task, scorer)
    assert str(error.value).startswith("task toy: ") and said in str(error.value)
    assert "\n" not in str(error.value)
