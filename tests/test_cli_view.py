"""The live view at several sizes of terminal, with text that means harm."""

import io
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from bridge.decoding.events import Finished, Started, Token
from bridge_cli.text import count, harmless, harmless_line, size
from bridge_cli.view import View, arrange, recent

HOSTILE = "\x1b[2J\x1b]0;title\x07[bold red]markup[/] \u202edrow \x9b31m\r\b\x7f :smile: [link=x]y"


def screen(view, width, height):
    """The lines that a terminal of that size shows."""
    file = io.StringIO()
    console = Console(width=width, height=height, file=file, record=True, force_terminal=True)
    console.print(view)
    return console.export_text().rstrip("\n").split("\n")


def view_of(*texts, width=None, reason=""):
    view = View([width or len(texts)])
    view.take(Started([3], 0.1))
    for row, text in enumerate(texts):
        view.take(Token(0, row, 5, text))
        if reason:
            view.take(Finished(0, row, reason))
    return view


@pytest.mark.parametrize(
    ("rows", "width", "columns"),
    [(8, 200, 4), (8, 80, 2), (8, 40, 1), (8, 240, 8), (4, 200, 4), (1, 200, 1), (6, 100, 3)],
)
def test_rows_stand_side_by_side_where_there_is_room(rows, width, columns):
    assert arrange(rows, width) == columns


@given(st.integers(1, 64), st.integers(1, 400))
def test_columns_are_wide_enough_and_evenly_filled(rows, width):
    columns = arrange(rows, width)
    assert columns == 1 or width // columns >= 24
    lines = -(-rows // columns)
    assert (columns - 1) * lines < rows  # one column fewer would need more lines


def test_eight_answers_on_a_wide_terminal():
    lines = screen(view_of(*(f"answer {n}" for n in range(8))), 200, 40)
    titles = [line for line in lines if "row " in line]
    assert len(titles) == 2
    assert all(f"row {n} · 1 token · running" in titles[n // 4] for n in range(8))
    assert any(all(f"answer {n}" in line for n in range(4)) for line in lines)
    assert lines[0].startswith("0 of 8 answers done · 8 tokens")


def test_eight_answers_on_a_narrow_terminal():
    lines = screen(view_of(*(f"answer {n}" for n in range(8))), 80, 24)
    assert len([line for line in lines if "row " in line]) == 4
    assert len(lines) <= 24


def test_more_rows_than_panels_fit_are_a_line_each():
    lines = screen(view_of(*(f"words\nof {n}" for n in range(16))), 80, 24)
    assert len(lines) == 17
    assert "row 15 · 1 token · running · words of 15" in lines[-1]


def test_a_panel_shows_the_tail():
    lines = screen(view_of("first " + "word " * 1000 + "last"), 40, 12)
    text = "\n".join(lines)
    assert "last" in text and "first" not in text


@pytest.mark.parametrize("reason", ["eos", "stop", "length"])
def test_how_a_row_ended_is_said(reason):
    assert reason in "\n".join(screen(view_of("hello", reason=reason), 80, 24))


def test_the_earliest_prompt_that_runs_is_shown():
    view = View([2, 2, 1])
    view.take(Started([3, 4], 0.1, first_prompt=0))
    view.take(Token(1, 0, 5, "second"))
    assert screen(view, 80, 24)[0].startswith("prompt 1 of 3")
    view.take(Finished(0, 0, "eos"))
    view.take(Finished(0, 1, "length"))
    lines = screen(view, 80, 24)
    assert lines[0].startswith("prompt 2 of 3") and "second" in "\n".join(lines)
    view.take(Finished(1, 0, "eos"))
    view.take(Finished(1, 1, "eos"))
    assert screen(view, 80, 24)[0].startswith("prompt 2 of 3")  # until the next batch starts
    view.take(Started([9], 0.1, first_prompt=2))
    assert screen(view, 80, 24)[0].startswith("prompt 3 of 3")


@pytest.mark.parametrize("width", [200, 80, 20])
def test_hostile_text_is_shown_and_does_nothing(width):
    lines = screen(view_of(HOSTILE, HOSTILE * 40), width, 24)
    text = "".join(lines)
    assert "␛[2J" in text or width == 20
    assert not any(unicodedata.category(c) in ("Cc", "Cf") for c in text)
    if width == 200:
        assert "[bold red]markup[/]" in text and ":smile:" in text and "[link=x]y" in text


@given(
    st.lists(st.text(max_size=200), min_size=1, max_size=9),
    st.integers(1, 120),
    st.integers(1, 40),
    st.sampled_from(["", "eos", "length"]),
)
def test_any_text_stays_within_the_screen(texts, width, height, reason):
    lines = screen(view_of(*texts, reason=reason), width, height)
    assert all(cell_len(line) <= width for line in lines)
    assert len(lines) <= max(height, 3)
    assert not any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in "".join(lines))


@given(st.text(max_size=50), st.text(max_size=3), st.integers(1, 20))
def test_the_recent_text_is_a_stable_tail(text, more, size):
    tail = recent(text, size)
    assert text.endswith(tail) and min(len(text), size) <= len(tail) < 2 * size
    if (len(text) + len(more)) // size == len(text) // size:
        assert recent(text + more, size) == tail + more  # lines break where they did


@given(st.text())
def test_harmless_text_keeps_its_length_and_its_words(text):
    shown = harmless(text)
    assert len(shown) == len(text)
    assert harmless(shown) == shown
    shown.encode("utf-8")
    assert "\n" not in harmless_line(text)


def test_harmless_keeps_what_scripts_need():
    assert harmless("a\tb\nनमस्ते 👩\u200d🔬 שלום") == "a\tb\nनमस्ते 👩\u200d🔬 שלום"
    assert harmless("\x1b\x9b\u2028\ud800") == "␛\ufffd\ufffd\ufffd"


def test_numbers_are_short():
    assert [count(n) for n in (7, 1_500, 134_515_008, 7 * 10**9)] == [
        "7",
        "1.5 k",
        "134.5 M",
        "7.0 B",
    ]
    assert [size(n) for n in (999, 679_733_552)] == ["999 B", "679.7 MB"]
