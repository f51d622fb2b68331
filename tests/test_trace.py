"""What the sharing does: weights against torch, figures worked by hand, and every view of them."""

import json
import re
import sys
from functools import cache
from html.parser import HTMLParser
from io import BytesIO, StringIO

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from safetensors.numpy import load_file, save_file
from tiny_host import write_host
from typer.testing import CliRunner

import bridge
from bridge.config import BridgeConfig
from bridge.contract import Sampling
from bridge.errors import BridgeError
from bridge.generation import Response, ResponseSet
from bridge.initialise import init
from bridge.inputs import default_positions
from bridge.trace import Trace, trace
from bridge.trace_alike import agree_from, agreement, distinct_n, diversity, edit_distance
from bridge.trace_plots import plot_trace
from bridge_cli.main import app
from bridge_cli.trace_colours import VIRIDIS, Scale, is_bright, scale_of
from bridge_cli.trace_html import page
from bridge_cli.trace_view import View
from bridge_ref.block import bridge_block
from bridge_ref.model import hidden_states
from bridge_ref.trace import rows_weights

PLAIN = {"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"}
SHORT = ("--width", "3", "--max-new-tokens", "6", "--backend", "numpy")
HOSTILE = "</pre><script>alert('x')</script><img src=\"http://x\" onerror=x>\x1b[2J\u202e$x^$ &amp;"


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A host; models of it whose blocks do something, of both kinds; and one with fresh blocks."""
    out = tmp_path_factory.mktemp("traced")
    write_host(out / "host")
    rng = np.random.default_rng(1)
    kinds = {"all": {}, "last": {"layers": "2"}, "mlp": {"kind": "mlp"}}
    for name, options in kinds.items():
        init(out / "host", out / name, heads=2, head_dim=4, **options)
        tensors = load_file(out / name / "model.safetensors")
        for key in tensors:
            if key.endswith(("bridge.o_proj.weight", "bridge.down_proj.weight")):
                tensors[key] = rng.normal(size=tensors[key].shape).astype(np.float32)
            if key.endswith(("bridge.q_proj.weight", "bridge.k_proj.weight")):
                tensors[key] *= 8  # weights that differ from even ones
        save_file(tensors, out / name / "model.safetensors", metadata={"format": "pt"})
    init(out / "host", out / "fresh", heads=2, head_dim=4)
    return out


def exact(path):
    return bridge.load(path, backend="numpy", dtype="float64")


def answered(prompt, *rows, reasons=None):
    """A group's answers, given."""
    reasons = reasons or ["length"] * len(rows)
    responses = [
        Response(f"row {n}", list(row), reason)
        for n, (row, reason) in enumerate(zip(rows, reasons, strict=True))
    ]
    return ResponseSet("a prompt", list(prompt), responses)


def run(*arguments, code=0, env=PLAIN):
    result = CliRunner(env=env).invoke(app, ["inspect", *map(str, arguments)])
    if result.exit_code != code:
        raise AssertionError(f"exit {result.exit_code}: {result.output}") from result.exception
    return result


# Weights, norm ratios and entropies, against what others compute


def torch_weights(h, groups, active, weights, heads, eps):
    """p of clause 3.5 by torch's own norm and attention: with the unit vectors for values, what
    attention gives is its weights. Cells that are not active are left as NaN."""
    h = torch.from_numpy(np.where(active[:, :, None], h, 0))
    w = {name: torch.from_numpy(value) for name, value in weights.items()}
    x = torch.nn.functional.rms_norm(h, h.shape[-1:], w["norm.weight"], eps)
    B, S, _ = x.shape
    q, k = (
        (x @ w[f"{name}_proj.weight"].T).reshape(B, S, heads, -1).permute(1, 2, 0, 3)
        for name in "qk"
    )
    there = torch.from_numpy(active.T)
    same = torch.from_numpy(groups[:, None] == groups)
    allowed = same & there[:, :, None] & there[:, None, :]
    unit = torch.eye(B, dtype=x.dtype).expand(S, heads, B, B)
    p = torch.nn.functional.scaled_dot_product_attention(q, k, unit, allowed[:, None])
    return p.transpose(0, 1).numpy()


def test_weights_of_a_block_are_torchs():
    rng = np.random.default_rng(0)
    B, S, D, H, d = 6, 5, 12, 3, 4
    shapes = {
        "q_proj": (H * d, D),
        "k_proj": (H * d, D),
        "v_proj": (H * d, D),
        "o_proj": (D, H * d),
    }
    weights = {f"{name}.weight": rng.normal(size=shape) for name, shape in shapes.items()}
    weights["norm.weight"] = rng.normal(size=D)
    groups, active = np.array([7, 3, 7, 3, 3, 9]), rng.random((B, S)) < 0.7
    config = BridgeConfig("attention", H, d, (0,), 1e-6)
    h = rng.normal(size=(B, S, D))
    h[~active] = np.nan  # which must have no influence
    found = rows_weights(bridge_block(h, groups, active, weights, config)[1])
    wanted = torch_weights(h, groups, active, weights, H, config.norm_eps)
    for s in range(S):
        for b in range(B):
            if active[b, s]:
                np.testing.assert_allclose(found[:, s, b], wanted[:, s, b], rtol=1e-12, atol=1e-15)
                np.testing.assert_allclose(found[:, s, b].sum(axis=-1), 1, rtol=1e-12)
            else:
                assert not found[:, s, b].any()
            shut = ~active[:, s] | (groups != groups[b])
            assert not found[:, s, b][:, shut].any()
    assert (active.sum(axis=1) > 0).all() and not active.all()


def test_a_watched_model_gives_the_weights_of_its_own_residual_stream(paths):
    """Blocks on the last layer read what the host alone gives."""
    model = exact(paths / "last")
    tensors = dict(model.implementation.tensors())
    rng = np.random.default_rng(2)
    tokens, groups = rng.integers(1, 257, (5, 6)), np.array([0, 1, 0, 1, 1])
    active = np.arange(6) < np.array([[6], [4], [3], [6], [5]])
    positions, drawn = default_positions(active), active & (np.arange(6) >= 2)
    plain = model.config.without_bridge()
    h, _ = hidden_states(plain, tensors, tokens, groups, active, positions)
    seen = model.implementation.watch(
        tokens, groups, active, positions, drawn, Sampling(temperature=0.7)
    )
    names = ("norm", "q_proj", "k_proj")
    weights = {f"{n}.weight": tensors[f"model.layers.2.bridge.{n}.weight"] for n in names}
    wanted = torch_weights(h, groups, active, weights, 2, model.config.bridge.norm_eps)
    assert seen.attention.shape == (1, 2, 6, 5, 5)
    where = active.T[:, :, None] & np.ones(5, bool)
    np.testing.assert_allclose(
        seen.attention[0][:, where], wanted[:, where], rtol=1e-10, atol=1e-14
    )
    assert not seen.attention[0][:, ~where].any()
    assert np.ptp(wanted[:, where]) > 0.2  # they are not even
    logits = model.logits(tokens, groups=groups, active=active)
    softmax = torch.distributions.Categorical(logits=torch.from_numpy(logits).float() / 0.7)
    np.testing.assert_allclose(
        seen.entropy[drawn], softmax.entropy().numpy()[drawn], rtol=1e-5, atol=1e-6
    )
    assert not seen.entropy[~drawn].any()


def test_entropy_is_of_the_tokens_that_can_be_drawn(paths):
    model = exact(paths / "all")
    tokens, active = np.array([[5, 6, 7]]), np.ones((1, 3), bool)
    batch = (tokens, np.zeros(1, int), active, default_positions(active), active)
    found = model.implementation.watch(*batch, Sampling(temperature=0.9, top_k=4)).entropy
    logits = torch.from_numpy(model.logits(tokens, groups=[0]))
    four = torch.distributions.Categorical(logits=logits.topk(4).values / 0.9)
    np.testing.assert_allclose(found, four.entropy().numpy(), rtol=1e-6)
    assert (model.implementation.watch(*batch, Sampling(top_k=1)).entropy == 0).all()


@pytest.mark.parametrize("name", ["all", "last", "mlp"])
def test_norm_ratios_are_those_of_the_contract(paths, name):
    model = exact(paths / name)
    answers = answered([5, 6], [7, 8, 9, 1], [7, 3], [4, 4, 4])
    found = trace(model, answers, Sampling())
    tokens = np.array([[5, 6, 7, 8, 9], [5, 6, 7, 0, 0], [5, 6, 4, 4, 0]])
    active = np.arange(5) < np.array([[5], [3], [4]])
    positions = default_positions(active)
    wanted = model.implementation.norm_ratios(tokens, np.zeros(3, int), active, positions)
    np.testing.assert_array_equal(found.norm_ratios, wanted)
    assert (wanted > 0).all() and len(wanted) == len(found.layers)
    assert (found.attention is None) == (name == "mlp")


# A trace


def test_the_worked_figure_of_the_spec(paths):
    """Clause 2.5: three rows that end after 4, 2 and 3 tokens."""
    reasons = ["eos", "eos", "length"]
    answers = answered([10, 11], [20, 21, 22, 0], [23, 0], [24, 25, 26], reasons=reasons)
    found = trace(exact(paths / "all"), answers, Sampling())
    assert found.tokens.tolist() == [[20, 21, 22, 0], [23, 0, -1, -1], [24, 25, 26, -1]]
    assert (found.width, found.steps, found.heads, found.layers) == (3, 4, 2, (0, 1, 2))
    # At step 0 the prompt's last token is fed, then what each row said.
    reads = [{0, 1, 2}, {0, 1, 2}, {0, 2}, {0}]
    for t, rows in enumerate(reads):
        for row in range(3):
            seen = found.attention[:, :, t, row]
            if row in rows:
                np.testing.assert_allclose(seen.sum(axis=-1), 1, rtol=1e-12)
                assert (seen[..., sorted(rows)] > 0).all()
                assert not seen[..., sorted({0, 1, 2} - rows)].any()
            else:
                assert np.isnan(seen).all()
    np.testing.assert_allclose(found.attention[:, :, 0], 1 / 3)  # rows are still the same
    assert np.isnan(found.entropy).tolist() == (found.tokens < 0).tolist()
    assert np.isnan(found.to_others()).tolist() == [(found.tokens.T < 0).tolist()] * 3
    assert found.even().tolist() == pytest.approx([2 / 3, 2 / 3, 1 / 2, 0])
    assert not found.to_others()[:, 3, 0].any()  # alone
    assert found.diversity().edit_distance == pytest.approx((3 + 3 + 3) / 3)  # without EOS
    assert found.words[0][3] == "<eos>" and found.words[0][0] == chr(ord("!") + 20 - 1)


def test_rows_that_say_the_same_look_at_all_alike(paths):
    found = trace(exact(paths / "all"), answered([5], *[[6, 7, 8]] * 4), Sampling())
    np.testing.assert_allclose(found.attention, 1 / 4, rtol=1e-12)
    assert found.agree_from() == 0 and found.diversity().edit_distance == 0
    apart = trace(exact(paths / "all"), answered([5], [6, 7, 8], [9, 7, 8]), Sampling())
    assert np.ptp(apart.attention[:, :, 1:]) > 0.1


def hand_made(**changes):
    """Two layers with one head; three rows, the last of which ends after one step."""
    even = np.full((3, 3), 1 / 3)
    later = np.array([[0.25, 0.75, 0], [0.5, 0.5, 0], [np.nan] * 3])
    other = np.array([[0.75, 0.25, 0], [1, 0, 0], [np.nan] * 3])
    made = {
        "prompt": "p",
        "prompt_tokens": [1],
        "answers": ["a b", "a c", "d"],
        "reasons": ["length", "length", "eos"],
        "tokens": np.array([[1, 2], [1, 3], [0, -1]]),
        "words": [["a", " b"], ["a", " c"], ["<eos>"]],
        "kind": "attention",
        "layers": (1, 3),
        "attention": np.array([[[even, later]], [[even, other]]]),
        "norm_ratios": np.array([0.5, 0.25]),
        "entropy": np.array([[1.0, 0.5], [2.0, 0.0], [0.0, np.nan]]),
        "greedy": False,
    }
    return Trace(**(made | changes))


def test_maps_of_rows_worked_by_hand():
    found = hand_made()
    np.testing.assert_allclose(found.to_others()[0], [[2 / 3] * 3, [0.75, 0.5, np.nan]])
    np.testing.assert_allclose(found.to_others()[1, 1], [0.25, 1, np.nan])
    # Row 0 in layer 1: 1/3, 1/3, 1/3 and then 0.25, 0.75, 0; row 2 only at step 0.
    np.testing.assert_allclose(found.looks(1)[0], [7 / 24, 13 / 24, 1 / 6])
    np.testing.assert_allclose(found.looks(1)[2], [1 / 3] * 3)
    np.testing.assert_allclose(found.looks()[0], [(7 / 24 + 13 / 24) / 2] * 2 + [1 / 6])
    np.testing.assert_allclose(found.looks().sum(axis=1), 1)
    np.testing.assert_allclose(found.heard(1), [[1 / 3] * 3, [0.5, 0.75, np.nan]])
    np.testing.assert_allclose(found.heard(), [[1 / 3] * 3, [0.75, 0.5, np.nan]])
    np.testing.assert_allclose(found.mean_entropy(), [1.0, 0.25])
    with pytest.raises(BridgeError, match="layer 2 has no Bridge block; layers with one: 1, 3"):
        found.looks(2)
    with pytest.raises(BridgeError, match="mlp blocks read no other rows"):
        hand_made(kind="mlp", attention=None).to_others()


def test_its_json_has_null_where_a_row_has_ended():
    said = json.loads(json.dumps(hand_made().to_json(), allow_nan=False))
    assert said["entropy"] == [[1.0, 0.5], [2.0, 0.0], [0.0, None]]
    assert said["to_others"][0] == [[0.666667] * 3, [0.75, 0.5, None]]
    assert said["attention"][1][1] == [[0.75, 0.25, 0.0], [1.0, 0.0, 0.0], [None] * 3]
    assert said["to_others_by_head"] == [[0.65], [0.65]]
    assert said["answers"][2] == {"text": "d", "finish_reason": "eos", "tokens": [0]}
    assert hand_made(kind="mlp", attention=None).to_json()["looks"] is None


# How alike answers are


def test_distances_and_ngrams_of_textbooks():
    assert edit_distance([*map(ord, "kitten")], [*map(ord, "sitting")]) == 3
    assert edit_distance([*map(ord, "intention")], [*map(ord, "execution")]) == 5
    assert edit_distance([], [1, 2]) == 2 and edit_distance([1, 2], []) == 2
    assert distinct_n([[1, 2, 1], [2, 1]], 1) == 2 / 5
    assert distinct_n([[1, 2, 1], [2, 1]], 2) == 2 / 3
    assert distinct_n([[1], []], 2) is None
    found = diversity(["a ", "a", "b"], [[1, 2], [1, 2], [3]])
    assert (found.answers, found.distinct) == (3, 2)
    assert found.edit_distance == pytest.approx(4 / 3)  # 0, 2 and 2
    assert found.edit_share == pytest.approx(2 / 3)
    alone = diversity(["a"], [[]])
    assert (alone.edit_distance, alone.distinct_1, alone.distinct) == (None, None, 1)


@given(*[st.lists(st.integers(0, 3), max_size=8)] * 2)
def test_the_distance_is_the_least_by_its_definition(a, b):
    @cache
    def least(i, j):
        if not i or not j:
            return i + j
        swap = least(i - 1, j - 1) + (a[i - 1] != b[j - 1])
        return min(swap, least(i - 1, j) + 1, least(i, j - 1) + 1)

    assert edit_distance(a, b) == least(len(a), len(b))


@pytest.mark.parametrize(
    ("rows", "shares", "start"),
    [
        (["abcd", "abcd"], [1, 1, 1, 1], 0),
        (["abcd", "axcd"], [1, 0.5, 1, 1], 2),  # one of two is no agreement
        (["abcd", "axcx"], [1, 0.5, 1, 0.5], None),
        (["abcd", "abcx", "xbyc", "zbyz"], [0.5, 1, 0.5, 0.25], None),
        (["xbcd", "abcx", "ybyd", "zbyz"], [0.25, 1, 0.5, 0.5], 1),
        (["abcd", "ab", "xb"], [2 / 3, 1, None, None], 0),  # one left has nobody to agree with
        (["ab", "xy", "a"], [2 / 3, 0.5], None),
        (["abc"], [None, None, None], None),
    ],
)
def test_when_rows_agree(rows, shares, start):
    T = max(map(len, rows))
    tokens = np.array([[ord(c) for c in row] + [-1] * (T - len(row)) for row in rows])
    np.testing.assert_allclose(agreement(tokens), np.array(shares, float))
    assert agree_from(tokens) == start


# The command


def test_the_json_is_of_the_answers_that_generate_gives(paths):
    asked = (paths / "all", "--trace", "Hi", *SHORT, "--seed", 3, "--raw", "--temperature", 0.8)
    said = json.loads(run(*asked, "--json").stdout)
    model = bridge.load(paths / "all", backend="numpy")
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
def test_the_terminal_view_fits(paths, columns):
    env = PLAIN | {"COLUMNS": str(columns)}
    asked = (paths / "all", "--trace", "Hi", "--width", 4, "--backend", "numpy")
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


def test_blocks_without_attention_show_the_rest(paths, tmp_path):
    asked = (paths / "mlp", "--trace", "Hi", *SHORT)
    said = run(*asked, "--png", tmp_path / "a.png", "--html", tmp_path / "a.html").stdout
    assert "P-Match blocks (kind mlp) read no other rows" in " ".join(said.split())
    assert "who looks" not in said and "norm ratio" in said and "entropy" in said
    assert "Who looks" not in (tmp_path / "a.html").read_text()
    assert_drawn(tmp_path / "a.png")
    assert json.loads(run(*asked, "--json").stdout)["attention"] is None


def test_fresh_blocks_are_said_to_add_nothing(paths):
    said = run(paths / "fresh", "--trace", "Hi", *SHORT).stdout
    assert "these blocks add nothing yet" in said
    assert "add nothing" not in run(paths / "all", "--trace", "Hi", *SHORT).stdout


def test_one_row_has_no_others(paths, tmp_path):
    asked = (paths / "all", "--trace", "Hi", "--width", 1, "--max-new-tokens", 3)
    said = run(*asked, "--png", tmp_path / "a.png", "--html", tmp_path / "a.html").stdout
    assert "1 of 1 answers" in said and "attention from other rows" not in said
    assert_drawn(tmp_path / "a.png")


def test_greedy_answers_have_an_entropy_all_the_same(paths):
    said = json.loads(
        run(paths / "all", "--trace", "Hi", *SHORT, "--temperature", 0, "--json").stdout
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
    plot_trace(tmp_path / "a.png", hand_made(attention=weights, **changes))
    assert_drawn(tmp_path / "a.png")
    # Across the map of what rows are heard: row 0, dark, above row 1, bright.
    dark, bright = (
        np.flatnonzero(alike(tmp_path / "a.png", colour).sum(axis=1) > 600)
        for colour in (VIRIDIS[0], VIRIDIS[-1])
    )
    assert len(dark) > 20 and len(bright) > 20 and dark.max() < bright.min()
    changes |= {"tokens": np.array([[1, 2, 3, 4], [1, -1, -1, -1]])}
    weights[:, :, 1:] = [[1.0, 0.0], [np.nan, np.nan]]
    plot_trace(tmp_path / "b.png", hand_made(attention=weights, **changes))
    white = (255, 255, 255)
    assert alike(tmp_path / "b.png", white).sum() > alike(tmp_path / "a.png", white).sum() + 10_000


class Page(HTMLParser):
    """Tags, attributes and words of a page; a tag that is not closed in order fails."""

    VOID = ("meta", "rect", "line", "polyline", "circle")

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self.open = set(), [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in self.VOID or not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)
        if tag == "meta":
            self.open.pop()

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
    text = page(hand_made(**changes), HOSTILE, Sampling(top_p=0.9))
    found = Page(text)
    assert found.tags <= {
        *("html", "head", "meta", "title", "style", "body", "main", "p", "h1", "h2", "pre", "dl"),
        *("div", "dt", "dd", "table", "thead", "tbody", "tr", "th", "td", "svg", "rect", "text"),
        *("line", "polyline", "circle", "figure", "figcaption"),
    }
    names = {name for name, _ in found.attributes}
    assert not any(name.startswith("on") for name in names) and not names & {"src", "href"}
    assert "url(" not in text and "@import" not in text and "<script" not in text
    assert "\x1b" not in text and "\u202e" not in text and "\x00" not in text
    words = "".join(found.words)
    assert "<script>alert('x')</script>" in words  # shown as it is, as text
    assert "&amp;" in words


def test_the_page_says_row_step_token_and_figure():
    found = Page(page(hand_made(), "model", Sampling()))
    titles = [value for name, value in found.attributes if name == "title"]
    assert "row 1, step 1: c\nattention from the others 0.500\nentropy 0.000 nats" in [
        title.replace(":  ", ": ") for title in titles
    ]
    words = [word.replace("  ", " ") for word in found.words]
    assert "layer 1, step 1: 0.625 to others (even 0.500)\nrow 0 b 0.750\nrow 1 c 0.500" in words
    assert "layer 3: row 1 looks at row 0: 0.667" in words


def test_files_are_written_beside_the_view(paths, tmp_path):
    files = ("--png", tmp_path / "a.png", "--html", tmp_path / "a.html")
    run(paths / "all", "--trace", "<b>Hi</b>", *SHORT, *files)
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
def test_refusals_are_one_line(paths, tmp_path, monkeypatch, name, arguments, words):
    monkeypatch.chdir(tmp_path)
    said = run(paths / name, *arguments, code=2)
    [line] = said.stderr.splitlines()
    assert line.startswith("error: ")
    assert re.search(words, line), line
    assert not said.stdout and not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--png", "--html"])
def test_files_are_not_replaced(paths, tmp_path, option):
    (tmp_path / "here").write_text("kept")
    said = run(paths / "all", "--trace", "Hi", *SHORT, option, tmp_path / "here", code=2).stderr
    assert "exists already" in said and (tmp_path / "here").read_text() == "kept"
    run(paths / "all", "--trace", "Hi", *SHORT, option, tmp_path / "no" / "x", code=2)


def test_without_matplotlib_the_mend_is_named_at_once(paths, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("bridge.model.load", refuse)
    said = run(paths / "all", "--trace", "Hi", "--png", tmp_path / "a.png", code=2).stderr
    assert "pip install 'bridge-llm[plots]'" in said


def test_a_backend_that_cannot_be_watched_is_named(paths):
    model = bridge.load(paths / "all", backend="torch")
    with pytest.raises(BridgeError, match="backend torch cannot be watched; load with numpy"):
        trace(model, answered([5], [6]), Sampling())
    with pytest.raises(BridgeError, match="no Bridge blocks"):
        trace(exact(paths / "host"), answered([5], [6]), Sampling())


# Colours


def test_scales_hold_what_they_are_of():
    scale = scale_of(np.array([0.812, 0.93, np.nan]))
    assert (scale.low, scale.high) == pytest.approx((0.8, 0.95))
    assert scale.colour(0.8) == VIRIDIS[0] and scale.colour(0.95) == VIRIDIS[-1]
    assert scale_of(np.array([0.5, 0.5])).high > 0.5 and scale_of(np.array([np.nan])) == Scale(0, 1)
    assert scale.digit(0.8) == "0" and scale.digit(0.95) == "9" and scale.digit(np.nan) == " "
    assert not is_bright(VIRIDIS[0]) and is_bright(VIRIDIS[-1])
