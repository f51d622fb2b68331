"""The generation loop alone, on a scripted backend: endings, batching, events, bad options."""

from dataclasses import replace

import numpy as np
import pytest
from scripted import CONFIG, EOS, ScriptedModel, byte_tokenizer, scripted

from bridge.decoding.events import Answered, Done, Finished, Started, Token
from bridge.errors import BridgeError
from bridge.model import Model


def test_rows_end_at_eos_and_leave():
    model, backend = scripted("ab", "c", "def")
    [answers] = model.generate("go", width=3)
    assert [r.text for r in answers.responses] == ["ab", "c", "def"]
    assert [r.finish_reason for r in answers.responses] == ["eos"] * 3
    assert all(r.tokens[-1] == EOS for r in answers.responses)
    # Each row is fed everything that it said but its last token, which is never an input.
    assert [rows for _, rows in backend.fed] == [
        [(0, 0), (0, 1), (0, 2)],
        [(0, 0), (0, 2)],
        [(0, 2)],
    ]


def test_length_limit():
    model, backend = scripted("abcdef", "x")
    [answers] = model.generate("go", width=2, max_new_tokens=3)
    assert [(r.text, r.finish_reason) for r in answers.responses] == [
        ("abc", "length"),
        ("x", "eos"),
    ]
    assert len(backend.fed) == 2


def test_stop_strings_cut_the_text_at_the_first_one():
    model, _ = scripted("one END two", "no", "a\n\nb END")
    [answers] = model.generate("go", width=3, stop=["END", "\n\n"])
    assert [(r.text, r.finish_reason) for r in answers.responses] == [
        ("one ", "stop"),
        ("no", "eos"),
        ("a", "stop"),
    ]


def test_events_tell_the_whole_story():
    model, _ = scripted("né", "ß")
    events = list(model.stream("go", width=2))
    assert isinstance(events[0], Started) and events[0].prompt_tokens == [2]
    assert isinstance(events[-1], Done)
    streamed = ["", ""]
    for event in events:
        if isinstance(event, Token):
            streamed[event.row] += event.text
    assert streamed == ["né", "ß"]  # whole characters, though each token is one byte
    finished = [(e.row, e.reason) for e in events if isinstance(e, Finished)]
    assert finished == [(1, "eos"), (0, "eos")]


def test_prompts_come_as_there_is_room_without_renumbering():
    tokenizer = byte_tokenizer()
    script = {(p, n): [*tokenizer.encode(f"{p}{n}"), EOS] for p in range(5) for n in range(3)}
    backend = ScriptedModel(script)
    model = Model(backend, "scripted", tokenizer, (EOS,))
    widths = [1, 2, 3, 1, 2]
    sets = model.generate(["a", "b", "c", "d", "e"], width=widths, max_rows=3)
    assert backend.prefills == [([0, 1], [1, 2]), ([2], [3]), ([3, 4], [1, 2])]
    said = [[r.text for r in s.responses] for s in sets]
    assert said == [[f"{p}{n}" for n in range(w)] for p, w in enumerate(widths)]
    assert sets[3].to_json()["prompt"] == "d"


def test_prompt_ids_number_the_draws_and_not_the_answers():
    tokenizer = byte_tokenizer()
    script = {(p, 0): [*tokenizer.encode(str(p)), EOS] for p in range(10)}
    backend = ScriptedModel(script)
    model = Model(backend, "scripted", tokenizer, (EOS,))
    events = list(model.stream(["a", "b", "c"], width=1, max_rows=2, prompt_ids=[7, 2, 9]))
    assert backend.prefills == [([7, 2], [1, 1]), ([9], [1])]
    assert isinstance(events[-1], Done)
    assert [s.responses[0].text for s in events[-1].sets] == ["7", "2", "9"]
    assert {e.prompt for e in events if isinstance(e, Finished)} == {0, 1, 2}


def test_ids_need_no_tokenizer():
    model = Model(ScriptedModel({(0, 0): [5, EOS], (0, 1): [6, 7, EOS]}), "scripted", None, (EOS,))
    [answers] = model.generate([1, 2, 3], width=2)
    assert [r.tokens for r in answers.responses] == [[5, EOS], [6, 7, EOS]]
    assert answers.prompt_tokens == [1, 2, 3]
    [same] = model.generate([np.array([1, 2, 3])], width=2)
    assert same.responses == answers.responses


def test_an_engine_answers_who_comes_later_too():
    tokenizer = byte_tokenizer()
    script = {(p, n): [*tokenizer.encode(f"{p}{n}"), EOS] for p in range(3) for n in range(2)}
    model = Model(ScriptedModel(script), "scripted", tokenizer, (EOS,))
    engine, texts = model.engine(max_rows=4), {}
    first, second, third = model.requests(["a", "b", "c"], width=2)
    tickets = [engine.submit(first), engine.submit(second)]
    while not engine.idle:
        for event in engine.step():
            if isinstance(event, Answered):
                texts[event.prompt] = [r.text for r in event.answers.responses]
        if len(tickets) == 2:
            tickets.append(engine.submit(third))
    assert texts == {0: ["00", "01"], 1: ["10", "11"], 2: ["20", "21"]} and tickets == [0, 1, 2]


BAD = {
    "width must be 1 or above, not 0": {"width": 0},
    "width must be 1 or above, not 2.5": {"width": [2.5]},
    "2 widths for 1 prompts": {"width": [1, 2]},
    "max_new_tokens must be 1 or above, not 0": {"max_new_tokens": 0},
    "temperature must be 0 or above, not -1": {"temperature": -1},
    "temperature must be 0 or above, not nan": {"temperature": float("nan")},
    "top_k must be 1 or above, not 0": {"top_k": 0},
    "top_p must be in (0, 1], not 0": {"top_p": 0},
    "min_p must be in [0, 1], not 2": {"min_p": 2},
    "seed must be in 0..2^64-1, not -1": {"seed": -1},
    "stop must hold texts that are not empty": {"stop": [""]},
    "2 prompt_ids for 1 prompts": {"prompt_ids": [0, 1]},
    "prompt_ids must be in 0..2^32-1": {"prompt_ids": [2**32]},
    "prompt 0 has 2 tokens, and with max_new_tokens 63 it goes past the context of 64": {
        "max_new_tokens": 63
    },
    "no chat_template": {"chat": True},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_options_are_refused_before_anything_is_computed(message):
    model, backend = scripted("ab")
    with pytest.raises(BridgeError) as caught:
        model.generate("go", **{"width": 1} | BAD[message])
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert backend.prefills == []


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("", "prompt 0 is empty"),
        (["ok", "  "], "prompt 1 is empty"),
        ([], "no prompt given"),
        ([[]], "prompt 0 is empty"),
        ([[1, 999]], "prompt 0: 999 is outside 0..299"),
        ([[1, -1]], "prompt 0: -1 is outside 0..299"),
        ([[1.5]], "prompt 0 must be integers"),
    ],
)
def test_bad_prompts(prompts, message):
    model, _ = scripted("ab")
    with pytest.raises(BridgeError, match=message.replace("[", r"\[")):
        model.generate(prompts, width=1)


def test_a_tokenizer_without_eos_is_refused():
    config = replace(CONFIG, eos_token_ids=())
    backend = ScriptedModel({})
    backend.config = config
    model = Model(backend, "scripted", byte_tokenizer(eos=None), ())
    with pytest.raises(BridgeError, match="no eos_token"):
        model.generate("go")


LOGITS_BAD = [
    (dict(tokens=[[1, 300]], groups=[0]), "tokens: 300 is outside 0..299"),
    (dict(tokens=[[1, 2]], groups=[0, 1]), "groups must have one number a row: 1, not 2"),
    (dict(tokens=[1, 2], groups=[0]), "tokens must be integers with 2 axes"),
    (dict(tokens=[[1], [2, 3]], groups=[0, 0]), "tokens must be integers in a regular array"),
    (dict(tokens=[[1, 2]], groups=[0], active=[[1, 1]]), "active must be bool"),
    (dict(tokens=[[1, 2]], groups=[0], positions=[[0, 64]]), "positions: 64 is outside 0..63"),
]


@pytest.mark.parametrize(("arguments", "message"), LOGITS_BAD)
def test_bad_logits_arguments(arguments, message):
    model, _ = scripted("ab")
    with pytest.raises(BridgeError, match=message):
        model.logits(**arguments)
