"""The engine: what a request gets does not depend on what else runs, nor on how far it looks ahead;
rows and memory stay within their budget, nobody is overtaken, and what it counts is right."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import EOS, ScriptedModel, byte_tokenizer
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders
from tokenizers import models as token_models

from bridge.config import parse_config, tensor_shapes
from bridge.config.sizes import cache_bytes, prefill_bytes, step_bytes
from bridge.contract import Sampling
from bridge.decoding.budget import Budget
from bridge.decoding.engine import Engine
from bridge.decoding.events import Answered, Finished, Started, Token
from bridge.decoding.requests import Request
from bridge.decoding.stops import Stops
from bridge.errors import BridgeError
from bridge.registry import find_backend
from bridge.text.tokenizer import Tokenizer
from bridge_ref.backend import Reference

LETTERS = "abcdefgh"
END, FIRST = len(LETTERS) + 1, 1  # ids of a special token, and of `a`


def letters():
    """A tokenizer of single letters."""
    vocab = {"<eos>": EOS} | {c: FIRST + i for i, c in enumerate(LETTERS)} | {"<|end|>": END}
    fast = FastTokenizer(token_models.WordLevel(vocab, unk_token="<eos>"))
    fast.decoder = decoders.Fuse()
    fast.add_special_tokens(["<eos>", "<|end|>"])
    return Tokenizer(fast, {"eos_token": "<eos>"})


@pytest.fixture(scope="module")
def model():
    """A reference model of one layer, whose block does something."""
    blocks = {"spec_version": "1.0", "kind": "attention", "num_heads": 2, "head_dim": 4}
    config = parse_config(
        {
            "model_type": "llama",
            "vocab_size": END + 1,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
            "eos_token_id": EOS,
            "bridge": {**blocks, "layers": [0], "norm_eps": 1e-6},
        }
    )
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=shape) for name, shape in tensor_shapes(config).items()}
    return Reference().load(config, tensors, device="cpu", dtype="float64")


class Choosy:
    """A model whose decoders look ahead as far as they like."""

    def __init__(self, model, seed):
        self.model, self.rng = model, np.random.default_rng(seed)
        self.config, self.device, self.dtype = model.config, model.device, model.dtype

    def prefill(self, *arguments, **options):
        decoder = self.model.prefill(*arguments, **options)
        ahead = decoder.sample_ahead

        def sample_ahead(sampling, steps, ends):
            return ahead(sampling, int(self.rng.integers(1, steps + 1)), ends)

        decoder.sample_ahead = sample_ahead
        return decoder

    def free_bytes(self):
        return None


def alone(model, request):
    """What a request gets by the plain loop, a token at a time: tokens and reasons of its rows."""
    rows, reasons = [[] for _ in range(request.width)], [""] * request.width
    left, limit = list(range(request.width)), request.max_new_tokens
    decoder = model.prefill(
        [np.array(request.tokens)], [request.width], limit, prompt_ids=[request.prompt_id]
    )
    while left:
        drawn = decoder.sample(request.sampling)
        for row, token in zip(left, drawn, strict=True):
            rows[row].append(int(token))
            text = "".join(LETTERS[t - FIRST] for t in rows[row] if t not in (EOS, END))
            if token in request.eos_ids:
                reasons[row] = "eos"
            elif token in request.stop.ids or any(stop in text for stop in request.stop.texts):
                reasons[row] = "stop"
            elif len(rows[row]) == limit:
                reasons[row] = "length"
        keep = np.array([not reasons[row] for row in left])
        left = [row for row in left if not reasons[row]]
        if left:
            decoder.advance(drawn, keep)
    return rows, reasons


TEXTS = st.lists(st.text("abc", min_size=1, max_size=2), max_size=2, unique=True)
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.7, 1.5, 3.0]),
    top_k=st.sampled_from([None, 4]),
    top_p=st.sampled_from([None, 0.9]),
    seed=st.integers(0, 3),
)
REQUESTS = st.builds(
    Request,
    text=st.just("asked"),
    tokens=st.lists(st.integers(0, END), min_size=1, max_size=5),
    width=st.integers(1, 4),
    prompt_id=st.integers(0, 5),
    max_new_tokens=st.integers(1, 9),
    sampling=SAMPLINGS,
    eos_ids=st.sampled_from([frozenset({EOS}), frozenset()]),
    stop=st.builds(
        Stops, TEXTS.map(tuple), st.sampled_from([frozenset(), frozenset({END}), frozenset({3})])
    ),
)


@given(st.data(), st.integers(1, 6), st.integers(1, 6))
def test_a_request_gets_what_it_would_alone(model, data, max_rows, ahead):
    """Whatever else comes, runs and is taken back, and however far the decoder looks ahead."""
    asked = data.draw(st.lists(REQUESTS, min_size=1, max_size=6))
    arrivals = sorted(data.draw(st.lists(st.integers(0, 9), min_size=len(asked), max_size=99)))
    cancelled = data.draw(st.dictionaries(st.integers(0, 5), st.integers(0, 9), max_size=2))
    choosy = Choosy(model, data.draw(st.integers(0, 9)))
    engine = Engine(choosy, letters(), Budget(choosy, max_rows), ahead)
    texts, tokens, answers, started, ended, step = {}, {}, {}, [], set(), 0
    while len(answers) < len(asked):
        for request, arrival in zip(asked, arrivals, strict=False):
            if arrival == step:
                engine.submit(request)
        for ticket in (t for t, at in cancelled.items() if at == step):
            there = any(g.ticket == ticket for g in (*engine.queue, *engine.running))
            assert engine.cancel(ticket) == there
        for event in engine.step():
            if isinstance(event, Started):
                started += range(event.first_prompt, event.first_prompt + len(event.prompt_tokens))
                continue
            assert event.prompt not in answers  # nothing comes after the answers
            if isinstance(event, Answered):
                answers[event.prompt] = event.answers
                continue
            row = event.prompt, event.row
            assert row not in ended
            texts[row] = texts.get(row, "") + event.text
            if isinstance(event, Token):
                tokens.setdefault(row, []).append(event.token)
            else:
                ended.add(row)
        running = [len(group.left) for group in engine.running]
        assert sum(running) <= max_rows or len(running) == 1
        assert all(running)
        step += 1
    assert engine.idle and engine.rows == 0
    assert started == sorted(set(started))  # nobody is overtaken, or read twice
    for ticket, request in enumerate(asked):
        rows, reasons = alone(model, request)
        found = answers[ticket]
        assert found.prompt_tokens == request.tokens and len(found.responses) == request.width
        for n, (row, reason, response) in enumerate(
            zip(rows, reasons, found.responses, strict=True)
        ):
            said = texts[ticket, n]
            assert response.text == said and (ticket, n) in ended
            untold = response.finish_reason == "eos"  # by a Token
            assert response.tokens[: len(response.tokens) - untold] == tokens.get((ticket, n), [])
            if response.finish_reason == "cancelled":
                assert ticket in cancelled and response.tokens == row[: len(response.tokens)]
            else:
                assert (response.tokens, response.finish_reason) == (row, reason)
    assert engine.stats.tokens == sum(len(r.tokens) for a in answers.values() for r in a.responses)


def test_what_is_drawn_past_a_stop_text_is_dropped_and_the_group_goes_back(model):
    """Rows that do not stop depend on the one that does: they must not see what it drew after."""
    stop = Stops(("ab", "b", "c"))
    request = Request("", [1, 2], 4, 0, 12, Sampling(2.0, seed=1), frozenset({EOS}), stop)
    want, reasons = alone(model, request)
    assert reasons.count("stop") > 1 and len({len(row) for row in want}) > 2
    for ahead in (1, 2, 5, 12):
        engine, answers = Engine(model, letters(), ahead=ahead), None
        engine.submit(request)
        while not engine.idle:
            answers = engine.step()[-1]
        assert isinstance(answers, Answered)
        assert [r.tokens for r in answers.answers.responses] == want
        stats = engine.stats
        fed = sum(len(row) - 1 for row in want)
        assert stats.alive == fed and stats.tokens == fed + 4
        assert stats.row_steps == fed if ahead == 1 else stats.row_steps > fed
        assert stats.alive_share == fed / stats.row_steps
        assert stats.places == 256 * stats.timesteps
        assert stats.occupancy == fed / stats.places


MIXED = [
    Request("", [1, 2, 3], 3, 0, 9, Sampling(1.5, seed=1), frozenset({EOS}), Stops(("ab", "c"))),
    Request("", [4], 2, 1, 5, Sampling(0.0), frozenset({EOS})),
    Request("", [5, 6, 7, 8, 1], 4, 2, 12, Sampling(3.0, seed=2), frozenset({EOS, 3})),
    Request("", [2, 2], 1, 3, 9, Sampling(1.5, top_k=4, seed=1)),
    Request("", [7], 3, 0, 9, Sampling(1.5, seed=1), frozenset({EOS}), Stops(("aa",))),
    Request("", [3, 1], 2, 9, 7, Sampling(2.0, top_p=0.9), frozenset({EOS}), Stops((), {END})),
]


@pytest.mark.parametrize("backend", ["torch", "jax", "mlx"])
def test_every_backend_gives_what_the_reference_gives_alone(model, backend):
    """Groups that come and go, in steps of their own, and rows that stop amid what is drawn."""
    found = find_backend(backend).load(
        model.config, dict(model.tensors()), device="cpu", dtype="float32"
    )
    engine = Engine(found, letters(), Budget(found, 6), ahead=4)
    steps = run(engine, MIXED)
    answers = {e.prompt: e.answers for step in steps for e in step if isinstance(e, Answered)}
    for ticket, request in enumerate(MIXED):
        rows, reasons = alone(model, request)
        assert [r.tokens for r in answers[ticket].responses] == rows
        assert [r.finish_reason for r in answers[ticket].responses] == reasons
    assert engine.stats.prompts == len(MIXED) and len([s for s in steps if started(s)]) > 2


def started(step):
    return any(isinstance(event, Started) for event in step)


def script(lengths):
    """A model whose rows say so many letters each and EOS; by prompt."""
    said = {
        (p, n): [*range(1, length + 1), EOS]
        for p, rows in enumerate(lengths)
        for n, length in enumerate(rows)
    }
    return ScriptedModel(said)


def ask(prompt, width, limit=40, tokens=2):
    return Request("", [1] * tokens, width, prompt, limit, Sampling(), frozenset({EOS}))


def run(engine, requests):
    """All events, step by step."""
    for request in requests:
        engine.submit(request)
    steps = []
    while not engine.idle:
        steps.append(engine.step())
    return steps


def test_a_group_comes_as_soon_as_its_rows_fit_and_never_in_part():
    backend = script([[1, 9], [9, 1], [2, 2], [1], [3]])
    engine = Engine(backend, byte_tokenizer(), Budget(backend, 4))
    steps = run(engine, [ask(p, w) for p, w in enumerate([2, 2, 2, 1, 1])])
    # One row of each of the first two ends in the second step, which makes room for two.
    assert backend.prefills == [([0, 1], [2, 2]), ([2], [2]), ([3, 4], [1, 1])]
    at = {e.first_prompt: n for n, step in enumerate(steps) for e in step if isinstance(e, Started)}
    assert at == {0: 0, 2: 2, 3: 5}
    order = [e.prompt for step in steps for e in step if isinstance(e, Answered)]
    assert order == [2, 3, 4, 0, 1]


def test_those_who_come_together_are_read_together_where_their_limits_are_the_same():
    backend = script([[1]] * 5)
    engine = Engine(backend, byte_tokenizer(), Budget(backend, 9))
    run(engine, [ask(p, 1, limit) for p, limit in enumerate([5, 5, 6, 5, 5])])
    assert backend.prefills == [([0, 1], [1, 1]), ([2], [1]), ([3, 4], [1, 1])]
    assert engine.stats.prompts == 5


def test_the_head_of_the_line_is_not_overtaken_by_those_who_would_fit():
    backend = script([[3], [1, 1, 1], [1]])
    run(Engine(backend, byte_tokenizer(), Budget(backend, 3)), [ask(0, 1), ask(1, 3), ask(2, 1)])
    assert [prompts for prompts, _ in backend.prefills] == [[0], [1], [2]]


def test_a_group_wider_than_all_rows_is_decoded_alone():
    backend = script([[1], [1] * 5, [1]])
    run(Engine(backend, byte_tokenizer(), Budget(backend, 2)), [ask(0, 1), ask(1, 5), ask(2, 1)])
    assert [prompts for prompts, _ in backend.prefills] == [[0], [1], [2]]


def test_what_is_taken_back_leaves_with_what_it_has_said():
    backend = script([[8, 8], [8], [8], [1]])
    engine = Engine(backend, byte_tokenizer(), Budget(backend, 3))
    tickets = [engine.submit(ask(p, w)) for p, w in enumerate([2, 1, 1, 1])]
    assert tickets == [0, 1, 2, 3]
    engine.step()
    engine.step()
    assert engine.cancel(0) and engine.cancel(2) and not engine.cancel(9)
    events = engine.step()
    ends = [(e.prompt, e.row, e.reason) for e in events if isinstance(e, Finished)]
    assert ends == [(2, 0, "cancelled"), (0, 0, "cancelled"), (0, 1, "cancelled")]
    said = {
        e.prompt: [r.tokens for r in e.answers.responses]
        for e in events[:-1]
        if isinstance(e, Answered)
    }
    assert said == {2: [[]], 0: [[1, 2], [1, 2]]}
    assert engine.rows == 1 and not engine.cancel(0)  # it has gone
    assert backend.fed[-1][1] == [(1, 0)]
    while not engine.idle:
        events = engine.step()
    assert backend.prefills[-1] == ([3], [1])
    assert engine.cancel(1) is False


def test_started_tells_of_prompts_side_by_side():
    backend = script([[1]] * 4)
    engine = Engine(backend, byte_tokenizer(), Budget(backend))
    for prompt in range(4):
        engine.submit(ask(prompt, 1))
    engine.cancel(1)
    told = [e for e in engine.step() if isinstance(e, Started)]
    assert [(e.first_prompt, e.prompt_tokens) for e in told] == [(0, [2]), (2, [2, 2])]


# Memory


def deep(backend):
    """The config of as many layers as make caches large beside all else."""
    backend.config = replace(backend.config, num_hidden_layers=1000)
    return backend.config


def test_groups_come_while_their_worst_case_fits(monkeypatch):
    backend = script([[3]] * 9)
    config, needed = deep(backend), []
    for count in (1, 2, 3):
        caches = cache_bytes(config, "float32", [2] * count, [1] * count, 40)
        passing = step_bytes(config, "float32", count, 1, 42)
        needed.append(2 * caches + passing)
    assert prefill_bytes(config, "float32", 3, 2) < passing
    # A tenth of what is free is left alone.
    monkeypatch.setattr("bridge.decoding.budget.available_memory", lambda: -(-needed[2] * 10 // 9))
    engine = Engine(backend, byte_tokenizer(), Budget(backend))
    run(engine, [ask(p, 1) for p in range(9)])
    assert [len(prompts) for prompts, _ in backend.prefills] == [3, 3, 3]
    backend = script([[3]] * 4)
    deep(backend)
    monkeypatch.setattr("bridge.decoding.budget.available_memory", lambda: needed[2])
    run(Engine(backend, byte_tokenizer(), Budget(backend)), [ask(p, 1) for p in range(4)])
    assert [len(prompts) for prompts, _ in backend.prefills] == [2, 2]


def test_a_device_says_what_it_has_left():
    backend = script([[3]] * 4)
    alone = 2 * cache_bytes(backend.config, "float32", [2], [1], 40)
    alone += step_bytes(backend.config, "float32", 1, 1, 42)
    backend.free_bytes = lambda: -(-alone * 10 // 9)
    engine = Engine(backend, byte_tokenizer(), Budget(backend))
    run(engine, [ask(p, 1) for p in range(4)])
    assert [len(prompts) for prompts, _ in backend.prefills] == [1] * 4
    with pytest.raises(BridgeError, match=r"^memory: 2 rows of up to 40 .*; lower width or max_ne"):
        engine.submit(ask(0, 2))
    # What was free when it was asked for may have gone when its turn comes.
    engine.submit(ask(0, 1))
    engine.submit(ask(1, 1))
    backend.free_bytes = lambda: alone // 2
    with pytest.raises(BridgeError, match=r"^memory: 1 rows of up to 40 tokens"):
        engine.step()
    backend.free_bytes = lambda: 2 * alone
    assert [e.prompt for step in run(engine, []) for e in step if isinstance(e, Answered)] == [5]


def test_the_bytes_of_caches_may_be_said():
    backend = script([[3]] * 4)
    both = cache_bytes(backend.config, "float32", [2, 2], [1, 1], 40)
    engine = Engine(backend, byte_tokenizer(), Budget(backend, cache_bytes=both))
    run(engine, [ask(p, 1) for p in range(4)])
    assert [len(prompts) for prompts, _ in backend.prefills] == [2, 2]
    with pytest.raises(BridgeError, match=r"need .* and cache_bytes is .* B; raise it, or lower"):
        engine.submit(ask(0, 3))


def test_prompts_that_are_read_together_are_not_many():
    backend = script([[3]] * 5)
    backend.config = replace(backend.config, max_position_embeddings=8192)
    engine = Engine(backend, byte_tokenizer(), Budget(backend))
    run(engine, [ask(p, 1, tokens=n) for p, n in enumerate([4000, 100, 100, 4000, 2000])])
    assert [prompts for prompts, _ in backend.prefills] == [[0, 1], [2, 3], [4]]
