"""Batches of mlx-lm: rows stand alone unless their group is declared, and then are in step.

mlx-lm starts, joins, splits and thins batches as requests come and end. What every row is given to
choose from, at every step, is held to the reference: of its group alone, and of nothing else.
"""

import shutil
from copy import deepcopy

import numpy as np
import pytest
from tiny_host import write_host

from bridge.config import tensor_shapes
from bridge.contract import SFT, Batch
from bridge_conformance.cases import ModelCase, teacher_forced
from bridge_conformance.tolerance import allowance, error
from bridge_conformance.trial import Trial
from bridge_ref.backend import Reference

mx = pytest.importorskip("mlx.core")
mlx_lm = pytest.importorskip("mlx_lm")

import mlx.nn as nn  # noqa: E402
import mlx.optimizers  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.generate import BatchGenerator, generate_step  # noqa: E402
from mlx_lm.models.cache import BatchKVCache, KVCache  # noqa: E402
from mlx_lm.tuner.trainer import TrainingArgs, TrainingCallback, default_loss, train  # noqa: E402
from mlx_lm.tuner.utils import linear_to_lora_layers  # noqa: E402
from mlx_lm_backend import write_mlx  # noqa: E402
from test_mlx_lm import on_mlx_lm, plain  # noqa: E402

EOS = 0


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny model with blocks and a tokenizer whose `<eos>` is 0, for `mlx_lm.load`."""
    model = ModelCase(plain(vocab_size=257, eos_token_id=EOS), 0)
    write_host(tmp_path / "host")
    write_mlx(tmp_path, model.raw, model.tensors("float32"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "host" / name, tmp_path / name)
    return model, tmp_path


@pytest.fixture
def loaded(checkpoint):
    """The case, and the model as mlx-lm loads it."""
    case, path = checkpoint
    return case, mlx_lm.utils.load_model(path, trust_remote_code=True)[0]


class Row:
    """A sampler that has its row say `said`, and notes the log-probabilities of every step. mlx-lm
    still asks for a row at the step after its last."""

    def __init__(self, said) -> None:
        self.said, self.seen, self.uid = list(said), [], None

    def __call__(self, logprobs):
        self.seen.append(np.array(logprobs[0]))
        return mx.array([(self.said + [EOS] * len(self.seen))[len(self.seen) - 1]])


def rows_of_length(rng, *lengths):
    """Rows of so many tokens. Those that are shorter than the longest end with an EOS."""
    ends = [EOS if n < max(lengths) else 1 for n in lengths]
    return [
        Row([*rng.integers(1, 40, n - 1).tolist(), end])
        for n, end in zip(lengths, ends, strict=True)
    ]


def insert(batches, prompt, rows, caches=None):
    """Let rows of a prompt join a BatchGenerator."""
    uids = batches.insert(
        [list(prompt)] * len(rows),
        [len(row.said) for row in rows],
        caches=caches,
        samplers=rows,
    )
    for row, uid in zip(rows, uids, strict=True):
        row.uid = uid


def steps(batches, count=None):
    """Run a BatchGenerator for some steps; None: until it has nothing left."""
    while count != 0:
        said, made = batches.next()
        if count is None and not said and not made:
            return
        count = None if count is None else count - 1


def generator(model, **options):
    return BatchGenerator(model, stop_tokens=[[EOS]], stream=mx.default_stream(mx.cpu), **options)


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def assert_a_group(case, prompt, rows):
    """What rows saw is what the reference gives to the group of them, and nothing else."""
    longest = max(len(row.said) for row in rows)
    alive = np.array([[step < len(row.said) for row in rows] for step in range(longest)])
    forced = np.array([[(row.said + [0] * longest)[i] for row in rows] for i in range(longest)])
    numbers = np.arange(len(rows))
    *arguments, first = teacher_forced([np.array(prompt)], numbers * 0, forced, alive)
    trial = Trial(on_mlx_lm(case), case)
    exact, allowed = trial.allowance(
        lambda model: log_softmax(
            model.logits(*arguments)[numbers, first + np.arange(longest)[:, None]]
        )
    )
    for number, row in enumerate(rows):
        for step in range(len(row.said)):
            what = f"log-probabilities of row {number} at step {step}"
            trial.same(row.seen[step], exact[step, number], allowed, what, row.said)


@pytest.mark.parametrize("prompt", [[5, 6, 7], [5, EOS], [9]])
def test_rows_of_batch_generate_see_each_other(checkpoint, prompt):
    """Ragged endings: what a row says after another's EOS is as if it had left (clause 4.3), though
    mlx-lm feeds the EOS before it drops the row. A prompt may end with an EOS. The caches of a
    group may be used again."""
    case, path = checkpoint
    model, tokenizer = mlx_lm.load(str(path), trust_remote_code=True)
    group = model.make_group(4)
    for seed in range(2):
        rows = rows_of_length(np.random.default_rng(seed), 5, 2, 4, 2)
        left = list(rows)

        def sample(logprobs, left=left):
            left[:] = [row for row in left if len(row.seen) <= len(row.said)]
            assert len(left) == len(logprobs)
            return mx.concatenate([row(logprobs[i : i + 1]) for i, row in enumerate(left)])

        with mx.stream(mx.cpu):
            out = mlx_lm.batch_generate(
                model,
                tokenizer,
                [prompt] * 4,
                prompt_caches=group,
                max_tokens=5,
                sampler=sample,
                return_token_ids=True,
            )
        assert out.token_ids == [[t for t in row.said if t] for row in rows]
        assert_a_group(case, prompt, rows)


def test_requests_that_share_a_batch_stand_alone(loaded):
    """As mlx_lm.server has them: ten, of which eight start together and two when there is room; one
    comes later, and one goes on from the cache of another that has ended."""
    case, model = loaded
    rng, prompts = np.random.default_rng(3), [[5, 6, 7], [8], [9, 10]]
    requests = [(prompts[i % 3], rows_of_length(rng, 6)[0]) for i in range(10)]
    with mx.stream(mx.cpu):
        batches = generator(model)
        for prompt, row in requests:
            insert(batches, prompt, [row])
        steps(batches, 4)
        requests.append(([11, 12, 13], *rows_of_length(rng, 4)))
        insert(batches, requests[-1][0], [requests[-1][1]])
        steps(batches, 1)
        cache, read = batches.extract_cache([requests[0][1].uid])[requests[0][1].uid]
        [row] = rows_of_length(rng, 3)
        insert(batches, [14, 15], [row], caches=[deepcopy(cache)])
        requests.append(([*prompts[0], *read[3:], 14, 15], row))
        steps(batches)
    assert len(read) > 3
    for prompt, row in requests:
        assert_a_group(case, prompt, [row])


def test_groups_stay_together_as_rows_come_and_go(loaded):
    """Groups that begin at different steps, with prompts of different lengths, one of them with the
    caches of another; rows end, and one is removed while groups start."""
    case, model = loaded
    rng = np.random.default_rng(4)
    groups = [
        ([5, 6, 7, 8], rows_of_length(rng, 9, 3, 9, 6)),
        ([9], rows_of_length(rng, 7, 2, 7)),
        ([10, 11], rows_of_length(rng, 5)),
        ([12, 13, 14, 15, 16], rows_of_length(rng, 2, 4, 3, 4)),
    ]
    with mx.stream(mx.cpu):
        batches, of_four = generator(model), model.make_group(4)
        for (prompt, rows), caches in zip(groups, (of_four, model.make_group(3)), strict=False):
            insert(batches, prompt, rows, caches)
        steps(batches, 4)
        prompt, rows = groups[2]
        insert(batches, prompt, rows, model.make_group(1))
        gone, fed = groups[0][1][2], len(groups[0][1][2].seen) - 1
        batches.remove([gone.uid])
        prompt, rows = groups[3]
        insert(batches, prompt, rows, of_four)
        steps(batches)
    assert 0 < fed < 8
    gone.said = gone.said[: fed + 1]  # it was asked once more than it was fed
    for prompt, rows in groups:
        assert_a_group(case, prompt, rows)


def answers(model, tokenizer, prompts, caches, **options):
    with mx.stream(mx.cpu):
        return mlx_lm.batch_generate(
            model,
            tokenizer,
            prompts,
            prompt_caches=caches,
            max_tokens=6,
            return_token_ids=True,
            **options,
        ).token_ids


def assert_greedy(case, prompt, row):
    """Each token of a row that stands alone is the reference's best."""
    tokens = np.array([[*prompt, *row]])
    ones, positions = np.ones(tokens.shape, bool), np.arange(tokens.shape[1])[None]
    model = Reference().load(case.config, case.tensors("float32"), device="cpu", dtype="float64")
    logits = model.logits(tokens, np.zeros(1, int), ones, positions)
    assert logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == row


def test_more_rows_than_mlx_lm_starts_at_a_time_are_refused_or_in_step(checkpoint):
    case, path = checkpoint
    model, tokenizer = mlx_lm.load(str(path), trust_remote_code=True)
    prompt = [5, 6, 7]
    mend = "of a group of 12 rows mlx-lm starts 8 together, .* give prefill_batch_size and comple"
    for caches in (model.make_group(12), model.make_group(12)[:8]):
        with pytest.raises(ValueError, match=mend):
            answers(model, tokenizer, [prompt] * len(caches), caches)
    said = answers(model, tokenizer, [prompt] * 12, model.make_group(12), prefill_batch_size=12)
    [row] = answers(model, tokenizer, [prompt], model.make_group(1))
    assert said == [row] * 12 and len(row) == 6  # equal rows say what one says (clause 4.2)
    assert_greedy(case, prompt, row)

    caches = [row for _ in range(3) for row in model.make_group(4)]  # whole groups, 8 rows a time
    assert answers(model, tokenizer, [prompt] * 12, caches) == [row] * 12
    caches = [row for _ in range(5) for row in model.make_group(8)]  # room is for 32
    with pytest.raises(ValueError, match="of a group of 8 rows mlx-lm starts 1 together"):
        ends = [8, *[12] * 39]
        with mx.stream(mx.cpu):
            mlx_lm.batch_generate(
                model, tokenizer, [prompt] * 40, max_tokens=ends, prompt_caches=caches
            )
    assert answers(model, tokenizer, [prompt] * 40, caches, prefill_batch_size=40) == [row] * 40


def test_rows_of_a_group_have_prompts_of_one_length(loaded):
    _, model = loaded
    for prompts, why in (
        ([[5, 6, 7], [5, 6]], "different prompts"),
        ([[5, 0, 7], [5, 6]], "out of step, or their prompts differ in length"),  # 0 is padding
    ):
        with mx.stream(mx.cpu):
            batches = generator(model)
            batches.insert(prompts, caches=model.make_group(2))
            with pytest.raises(ValueError, match=why):
                steps(batches)


@pytest.mark.parametrize(
    "prompts",
    [
        [[5, 6, 7], [9, 10, 11]],
        [[5, 6, 7], [9, 6, 7]],
        [[5, 6, 7], [5, 6, 8]],
        [[5], [6]],
        [[2, 3, 4, 5], [2, 3, 6, 5]],
    ],
)
@pytest.mark.parametrize("options", [{}, {"prefill_step_size": 1}, {"prefill_step_size": 2}])
def test_rows_of_a_group_have_one_prompt(loaded, prompts, options):
    """Wherever the prompts differ, and however mlx-lm parts them; beside a group that is right, and
    after one that says what it likes."""
    case, model = loaded
    rows = rows_of_length(np.random.default_rng(7), 9, 9)
    with mx.stream(mx.cpu):
        batches = generator(model, **options)
        insert(batches, [12, 13, 14, 15, 16], rows, model.make_group(2))
        steps(batches, 7)
        others = rows_of_length(np.random.default_rng(8), 3, 3)
        insert(batches, [20, 21, 22], others, model.make_group(2))
        batches.insert(prompts, caches=model.make_group(2))
        with pytest.raises(ValueError, match=r"^rows of a group have different prompts; [^\n]*$"):
            steps(batches)

        rows = rows_of_length(np.random.default_rng(7), 9, 9)  # and a right one is no less right
        batches = generator(model, **options)
        insert(batches, prompts[0], rows, model.make_group(2))
        steps(batches)
    assert_a_group(case, prompts[0], rows)


def test_groups_are_whole_as_rows_end_where_all_have_a_place(checkpoint):
    """mlx-lm starts rows as others end, and with fewer places than a group is wide would part it:
    refused, with both numbers that mend it."""
    case, path = checkpoint
    model, tokenizer = mlx_lm.load(str(path), trust_remote_code=True)
    prompts = [[g + 1, g + 2] for g in range(9) for _ in range(8)]
    ends = [4 + 2 * (row % 8) for row in range(72)]

    def said(**options):
        caches = [row for _ in range(9) for row in model.make_group(8)]
        with mx.stream(mx.cpu):
            return mlx_lm.batch_generate(
                model,
                tokenizer,
                prompts,
                prompt_caches=caches,
                max_tokens=ends,
                return_token_ids=True,
                **options,
            ).token_ids

    mend = "starts [1-7] together, .* give prefill_batch_size and completion_batch_size, both the"
    for options in ({}, {"prefill_batch_size": 16}, {"prefill_batch_size": 60}):
        with pytest.raises(ValueError, match=mend):
            said(**options)
    got = said(prefill_batch_size=72, completion_batch_size=72)
    for g in range(9):
        group = range(8 * g, 8 * g + 8)
        longest = max((got[row] for row in group), key=len)
        assert_greedy(case, prompts[8 * g], longest + [EOS] * (len(longest) < max(ends)))
        assert [got[row] for row in group] == [longest[: ends[row]] for row in group]
    assert said(prefill_batch_size=16, completion_batch_size=72) == got


def test_a_declared_group_beside_rows_that_stand_alone_is_refused(loaded):
    """Whichever comes first: caches of mlx-lm's own would lose the group."""
    _, model = loaded
    read = [KVCache() for _ in model.layers]
    with mx.stream(mx.cpu):
        model(mx.array([[5, 6]]), read)
        group = model.make_group(2)
        batch = group[0][0].merge([row[0] for row in group])
        alone = BatchKVCache.merge([read[0]])
        for mixed in (
            lambda: read[0].merge([read[0], group[0][0]]),
            lambda: KVCache().merge([KVCache(), group[0][0]]),
            lambda: group[0][0].merge([group[0][0], read[0]]),
            lambda: batch.extend(alone),
            lambda: alone.extend(batch),
            lambda: next(generate_step(mx.array([5, 6]), model, prompt_cache=group[0])),
        ):
            with pytest.raises((ValueError, AttributeError), match=r"one of make_group\(1\)"):
                mixed()
        with pytest.raises(ValueError, match="make_group has said already"):
            model(mx.array([[5], [5]]), [batch, *read[1:]], groups=[0, 0])
    with pytest.raises(ValueError, match="a group of 0 rows"):
        model.make_group(0)


def test_a_prompt_may_be_read_once_for_its_group(loaded):
    """Clause 4.2. The cache of it is the user's, to go on with or to use again."""
    case, model = loaded
    rows = rows_of_length(np.random.default_rng(5), 5, 3, 5)
    with mx.stream(mx.cpu):
        read = model.make_cache()
        model(mx.array([[5, 6, 7]]), read)
        group = model.make_group(3, read)
        model(mx.array([[30, 31]]), read)
        batches = generator(model)
        insert(batches, [8], rows, group)
        steps(batches)
    assert_a_group(case, [5, 6, 7, 8], rows)


def test_groups_are_of_the_rows_given(loaded):
    _, model = loaded
    tokens = mx.array([[1, 2], [3, 4], [1, 2]])
    with mx.stream(mx.cpu):
        alone, together = model(tokens), model(tokens, groups=[0, 0, 0])
        for row in range(3):
            assert mx.array_equal(alone[row], model(tokens[row : row + 1])[0])
        assert not mx.allclose(alone, together)
        parted = model(tokens, groups=[7, 1, 7])
        assert mx.array_equal(parted[1], alone[1]) and not mx.allclose(parted[0], together[0])
        with pytest.raises(ValueError, match="groups of 3 rows, but the batch has 2"):
            model(tokens[:2], groups=[0, 0, 0])


def test_lora_learns_from_rows_that_stand_alone(loaded):
    """Its first loss and gradients, with mlx-lm's own loss and loop, are the reference's of groups
    of one."""
    case, model = loaded
    rng = np.random.default_rng(6)
    rows = [rng.integers(1, 40, n).tolist() for n in (4, 6, 9, 9)]
    lengths = np.array([len(row) for row in rows])[:, None]
    tokens = np.array([row + [0] * (33 - len(row)) for row in rows])
    fed, at = np.arange(32) < lengths, np.arange(1, 33)
    told = (at >= 2) & (at <= lengths)  # mlx-lm takes the padding after a row for its end
    batch = Batch(tokens[:, :-1], np.arange(4), fed, tokens[:, 1:], told)
    names = tuple(tensor_shapes(case.config))
    exact, own = (
        Reference()
        .load(case.config, case.tensors("float32"), device="cpu", dtype=T)
        .loss_and_grads(batch, SFT(), names)
        for T in ("float64", "float32")
    )
    want, rough = (np.array(said[0]["loss"]) for said in (exact, own))

    with mx.stream(mx.cpu):
        offsets = mx.array([[2, n] for n in lengths[:, 0].tolist()])
        (loss, _), tree = nn.value_and_grad(model, default_loss)(model, mx.array(tokens), offsets)
        grads = {name: np.array(grad) for name, grad in tree_flatten(tree)}
    assert error(np.array(loss.item()), want) <= allowance(want, rough, "float32")
    got, exact, own = (
        np.concatenate([each[name].ravel() for name in names]) for each in (grads, exact[1], own[1])
    )
    assert error(got, exact) <= allowance(exact, own, "float32")

    class Noted(TrainingCallback):
        def __init__(self):
            self.losses = []

        def on_train_loss_report(self, train_info):
            self.losses.append(train_info["train_loss"])

    model.freeze()
    linear_to_lora_layers(model, 3, {"rank": 2, "scale": 10.0, "dropout": 0.0})
    options = {"iters": 2, "batch_size": 4, "steps_per_report": 1, "max_seq_length": 64}
    said, before = Noted(), mx.default_device()
    mx.set_default_device(mx.cpu)
    mx.disable_compile()  # on a CPU a C++ compiler would be at work for a minute
    try:
        train(
            model,
            mlx.optimizers.Adam(learning_rate=1e-2),
            [(row, 2) for row in rows],
            args=TrainingArgs(adapter_file="/dev/null", **options),
            training_callback=said,
        )
    finally:
        mx.enable_compile()
        mx.set_default_device(before)
    assert error(np.array(said.losses[0]), want) <= allowance(want, rough, "float32")
    assert said.losses[1] < said.losses[0]
