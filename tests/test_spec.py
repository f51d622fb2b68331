"""The spec's text against the code: clauses, citations, the worked figure, the config's schema."""

import copy
import json
import re
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge import philox
from bridge.config import parse_config
from bridge.decoding.inputs import default_positions
from bridge.errors import BridgeError
from bridge_conformance import strategies
from bridge_conformance.tolerance import FACTOR, FLOOR_ULPS, NUDGES
from bridge_ref.block import allowed_rows
from bridge_ref.optim import CLIP_EPS

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "spec" / "bridge-1.0.md").read_text(encoding="utf-8")
CLAUSES = re.findall(r"^### (\d+\.\d+) ", TEXT, re.MULTILINE)
SCHEMA = json.loads((ROOT / "spec" / "config.schema.json").read_text(encoding="utf-8"))
CITED = re.compile(r"[Cc]lauses? (\d+\.\d+)(?:((?:, \d+\.\d+)*),? (and|to) (\d+\.\d+))?")


def sources():
    folders = ("bridge", "bridge_ref", "backends", "conformance", "cli", "spec", "tests")
    return [path for folder in folders for path in (ROOT / folder).rglob("*.py")]


def citations():
    """Every clause that code cites, with one place that does."""
    found = {}
    for path in sources():
        for first, middle, joint, last in CITED.findall(path.read_text(encoding="utf-8")):
            cited = [first, *re.findall(r"\d+\.\d+", middle), *([last] if last else [])]
            if joint == "to":
                cited = CLAUSES[CLAUSES.index(first) : CLAUSES.index(last) + 1]
            found |= dict.fromkeys(cited, path.name)
    return found


def test_clauses_are_numbered_without_gaps():
    expected = []
    for chapter in range(1, 12):
        count = sum(clause.startswith(f"{chapter}.") for clause in CLAUSES)
        expected += [f"{chapter}.{i}" for i in range(1, count + 1)]
    assert expected == CLAUSES
    assert len(re.findall(r"^## \d+ ", TEXT, re.MULTILINE)) == 11


def test_code_cites_clauses_that_there_are():
    assert {c: f for c, f in citations().items() if c not in CLAUSES} == {}


def test_clauses_of_the_semantics_are_cited():
    chapters = ("2.", "3.", "4.", "5.", "6.", "7.", "8.")
    cited = citations().keys()
    assert [c for c in CLAUSES if c.startswith(chapters) and c not in cited] == []


def test_every_golden_vector_shows_a_clause():
    names = [path.stem for path in (ROOT / "spec" / "golden").iterdir()]
    assert {name.partition("-")[0] for name in names} <= set(CLAUSES)


def figure(title):
    """The cells of a part of the worked figure, by row."""
    lines = re.findall(rf"^row (\d) {title} +(.*)$", TEXT, re.MULTILINE)
    return [cells.split() for _, cells in lines]


def test_the_worked_figure_is_what_the_code_computes():
    """Clause 2.5."""
    tokens, target = figure("tokens"), figure("target")
    active = np.array([[cell == "1" for cell in row] for row in figure("active")])
    responses = (list("abc$"), list("d$"), list("efg"))
    for row, response in enumerate(responses):
        fed = ["p", "q", *response[:-1]]  # clause 2.3
        assert active[row].sum() == 2 + len(response) - 1
        assert tokens[row] == fed + ["."] * (5 - len(fed))
        assert target[row] == [".", *response, *["."] * (4 - len(response))]
    positions = default_positions(active)
    assert positions[0].tolist() == [0, 1, 2, 3, 4] and positions[1].tolist() == [0, 1, 2, 2, 2]
    allowed = allowed_rows(np.zeros(3, int), active)
    for row, reads in enumerate(figure("reads")):
        for step, cell in enumerate(reads):
            assert np.flatnonzero(allowed[row, :, step]).tolist() == [
                int(c) for c in cell if c != "-"
            ]


def test_numbers_in_the_text_are_those_of_the_code():
    for word in (*philox.MULTIPLIERS, *philox.WEYL):
        assert f"`{int(word):08X}`" in TEXT
    floor = f"{FLOOR_ULPS:.0f} ulp(T) max |exact|"
    assert f"{FACTOR:.0f} max(max |own - exact|, max |nudged - exact|, {floor})" in TEXT
    assert NUDGES == 4 and "it is taken four times" in TEXT
    assert f"max_grad_norm / (n + {CLIP_EPS:.0e})".replace("e-06", "e-6") in TEXT


@given(st.data())
def test_the_schema_takes_what_the_parser_takes(data):
    raw = data.draw(strategies.models()).raw
    parse_config(raw)
    jsonschema.validate(raw, SCHEMA)


BAD = {
    "model_type": [None, "gpt2", 3],
    "hidden_size": [0, -4, 2.5, "8", None],
    "num_key_value_heads": [0, "1"],
    "head_dim": [3, 0],
    "rms_norm_eps": [0, -1.0, "small"],
    "hidden_act": ["gelu"],
    "quantization": [
        [],
        4,
        {},
        {"bits": 4},
        {"bits": 7, "group_size": 64},
        {"bits": 4, "group_size": 48},
        {"bits": 4, "group_size": 64, "mode": "mxfp4"},
        {"bits": 4, "group_size": 64, "other": 1},
        {"bits": 4, "group_size": 64, "lm_head": {"bits": 7}},
        {"bits": 4, "group_size": 64, "lm_head": {"other": 1}},
    ],
    "quantization_config": [{"quant_method": "gptq", "bits": 4, "group_size": 64}],
    "bridge": [[], "yes", {}],
    "bridge.kind": ["mlps", None],
    "bridge.layers": [[0, 0], [-1], "all", [0.5]],
    "bridge.norm_eps": [0.0, None],
    "bridge.num_heads": [0, True],
    "bridge.spec_version": ["2.0", 1.0],
    "bridge.extra": [1],
}


@pytest.mark.parametrize("key,value", [(key, value) for key in BAD for value in BAD[key]])
def test_parser_and_schema_refuse_alike(key, value):
    bridge = {
        "spec_version": "1.0",
        "kind": "attention",
        "num_heads": 1,
        "head_dim": 2,
        "layers": [0],
        "norm_eps": 1e-6,
    }
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    good = {"model_type": "llama", **dict.fromkeys(sizes, 4), "num_attention_heads": 2}
    good["bridge"] = bridge
    parse_config(good)
    jsonschema.validate(good, SCHEMA)
    bad = copy.deepcopy(good)
    *outer, last = key.split(".")
    (bad["bridge"] if outer else bad)[last] = value
    with pytest.raises(BridgeError, match=r"^config\.json: ") as caught:
        parse_config(bad)
    assert "\n" not in str(caught.value)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(bad, SCHEMA)
