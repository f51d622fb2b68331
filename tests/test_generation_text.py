"""The text of rows, by events and at the end: the same whatever the tokens and the tokenizer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import EOS, ScriptedModel, byte_tokenizer
from tokenizers_of_all_kinds import ALL

from bridge.decoding.events import Done, Finished, Token
from bridge.errors import BridgeError
from bridge.model import Model
from bridge.text.tokenizer import Tokenizer
from bridge_cli.view import View


def told(model, **options):
    """The texts of each row's events, the events, and the responses."""
    events = list(model.stream("go", width=2, **options))
    said = ["", ""]
    for event in events:
        if isinstance(event, Token | Finished):
            said[event.row] += event.text
    assert isinstance(events[-1], Done)
    return said, events, events[-1].sets[0].responses


@pytest.mark.parametrize("name", ALL)
@given(st.data())
def test_a_rows_events_add_up_to_its_text(name, data):
    """Whatever tokens a row says, however it ends, and in whatever kind of tokenizer."""
    tokenizer = Tokenizer(ALL[name](), {"eos_token": "<eos>"})
    token = st.integers(1, tokenizer.fast.get_vocab_size() - 1)
    rows = [data.draw(st.lists(token, min_size=1, max_size=12)) for _ in range(2)]
    backend = ScriptedModel({(0, n): [*row, EOS] for n, row in enumerate(rows)})
    model = Model(backend, "scripted", tokenizer, (EOS,))
    stop = data.draw(st.sampled_from([None, ["a"], ["<|end|>", "aa"]]))
    said, events, responses = told(model, max_new_tokens=8, stop=stop)
    end = tokenizer.special_ids["<|end|>"]
    for n, (row, answer) in enumerate(zip(rows, responses, strict=True)):
        assert said[n] == answer.text
        tokens = sum(isinstance(e, Token) and e.row == n for e in events)
        assert tokens == len(answer.tokens) - (answer.finish_reason == "eos")
        spoken = answer.tokens[: len(answer.tokens) - (answer.tokens[-1] in (EOS, end))]
        whole = tokenizer.fast.decode(spoken) if tokenizer.decode(spoken) else ""
        assert whole.startswith(answer.text)
        if answer.finish_reason != "stop" or answer.tokens[-1] == end:
            assert answer.text == whole
        assert answer.tokens == [*row, EOS][: len(answer.tokens)]


def test_a_cut_character_is_in_the_last_event_of_its_row():
    tokenizer = byte_tokenizer()
    whole, cut = tokenizer.encode("a😀"), tokenizer.encode("a😀")[:-1]
    backend = ScriptedModel({(0, 0): [*cut, EOS], (0, 1): [*whole, EOS]})
    model = Model(backend, "scripted", tokenizer, (EOS,))
    said, _, responses = told(model, max_new_tokens=4)
    assert said == [r.text for r in responses] == ["a\ufffd", "a\ufffd"]
    assert [r.finish_reason for r in responses] == ["length", "length"]
    said, events, responses = told(model, max_new_tokens=9)
    assert said == [r.text for r in responses] == ["a\ufffd", "a😀"]
    ends = {e.row: (e.reason, e.text) for e in events if isinstance(e, Finished)}
    assert ends == {0: ("eos", "\ufffd"), 1: ("eos", "")}
    view = View([2])
    for event in events[:-1]:
        view.take(event)
    assert [row.text for row in view.rows] == ["a\ufffd", "a😀"]


def test_a_special_token_is_a_stop_by_its_id():
    tokenizer = byte_tokenizer()
    tokenizer.fast.add_special_tokens(["<|end|>"])
    [end] = tokenizer.encode("<|end|>")
    a, b = tokenizer.encode("ab")
    spelt = [i for c in "b<|end|>x" for i in tokenizer.encode(c)]
    backend = ScriptedModel({(0, 0): [a, b, end, a, EOS], (0, 1): [*spelt, EOS]})
    model = Model(backend, "scripted", tokenizer, (EOS,))
    said, _, responses = told(model, stop="<|end|>")
    assert [(r.text, r.finish_reason) for r in responses] == [("ab", "stop"), ("b", "stop")]
    assert responses[0].tokens == [a, b, end] and responses[1].tokens == spelt[:-1]
    assert said == ["ab", "b"]
    _, _, responses = told(model)
    assert [(r.text, r.finish_reason) for r in responses] == [("aba", "eos"), ("b<|end|>x", "eos")]
    with pytest.raises(BridgeError, match=r"special token '<\|end\|>'.*name it alone"):
        model.generate("go", stop=["b<|end|>"])
