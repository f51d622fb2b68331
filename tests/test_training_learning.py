"""What a step computes, on tiny models: rollouts and training agree, and reward rises."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from training_toys import Graded, InProcess, Nasty, Sums, computed

import bridge
from bridge.contract import GRPO
from bridge.errors import BridgeError
from bridge.tasks import Score
from bridge.training import GRPOSettings, SFTSettings, grpo, rollouts, train
from bridge.training.batches import Group, make_batch, pack
from bridge.training.log import read_log
from bridge.training.rollouts import decoder_logprobs, generate, roll_out
from bridge.training.schedule import ROLLOUTS, problem_number, stream_seed
from bridge.training.sft import Correct, deal
from bridge.training.watch import Silent
from bridge_conformance.tolerance import allowance, error

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def settings(toy_model, tmp_path):
    return GRPOSettings(
        checkpoint=str(toy_model),
        out=str(tmp_path / "run"),
        task="sums",
        backend="torch",
        steps=2,
        problems=4,
        width=4,
        max_new_tokens=5,
        eval_every=0,
        gap_every=1,
    )


def run(settings, task=None, scorer=None):
    """Train within this process; the result and the records of the steps."""
    task = task or Sums()
    result = train(settings, task=task, scorer=scorer or InProcess(task))
    records = read_log(Path(result.out) / "log.jsonl")
    return result, [r for r in records if r["kind"] == "step"]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("backend", ["numpy", "torch", "jax", "mlx"])
def test_a_rollouts_batch_is_what_the_decoder_saw(toy_model, settings, backend, temperature):
    """Rows end at different times here: at EOS and at the limit. Teacher forcing the batch gives
    the decoder's log-probabilities up to rounding, and those of a batch with one active cell too
    many do not."""
    loaded = bridge.load(toy_model, backend=backend, dtype="float32")
    settings = replace(settings, temperature=temperature)
    problems = [Sums().problem("train", n) for n in range(6)]
    rolled = roll_out(loaded, InProcess(Sums()), problems, settings, 5)
    lengths = {len(tokens) for rollout in rolled for tokens in rollout.tokens}
    assert len(lengths) > 2
    wide, narrow = (
        bridge.load(toy_model, backend="numpy", dtype=d) for d in ("float64", "float32")
    )
    caught = 0
    for rollout in rolled:
        batch = make_batch([Group(rollout.prompt, rollout.tokens)])
        exact, own, trained, wrong = (
            m.logprobs(b, temperature)[batch.target_mask]
            for m, b in (
                *((m, batch) for m in (wide, narrow, loaded)),
                (loaded, with_last_token_fed(batch)),
            )
        )
        decoded = decoder_logprobs(loaded, rollout.prompt, rollout.tokens, temperature)
        allowed = allowance(exact, own, "float32")  # clause 10.2, of each of the two
        assert error(trained, exact) <= allowed
        assert error(np.concatenate(decoded), exact) <= allowed
        caught += error(wrong, exact) > allowed
    assert caught > 2


def with_last_token_fed(batch):
    """The mistake that clause 2.3 warns of: each row's last token is fed, where there is room."""
    active = batch.active.copy()
    tokens = batch.tokens.copy()
    for row, end in enumerate(batch.active.sum(1)):
        if end < batch.tokens.shape[1]:
            active[row, end], tokens[row, end] = True, batch.targets[row, end - 1]
    return replace(batch, active=active, tokens=tokens)


class Sevens(Sums):
    """A task without a prompt's help: say 7 as often as you can."""

    def score(self, problem, response):
        return response.count("7") / 3


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_reward_rises(settings, backend):
    task = Sevens()
    settings = replace(settings, backend=backend, steps=20, width=8, max_new_tokens=3, lr=3e-2)
    _, steps = run(settings, task)
    rewards = [step["reward_mean"] for step in steps]
    assert np.mean(rewards[:4]) < 0.25 and np.mean(rewards[-4:]) > 0.75


@pytest.mark.parametrize("backend", ["numpy", "torch", "jax", "mlx"])
def test_every_backend_runs_the_same_loop(settings, backend):
    """The same draws, so the same rewards before the first update, whatever the backend."""
    more = {"backend": backend, "dtype": "float32", "beta": 0.1, "minibatches": 2, "lr": 1e-2}
    result, steps = run(replace(settings, **more, eval_every=2, eval_problems=3), Graded())
    reference = bridge.load(settings.checkpoint, backend="numpy")
    problems = [Graded().problem("train", problem_number(80, 0, i)) for i in range(4)]
    sets = generate(reference, [p.prompt for p in problems], settings, stream_seed(0, ROLLOUTS, 0))
    rewards = [
        Graded().score(problem, response.text)
        for problem, answers in zip(problems, sets, strict=True)
        for response in answers.responses
    ]
    assert steps[0]["reward_mean"] == np.mean(rewards) > 0
    assert steps[1]["grad_norm"] > 0 and result.best is not None
    read = bridge.load(result.final, backend="numpy").implementation.tensors()
    before = dict(bridge.load(settings.checkpoint, backend="numpy").implementation.tensors())
    assert all((tensor != before[name]).any() for name, tensor in read)


def test_the_same_settings_give_the_same_weights_and_another_seed_others(settings, tmp_path):
    def weights(seed, out):
        run(replace(settings, seed=seed, out=str(tmp_path / out)))
        return (tmp_path / out / "final" / "model.safetensors").read_bytes()

    one = weights(0, "a")
    assert one == weights(0, "b") and one != weights(1, "c")


def test_problems_and_draws_are_of_seed_and_step_alone(settings, monkeypatch):
    steps, evaluations = [], []

    def hear(into, function):
        def heard(model, scorer, problems, settings, seed, **options):
            into.append(([p.number for p in problems], seed))
            return function(model, scorer, problems, settings, seed, **options)

        return heard

    for module, into in ((grpo, steps), (rollouts, evaluations)):
        monkeypatch.setattr(module, "roll_out", hear(into, module.roll_out))
    run(replace(settings, steps=21, seed=5, eval_every=7, eval_problems=3))
    numbers = [number for step, _ in steps for number in step]
    assert numbers == [problem_number(80, 5, i) for i in range(84)]
    assert sorted(numbers[:80]) == list(range(80))
    assert [seed for _, seed in steps] == [stream_seed(5, ROLLOUTS, i) for i in range(21)]
    assert len(evaluations) == 4 and len({str(one) for one in evaluations}) == 1


def test_without_blocks_the_host_alone_is_trained(toy_model, settings):
    host = toy_model.parent / f"{toy_model.name}-host"
    result, steps = run(replace(settings, checkpoint=str(host), lr=1e-2))
    assert len(steps) == 2 and "norm_ratio" not in steps[0]
    assert bridge.load(result.final, backend="numpy").config.bridge is None


def test_sampled_rows_teach_by_their_own_log_probabilities(settings):
    """Where a step has one update `old` is left out, and with more it is what the model said
    before the first: then rho is 1 in the first update, and nothing is clipped there."""
    seen = []
    original = bridge.training.loop.Run.update

    def hear(self, step, batches, lr):
        if batches[0].old_logprobs is not None and not seen:
            again = self.model.logprobs(batches[0], self.settings.temperature)
            seen.append(np.abs(again - batches[0].old_logprobs).max())
        seen.append(len(batches))
        return original(self, step, batches, lr)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bridge.training.loop.Run, "update", hear)
        run(replace(settings, minibatches=2, epochs=2, steps=1, temperature=0.8))
    assert seen[0] == 0.0 and seen[1:] == [1, 1, 1, 1]


def test_micro_batches_change_nothing_but_rounding(settings, tmp_path):
    def figures(dtype, budget):
        out = str(tmp_path / f"{dtype}{budget}")
        _, [step] = run(replace(settings, out=out, dtype=dtype, micro_batch_tokens=budget, steps=1))
        return np.array([step["loss"], step["entropy"], step["grad_norm"]])

    exact, own = figures("float64", 32768), figures("float32", 32768)
    assert error(figures("float64", 60), exact) <= allowance(exact, own, "float64")


def test_equal_rewards_are_dropped_and_counted(settings):
    class Bored(Sums):
        def score(self, problem, response):
            return 0.5

    result, steps = run(replace(settings, drop_equal=True), Bored())
    assert [s["dropped_groups"] for s in steps] == [4, 4]
    assert [s["updates"] for s in steps] == [0, 0] and "loss" not in steps[0]
    before = bridge.load(settings.checkpoint, backend="numpy").implementation.tensors()
    after = dict(bridge.load(result.final, backend="numpy").implementation.tensors())
    assert all(np.array_equal(tensor, after[name]) for name, tensor in before)


def test_the_kl_is_to_the_model_at_the_start(settings):
    """It is 0 before the first update, and above 0 after it; without beta it is not computed."""
    _, steps = run(replace(settings, beta=0.5, lr=1e-2))
    assert abs(steps[0]["kl"]) < 1e-9 < 1e-6 < steps[1]["kl"]
    _, steps = run(replace(settings, out=settings.out + "2"))
    assert "kl" not in steps[0]


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("trainable", [("all",), ("bridge",)])
def test_the_policy_at_the_start_is_the_same_model(settings, backend, trainable, monkeypatch):
    """With starting values of what is trained for a moment (clause 7.16): its log-probabilities are
    those of the checkpoint, and what goes on is what there was."""
    seen = []
    original = bridge.training.loop.Run.update

    def hear(self, step, batches, lr):
        now = dict(self.model.implementation.tensors())
        state = self.trainer.state()
        masters = {n: state[f"master.{n}"] for n in now if f"master.{n}" in state}
        seen.append((batches[0], now, masters))
        return original(self, step, batches, lr)

    monkeypatch.setattr(bridge.training.loop.Run, "update", hear)
    chosen = {"backend": backend, "dtype": "float32", "trainable": trainable, "temperature": 0.8}
    run(replace(settings, **chosen, beta=0.5, lr=1e-2), Graded())
    start = bridge.load(settings.checkpoint, backend=backend, dtype="float32")
    [_, (batch, now, masters)] = seen
    assert np.array_equal(batch.ref_logprobs, start.logprobs(batch, 0.8))
    before = dict(start.implementation.tensors())
    moved = {name for name in now if not np.array_equal(now[name], before[name])}
    assert moved and moved <= masters.keys()
    assert all(np.array_equal(now[name], master) for name, master in masters.items())


def test_a_model_is_put_back_whatever_happens_meanwhile(toy_model):
    model = bridge.load(toy_model, backend="numpy")
    before = dict(model.implementation.tensors())
    name = "model.norm.weight"
    with pytest.raises(ZeroDivisionError), model.swapped({name: 2 * before[name]}):
        assert np.array_equal(dict(model.implementation.tensors())[name], 2 * before[name])
        1 / 0  # noqa: B018
    after = dict(model.implementation.tensors())
    assert all(np.array_equal(after[name], array) for name, array in before.items())


def test_dr_grpo_leaves_std_out(settings, monkeypatch):
    seen = {}
    original = bridge.training.loop.Run.update

    def hear(self, step, batches, lr):
        seen[self.settings.normalise_std] = np.concatenate([b.advantages for b in batches])
        return original(self, step, batches, lr)

    monkeypatch.setattr(bridge.training.loop.Run, "update", hear)
    for normalise in (True, False):
        out = f"{settings.out}{normalise}"
        run(replace(settings, normalise_std=normalise, steps=1, out=out), Sevens())
    assert not np.allclose(seen[True], seen[False])
    scaled = seen[True] * seen[False] >= 0
    assert scaled.all() and np.abs(seen[False]).max() < 1


def test_rewards_that_fail_are_counted_and_cost_nothing_else(settings):
    class Failing:
        def score(self, pairs):
            bad = [Score(0.0, "raises ValueError: no"), Score(float("nan"))]
            return bad + [Score(1.0)] * (len(pairs) - 2)

    _, steps = run(settings, scorer=Failing())
    assert [s["bad_rewards"] for s in steps] == [2, 2]
    assert steps[0]["reward_mean"] == 14 / 16 and "ValueError" in steps[0]["bad_reward"]


def test_rewards_that_raise_and_hang_leave_the_run_alone(settings):
    """With the scorer's own process, as `bridge train` has it."""
    chosen = replace(settings, reward_seconds=2.0, width=2, steps=1, seed=12)
    assert [problem_number(80, 12, i) % 4 for i in range(4)] == [2, 3, 0, 1]
    train(chosen, task=Nasty())
    [step] = read_log(Path(chosen.out) / "log.jsonl")
    assert step["bad_rewards"] == 6
    assert step["bad_reward"].count("\n") == 0 and (Path(chosen.out) / "final").is_dir()


def test_figures_of_a_step(settings):
    _, steps = run(replace(settings, lr=1e-2, schedule="linear", warmup=1))
    first = steps[0]
    assert first["rows"] == 16 and first["lr"] == 1e-2 and first["updates"] == 1
    assert 0 < first["entropy"] <= np.log(13) and first["clip_fraction"] == 0
    assert 0 <= first["logprob_gap"] <= first["logprob_gap_max"] < 1
    assert {"seconds_rollout", "seconds_reward", "seconds_update"} <= first.keys()
    assert first["length_max"] <= 5 and first["tokens"] == round(16 * first["length_mean"])


def heard(monkeypatch):
    """The batches whose norm ratios are asked for, from now on."""
    batches, original = [], bridge.Model.norm_ratios

    def hear(self, batch):
        batches.append(batch)
        return original(self, batch)

    monkeypatch.setattr(bridge.Model, "norm_ratios", hear)
    return batches


@pytest.mark.parametrize("kind", ["grpo", "sft"])
@pytest.mark.parametrize("backend", ["numpy", "torch", "jax", "mlx"])
def test_norm_ratios_are_of_a_micro_batch_of_the_step(
    toy_model, settings, tmp_path, monkeypatch, backend, kind
):
    """Those of the first step are of the weights that the run starts from (clause 3.9)."""
    batches = heard(monkeypatch)
    more = {"backend": backend, "dtype": "float32", "lr": 1e-2, "norms_every": 2}
    if kind == "sft":
        task = Sums(first=True)
        settings = sft(toy_model, tmp_path, groups=4, epochs=1, micro_batch_tokens=40, **more)
    else:
        task = Graded()
        settings = replace(settings, steps=3, micro_batch_tokens=40, **more)
    _, steps = run(settings, task)
    assert len(steps) > 2 and len(batches) == (len(steps) + 1) // 2
    assert [s["step"] for s in steps if "norm_ratio" in s] == list(range(1, len(steps) + 1, 2))
    assert all(computed(batch) <= 40 for batch in batches)
    exact, own = (
        bridge.load(toy_model, backend="numpy", dtype=d).norm_ratios(batches[0])
        for d in ("float64", "float32")
    )
    got = np.array(steps[0]["norm_ratios"])
    assert got.shape == (2,) and (got > 0).all()
    assert error(got, exact) <= allowance(exact, own, "float32")
    assert steps[0]["norm_ratio"] == pytest.approx(got.mean())
    later = next(s for s in steps[1:] if "norm_ratio" in s)
    assert later["norm_ratios"] != steps[0]["norm_ratios"]


def test_norm_ratios_only_read(settings, tmp_path, monkeypatch):
    batches = heard(monkeypatch)
    finals = []
    for every in (1, 0):
        out = str(tmp_path / f"every{every}")
        result, steps = run(replace(settings, out=out, lr=1e-2, norms_every=every), Graded())
        finals.append((Path(result.final) / "model.safetensors").read_bytes())
        assert ["norm_ratios" in s for s in steps] == [bool(every)] * 2
    assert len(batches) == 2 and finals[0] == finals[1]


def sft(model, tmp_path, **more):
    common = {"checkpoint": str(model), "out": str(tmp_path / "sft"), "backend": "torch"}
    given = {"task": "sums", "problems": 40, "samples": 16, "max_new_tokens": 2, "groups": 8}
    return SFTSettings(**{**common, **given, "eval_every": 0, **more})


def test_the_warm_up_learns_from_correct_responses_alone(toy_model, tmp_path):
    settings = sft(toy_model, tmp_path, epochs=8, lr=5e-2, max_rows=64)
    result, steps = run(settings, Sums(first=True))
    losses = [np.mean([s["loss"] for s in steps if s["epoch"] == e]) for e in range(8)]
    assert losses == sorted(losses, reverse=True)
    lines = [json.loads(line) for line in (tmp_path / "sft" / "samples.jsonl").open()]
    assert len(lines) == 40
    for line in lines:
        assert line["rewards"].count(1.0) == len(line["responses"]) == len(line["tokens"])
        assert all(text.startswith(line["prompt"][0]) for text in line["responses"])
    enough = [line for line in lines if len(line["responses"]) > 1]
    assert 0 < len(enough) < 40
    assert steps[0]["rows"] <= sum(len(line["responses"]) for line in enough)
    before = bridge.load(toy_model, backend="numpy").implementation.tensors()
    after = dict(bridge.load(result.final, backend="numpy").implementation.tensors())
    for name, tensor in before:
        # All that correct rows feed here is alike: q and k, which tell rows apart, learn nothing.
        learns = ".bridge." in name and ".q_proj" not in name and ".k_proj" not in name
        assert np.array_equal(tensor, after[name]) == (not learns)


def test_groups_are_dealt_whole_and_anew():
    data = [Correct([1], [[r] for r in range(2, 2 + n)], str(n)) for n in (2, 3, 5, 8, 9)]
    settings = SFTSettings(checkpoint="c", out="o", task="t", width=4)
    epochs = [deal(data, settings, epoch) for epoch in range(3)]
    for groups in epochs:
        assert [g.name for g in groups] == ["2", "3", "5", "5", "8", "8", "9", "9", "9"]
        assert [g.rows for g in groups] == [2, 3, 3, 2, 4, 4, 3, 3, 3]
        nine = sorted(t for g in groups[-3:] for [t] in g.responses)
        assert nine == list(range(2, 11))
    assert epochs[0][-1].responses != epochs[1][-1].responses
    pairs = deal(data, replace(settings, width=2), 0)
    assert [g.rows for g in pairs if g.name == "3"] == [2]  # one sits out


def test_the_warm_up_reads_a_file(toy_model, tmp_path):
    data = tmp_path / "data.jsonl"
    lines = [
        {"prompt": "1+2=", "responses": ["3", "3"]},
        {"prompt": "2+2=", "responses": ["4"]},
        {"prompt": "2+3=", "responses": ["5", "5+", "05"]},
    ]
    data.write_text("\n".join(json.dumps(line) for line in lines))  # no newline at the end
    settings = sft(toy_model, tmp_path, task="", data=str(data), epochs=1)
    _, steps = run(settings)
    assert steps[0]["groups"] == 2 and steps[0]["rows"] == 5 and steps[0]["tokens"] == 12
    distinct = replace(settings, distinct=True, out=str(tmp_path / "distinct"))
    assert run(distinct)[1][0]["rows"] == 3


def test_a_task_with_no_correct_sample_says_so(toy_model, tmp_path):
    class Hopeless(Sums):
        def score(self, problem, response):
            return 0.0

    settings = sft(toy_model, tmp_path)
    with pytest.raises(BridgeError, match="no problem of 40 has two correct responses") as error:
        run(settings, Hopeless())
    assert "\n" not in str(error.value)
    assert len((tmp_path / "sft" / "samples.jsonl").read_text().splitlines()) == 40


def test_rewards_that_all_fail_are_said_to(toy_model, tmp_path):
    class Failing:
        def score(self, pairs):
            return [
                Score(0.0, f"raises {'ValueError: x' if i else 'KeyError'}")
                for i, _ in enumerate(pairs)
            ]

    notes = []

    class Watch(Silent):
        def note(self, text):
            notes.append(text)

    settings = sft(toy_model, tmp_path, problems=6, samples=2, max_rows=6)
    said = (
        r"\(0 correct in all\).*; 12 rewards failed and count as 0, most often: raises ValueError"
    )
    with pytest.raises(BridgeError, match=said) as error:
        train(settings, task=Sums(), scorer=Failing(), watch=Watch())
    assert "\n" not in str(error.value)
    assert notes == ["a reward failed and counts as 0: raises KeyError"]


LINES = [
    ("{", "is not readable as JSON"),
    ('{"responses": []}', "must be an object with prompt and responses"),
    ('{"prompt": "1", "responses": "3"}', "responses must be a list of texts"),
    ('{"prompt": 1, "responses": ["3"]}', "prompt must be a text or a list of messages"),
    (
        '{"prompt": [{"role": "user", "content": 5}], "responses": ["3"]}',
        "prompt must be a text or a list of messages",
    ),
    ('{"prompt": "", "responses": ["3", "3"]}', "is empty"),
    (
        '{"prompt": "1", "responses": ["3"], "prompt_tokens": [99], "tokens": [[1]]}',
        "must hold ids of this model",
    ),
    (
        '{"prompt": "1", "responses": ["3"], "prompt_tokens": [1], "tokens": [[]]}',
        "tokens must hold ids of this model",
    ),
    (json.dumps({"prompt": "1" * 70, "responses": ["3"]}), "goes past the context of 64"),
]


@pytest.mark.parametrize("line, message", LINES)
def test_bad_lines_of_a_file_are_named(toy_model, tmp_path, line, message):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "1+2=", "responses": ["3", "3"]}\n' + line + "\n")
    with pytest.raises(BridgeError, match=f"data.jsonl, line 2.*{message}"):
        run(sft(toy_model, tmp_path, task="", data=str(data)))


def test_clipping_is_asymmetric_in_the_objective(settings):
    wanted = GRPO(eps_low=0.1, eps_high=0.4, beta=0.2, temperature=0.5)
    given = replace(settings, eps_low=0.1, eps_high=0.4, beta=0.2, temperature=0.5)
    assert bridge.training.grpo.objective(given) == wanted


def test_sampling_is_by_temperature_alone(toy_model, settings):
    """What is sampled is what `Model.generate` samples with no filter."""
    loaded = bridge.load(toy_model, backend="torch")
    [ours] = generate(loaded, ["1+2="], replace(settings, temperature=0.7), 9)
    [plain] = loaded.generate(["1+2="], width=4, max_new_tokens=5, temperature=0.7, seed=9)
    assert ours == plain


def test_the_largest_group_must_fit_whole(settings):
    with pytest.raises(BridgeError, match="a group is never split"):
        run(replace(settings, micro_batch_tokens=16))


def test_packing_is_by_update():
    groups = [Group([1], [[2, 3], [3, 3]]) for _ in range(3)]
    numbers = [batch.groups.tolist() for batch in pack(groups, 8)]
    assert numbers == [[0, 0, 1, 1], [2, 2]]
