"""Text token by token is the tokenizers library's decoding of the whole row, for every kind of
decoder and any ids; and it is given as early as it is certain. With stop texts it ends before the
first one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders
from tokenizers_of_all_kinds import ALL, BYTES, EAGER, byte_fallback, byte_level, words

from bridge.decoding.stops import RowText, read_stops
from bridge.errors import BridgeError
from bridge.model import BUNDLED
from bridge.text.tokenizer import Tokenizer, read_tokenizer

MADE = {name: Tokenizer(make()) for name, make in ALL.items()} | {
    "bundled": read_tokenizer(BUNDLED)
}


def library(tokenizer, ids):
    """The oracle. Some of its decoders panic where there is nothing to decode."""
    spelt = [tokenizer.fast.id_to_token(i) for i in ids]
    if not any(piece is not None and piece not in tokenizer.special_ids for piece in spelt):
        return ""
    return tokenizer.fast.decode(ids, skip_special_tokens=True)


def ids_of(tokenizer):
    """Any ids: of tokens, of no token, and more than their share of bytes that join or clash."""
    size = tokenizer.fast.get_vocab_size()
    pieces = [f"<0x{b:02X}>" for b in BYTES] + ["▁", "▁a", "<|end|>", "<tool>", "a", "ð", "Ł", "ĺ"]
    likely = [i for p in pieces if (i := tokenizer.fast.token_to_id(p)) is not None]
    return st.lists(st.sampled_from(likely or [0]) | st.integers(0, size + 3), max_size=24)


@pytest.mark.parametrize("name", MADE)
@given(st.data())
def test_what_is_given_adds_up_to_the_librarys_decoding(name, data):
    tokenizer = MADE[name]
    ids = data.draw(ids_of(tokenizer))
    whole = library(tokenizer, ids)
    stream, said = tokenizer.streamer(), ""
    for count, i in enumerate(ids, 1):
        said += stream.push(i)
        assert whole.startswith(said)
        ahead = stream.ahead()
        assert not ahead or said + ahead == library(tokenizer, ids[:count])
    assert said + stream.finish() == whole == tokenizer.decode(ids)
    assert stream.finish() == ""


@pytest.mark.parametrize("name", EAGER)
@given(st.data())
def test_nothing_is_held_back_that_is_certain(name, data):
    """All but the bytes since the last whole character, or the last run of bytes."""
    tokenizer = MADE[name]
    ids = data.draw(ids_of(tokenizer))
    stream, said = tokenizer.streamer(), ""
    spoken = []
    for i in ids:
        said += stream.push(i)
        piece = tokenizer.fast.id_to_token(i)
        if piece is not None and piece not in tokenizer.special_ids:
            spoken.append(i)
    if "byte level" in name:
        assert len(library(tokenizer, spoken)) - len(said) <= 1  # at most one character
        return
    fallback = "ByteFallback" in str(tokenizer.fast.decoder)
    while spoken and fallback and tokenizer.fast.id_to_token(spoken[-1]).startswith("<0x"):
        spoken.pop()
    assert said == library(tokenizer, spoken)


def test_a_cut_emoji_ends_alike_when_streamed():
    for tokenizer in (Tokenizer(byte_level()), MADE["llama 2"]):
        ids = tokenizer.fast.encode("a😀", add_special_tokens=False).ids
        whole = tokenizer.decode(ids)
        assert whole == "a😀"
        cut, stream = ids[:-1], tokenizer.streamer()
        said = "".join(stream.push(i) for i in cut)
        assert said == "a"
        assert said + stream.finish() == tokenizer.fast.decode(cut) != "a"


def test_a_byte_that_makes_the_ones_before_it_invalid():
    """The library's own stream raises here: what was text is none once another byte is there."""
    tokenizer = MADE["llama 2"]
    a, e2 = (tokenizer.fast.token_to_id(f"<0x{b}>") for b in ("61", "E2"))
    stream = tokenizer.streamer()
    assert [stream.push(a), stream.ahead(), stream.push(e2), stream.ahead()] == ["", "a", "", ""]
    assert stream.finish() == "\ufffd\ufffd"


def test_spaces_that_leave_the_beginning_are_counted_over_tokens():
    for name, wanted in (("llama 2", "   a"), ("strip three", " a"), ("gemma", "    a")):
        tokenizer = MADE[name]
        ids = [tokenizer.fast.token_to_id(piece) for piece in ("▁", "▁▁", "▁a")]
        stream = tokenizer.streamer()
        said = [stream.push(i) for i in ids]
        assert "".join(said) == wanted == tokenizer.fast.decode(ids)


def test_a_decoder_that_panics_does_not_end_what_it_tells_of():
    tokenizer = Tokenizer(words(decoders.Strip("a", 3, 3)))
    ids = [tokenizer.fast.token_to_id(piece) for piece in ("aa", "b", "a", ".")]
    assert tokenizer.decode(ids) == "b."
    late = Tokenizer(byte_fallback(decoders.Fuse(), decoders.Strip("a", 0, 9)))
    assert late.decode([late.fast.token_to_id("a")] * 3) == "aaa"


TEXTS = st.text(st.sampled_from("ab 2+=4\n é😀"), max_size=16)
STOPS = st.lists(st.text(st.sampled_from("ab 2\né😀"), min_size=1, max_size=3), max_size=3)


@pytest.mark.parametrize("name", ["byte level", "llama 2", "gemma", "replace after fuse"])
@given(TEXTS, STOPS)
def test_a_row_stops_at_the_first_token_that_completes_a_stop_text(name, text, stops):
    tokenizer = MADE[name]
    ids = tokenizer.fast.encode(text, add_special_tokens=False).ids
    row, said, taken = RowText(tokenizer.streamer(), tuple(stops)), "", 0
    for i in ids:
        said, taken = said + row.push(i), taken + 1
        if row.stopped:
            break
    said += row.finish()
    assert said == row.text
    for count in range(1, len(ids) + 1):
        so_far = library(tokenizer, ids[:count])
        if hits := [at for stop in stops if (at := so_far.find(stop)) >= 0]:
            assert (row.stopped, taken, said) == (True, count, so_far[: min(hits)])
            return
    assert (row.stopped, said) == (False, library(tokenizer, ids))


def test_the_beginning_of_a_stop_text_is_held_back_until_it_is_decided():
    tokenizer = MADE["byte level"]
    row = RowText(tokenizer.streamer(), ("abab!", "bb"))
    given = [row.push(i) for i in tokenizer.fast.encode("ababab!").ids]
    assert given == ["", "", "", "", "ab", "", ""]  # "a" + "bab": only the first two are safe
    assert row.stopped and row.text == "ab" and row.finish() == ""


def test_stop_texts_and_special_tokens():
    tokenizer = MADE["byte level"]
    end = tokenizer.fast.token_to_id("<|end|>")
    stops = read_stops(["<|end|>", "<tool>", "x"], tokenizer)
    assert stops.ids == {end} and set(stops.texts) == {"<|end|>", "<tool>", "x"}
    assert read_stops("<|end|", tokenizer).ids == frozenset()
    assert read_stops(None, None).texts == read_stops((), None).texts == ()
    refused = {
        "'<|end|>\\n' holds the special token '<|end|>'": ["<|end|>\n"],
        "a text or a list of texts, not 5": 5,
        "texts that are not empty": ["a", ""],
        "hold texts": [5],
    }
    for message, stop in refused.items():
        with pytest.raises(BridgeError) as caught:
            read_stops(stop, tokenizer)
        assert message in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(BridgeError, match="stop needs a tokenizer"):
        read_stops("x", None)
