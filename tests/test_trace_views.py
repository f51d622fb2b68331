"""What `bridge inspect --trace` shows: terminal, picture, page and JSON, and what it refuses."""

import json
import re
import sys
from html.parser import HTMLParser
from io import BytesIO, StringIO

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from traced import hand_made
from typer.testing import CliRunner

import bridge
from bridge.contract import Sampling
from bridge.model import BUNDLED
from bridge.tracing.colours import VIRIDIS, Scale, is_bright, scale_of
from bridge.tracing.export import page, picture
from bridge.tracing.trace import trace
from bridge_cli.main import app
from bridge_cli.text import harmless
from bridge_cli.trace_view import View

PLAIN = {"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"}
SHORT = ("--width", "3", "--max-new-tokens", "6", "--backend", "numpy")
HOSTILE = "</pre><script>alert('x')</script><img src=\"http://x\" onerror=x>\x1b[2J\u202e$x^$ &amp;"


def run(*arguments, code=0, env=PLAIN):
    result = CliRunner(env=env).invoke(app, ["inspect", *map(str, arguments)])
    if result.exit_code != code:
        raise AssertionError(f"exit {result.exit_code}: {result.output}") from result.exception
    return result


# The command


def test_the_json_is_of_the_answers_that_generate_gives(traced):
    asked = (traced / "all", "--trace", "Hi", *SHORT, "--seed", 3, "--raw", "--temperature", 0.8)
    said = json.loads(run(*asked, "--json").stdout)
    model = bridge.load(traced / "all", backend="numpy")
    [wanted] = model.generate(["Hi"], width=3, max_new_tokens=6, seed=3, temperature=0.8)
    assert [a["tokens"] for a in said["answers"]] == [r.tokens for r in wanted.responses]
    assert said["prompt_tokens"] == wanted.prompt_tokens
    found = trace(model, wanted, Sampling(temperature=0.8, seed=3))
    assert json.loads(json.dumps(found.to_json())).items() <= said.items()
    assert said["replayed_in"] == said["dtype"] == "float64" and not said["chat"]
    # Any backend may answer; the reference replays.
    by_torch = json.loads(run(*asked[:-2], "--backend", "torch", "--json").stdout)
    assert (by_torch["backend"], by_torch["replayed_in"]) == ("torch", "float32")


@pytest.mark.parametrize("columns", [80, 50, 140])
def test_the_terminal_view_fits(traced, columns):
    env = PLAIN | {"COLUMNS": str(columns)}
    asked = (traced / "all", "--trace", "Hi", "--width", 4, "--backend", "numpy")
    said = run(*asked, "--max-new-tokens", 70, "--layer", 1, env=env).stdout
    lines = said.splitlines()
    assert max(map(len, lines)) <= max(columns, 80)
    for title in ("attention to other rows", "attention from other rows", "who looks at whom"):
        assert title in said
    assert "layer 2 " in said and "norm ratio" in said and "entropy " in said


def drawn(found, width=80, colour=False):
    """The view of a trace as text; with colours, its escape codes too."""
    out, system = StringIO(), "truecolor" if colour else None
    console = Console(
        file=out, width=width, highlight=False, force_terminal=colour, color_system=system
    )
    View(console, found, None).show()
    return out.getvalue()


def test_digits_stand_for_colours_and_ended_rows_are_blank():
    lines = drawn(hand_made()).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("attention to"))
    # 0.667 and 0.625 between 0.60 and 0.70, three columns each; the norm ratio on the right.
    assert lines[at + 1] == "layer 1 666222     0.5"
    at = next(i for i, line in enumerate(lines) if line.startswith("attention from"))
    assert lines[at + 3] == "row 2   000       0.33"  # ended
    at = next(i for i, line in enumerate(lines) if line.startswith("who looks"))
    assert lines[at + 4].rstrip() == "row 2    33  33  33"
    r, g, b = VIRIDIS[0]
    assert f"48;2;{r};{g};{b}m" not in drawn(hand_made())
    assert "48;2;" in drawn(hand_made(), colour=True)


def test_many_steps_share_a_column():
    steps = 100
    tokens = np.ones((2, steps), int)
    weights = np.zeros((1, 1, steps, 2, 2))
    weights[:, :, :50] = np.eye(2)
    weights[:, :, 50:] = 1 - np.eye(2)
    found = hand_made(
        tokens=tokens,
        answers=["", ""],
        reasons=["length"] * 2,
        words=[["a"] * steps] * 2,
        layers=(12,),
        attention=weights,
        norm_ratios=np.array([1.0]),
        entropy=np.zeros((2, steps)),
    )
    line = next(x for x in drawn(found).splitlines() if x.startswith("L 12"))
    assert line == "L 12    " + "0" * 25 + "9" * 25 + "       1"  # each of two steps


def test_blocks_without_attention_show_the_rest(traced, tmp_path):
    asked = (traced / "mlp", "--trace", "Hi", *SHORT)
    said = run(*asked, "--png", tmp_path / "a.png", "--html", tmp_path / "a.html").stdout
    assert "P-Match blocks (kind mlp) read no other rows" in " ".join(said.split())
    assert "who looks" not in said and "norm ratio" in said and "entropy" in said
    assert "Who looks" not in (tmp_path / "a.html").read_text()
    assert_drawn(tmp_path / "a.png")
    assert json.loads(run(*asked, "--json").stdout)["attention"] is None


def test_fresh_blocks_are_said_to_add_nothing(traced):
    said = run(traced / "fresh", "--trace", "Hi", *SHORT).stdout
    assert "these blocks add nothing yet" in said
    assert "add nothing" not in run(traced / "all", "--trace", "Hi", *SHORT).stdout


def test_one_row_has_no_others(traced, tmp_path):
    asked = (traced / "all", "--trace", "Hi", "--width", 1, "--max-new-tokens", 3)
    said = run(*asked, "--png", tmp_path / "a.png", "--html", tmp_path / "a.html").stdout
    assert "1 of 1 answers" in said and "attention from other rows" not in said
    assert_drawn(tmp_path / "a.png")


def test_greedy_answers_have_an_entropy_all_the_same(traced):
    said = json.loads(
        run(traced / "all", "--trace", "Hi", *SHORT, "--temperature", 0, "--json").stdout
    )
    assert said["greedy"] and min(said["mean_entropy"]) > 0.5


# Files


def assert_drawn(png):
    """There is a picture with much in it."""
    with Image.open(BytesIO(png.read_bytes())) as image:
        assert image.format == "PNG" and min(image.size) > 300
        pixels = np.asarray(image.convert("L"))
    assert 0.02 < (pixels < 200).mean() < 0.9


def alike(png, colour):
    """Which pixels have a colour, give or take what rounding does."""
    with Image.open(png) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    return (abs(pixels - colour) <= 1).all(axis=-1)


def test_the_picture_is_bright_where_a_row_is_heard_and_blank_where_it_has_ended(tmp_path):
    weights = np.zeros((1, 1, 4, 2, 2))
    weights[..., 1] = 1.0  # both look at row 1
    changes = {
        "tokens": np.array([[1, 2, 3, 4], [1, 2, 3, 4]]),
        "layers": (0,),
        "norm_ratios": np.ones(1),
        "entropy": np.ones((2, 4)),
        "answers": [HOSTILE] * 2,
        "reasons": ["length"] * 2,
        "words": [["x"] * 4] * 2,
        "prompt": HOSTILE + " 你好",
    }
    (tmp_path / "a.png").write_bytes(picture(hand_made(attention=weights, **changes)))
    assert_drawn(tmp_path / "a.png")
    # Across the map of what rows are heard: row 0, dark, above row 1, bright.
    dark, bright = (
        np.flatnonzero(alike(tmp_path / "a.png", colour).sum(axis=1) > 600)
        for colour in (VIRIDIS[0], VIRIDIS[-1])
    )
    assert len(dark) > 20 and len(bright) > 20 and dark.max() < bright.min()
    changes |= {"tokens": np.array([[1, 2, 3, 4], [1, -1, -1, -1]])}
    weights[:, :, 1:] = [[1.0, 0.0], [np.nan, np.nan]]
    (tmp_path / "b.png").write_bytes(picture(hand_made(attention=weights, **changes)))
    white = (255, 255, 255)
    assert alike(tmp_path / "b.png", white).sum() > alike(tmp_path / "a.png", white).sum() + 10_000


class Page(HTMLParser):
    """Tags, attributes and words of a page; a tag that is not closed in order fails."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self.open = set(), [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_needs_nothing_and_trusts_no_text():
    changes = {"prompt": HOSTILE, "answers": [HOSTILE] * 3}
    changes["words"] = [[HOSTILE, '" onclick="x'], [HOSTILE, "\x00\n"], [HOSTILE]]
    text = page(hand_made(**changes), HOSTILE, Sampling(top_p=0.9), harmless)
    found = Page(text)
    assert found.tags <= {
        *("html", "head", "meta", "title", "style", "body", "main", "p", "h1", "h2", "pre", "dl"),
        *("div", "dt", "dd", "table", "tr", "th", "td", "i", "span", "svg", "rect", "path"),
        *("figure", "figcaption"),
    }
    names = {name for name, _ in found.attributes}
    assert not any(name.startswith("on") for name in names) and not names & {"src", "href"}
    assert "url(" not in text and "@import" not in text and "<script" not in text
    assert "\x1b" not in text and "\u202e" not in text and "\x00" not in text
    words = "".join(found.words)
    assert "<script>alert('x')</script>" in words  # shown as it is, as text
    assert "&amp;" in words


def test_the_page_says_row_step_token_and_figure():
    found = Page(page(hand_made(), "model", Sampling(), harmless))
    titles = [value.replace("  ", " ") for name, value in found.attributes if name == "title"]
    assert "row 1, step 1: c\nattention from the others 0.500\nentropy 0.000 nats" in titles
    assert "layer 1, step 1: 0.625 to others (even 0.500)\nrow 0 b 0.750\nrow 1 c 0.500" in titles
    assert "layer 3: row 1 looks at row 0: 0.667" in titles
    assert {"step 1: mean entropy 0.250 nats", "step 1: 50% say the same"} <= {*found.words}
    # Entropies up to 2: a line down from 1 to 0.5, and a dash at 0 of the row with one step.
    lines = [value for name, value in found.attributes if name == "d"]
    assert {"M0.5,0.5000L1.5,0.7500", "M0.3,1.0000h0.4"} <= {*lines}


def test_files_are_written_beside_the_view(traced, tmp_path):
    files = ("--png", tmp_path / "a.png", "--html", tmp_path / "a.html")
    run(traced / "all", "--trace", "<b>Hi</b>", *SHORT, *files)
    assert_drawn(tmp_path / "a.png")
    found = Page((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert "b" not in found.tags and "<b>Hi</b>" in found.words
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "a.png"]


# What is refused


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("host", ("--trace", "Hi"), "has no Bridge blocks.* bridge init adds them"),
        ("all", ("--trace", "Hi", "--layer", 7), "--layer 7: has no Bridge block.*: 0, 1, 2"),
        ("mlp", ("--trace", "Hi", "--layer", 1), "blocks of kind mlp have no attention"),
        ("all", ("--trace", "Hi", "--width", 0), "width must be 1 or above"),
        ("all", ("--trace", "Hi", "--temperature", -1), "temperature must be 0 or above"),
        ("all", ("--trace", " "), "prompt 0 is empty"),
        ("all", ("--trace", "Hi", "--length", 9), "--length is for sizes"),
        ("all", ("--trace", "Hi", "--tensors"), "--tensors is for sizes"),
        ("all", ("--html", "x.html"), "--html is of a trace; add --trace PROMPT"),
        ("all", ("--seed", 0), "--seed is of a trace"),
        ("all", ("--max-new-tokens", 9), "--max-new-tokens is of a trace"),
        ("all", ("--trace", "Hi", "--raw", "--system", "x"), "--system is part of a chat"),
        ("nowhere", ("--trace", "Hi"), "nowhere"),
    ],
)
def test_refusals_are_one_line(traced, tmp_path, monkeypatch, name, arguments, words):
    monkeypatch.chdir(tmp_path)
    said = run(traced / name, *arguments, code=2)
    [line] = said.stderr.splitlines()
    assert line.startswith("error: ")
    assert re.search(words, line), line
    assert not said.stdout and not list(tmp_path.iterdir())


def test_without_a_checkpoint_it_is_the_bundled_one():
    assert "3 attention blocks" in run().stdout
    said = json.loads(run("--trace", "3 5 2 7 = 8 ?", "--json", "--width", "2").stdout)
    assert said["checkpoint"] == str(BUNDLED) and len(said["answers"]) == 2
    strange = run("--trace", "Hi", code=2).stderr
    assert "knows nothing of 'Hi'" in strange and len(strange.splitlines()) == 1


@pytest.mark.parametrize("option", ["--png", "--html"])
def test_files_are_not_replaced(traced, tmp_path, option):
    (tmp_path / "here").write_text("kept")
    said = run(traced / "all", "--trace", "Hi", *SHORT, option, tmp_path / "here", code=2).stderr
    assert "exists already" in said and (tmp_path / "here").read_text() == "kept"
    run(traced / "all", "--trace", "Hi", *SHORT, option, tmp_path / "no" / "x", code=2)


def test_without_matplotlib_the_mend_is_named_at_once(traced, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("bridge.model.load", refuse)
    said = run(traced / "all", "--trace", "Hi", "--png", tmp_path / "a.png", code=2).stderr
    assert "pip install 'bridge-llm[plots]'" in said


# Colours


def test_scales_hold_what_they_are_of():
    scale = scale_of(np.array([0.812, 0.93, np.nan]))
    assert (scale.low, scale.high) == pytest.approx((0.8, 0.95))
    assert scale.colour(0.8) == VIRIDIS[0] and scale.colour(0.95) == VIRIDIS[-1]
    assert scale_of(np.array([0.5, 0.5])).high > 0.5 and scale_of(np.array([np.nan])) == Scale(0, 1)
    assert scale.digit(0.8) == "0" and scale.digit(0.95) == "9" and scale.digit(np.nan) == " "
    assert not is_bright(VIRIDIS[0]) and is_bright(VIRIDIS[-1])
