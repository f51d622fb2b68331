"""`benchmarks/training.py`: that engines get the same rows, that a difference ends the run, and
what is kept and shown. No time is asserted.
"""

import json
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from tiny_host import write_host

from bridge.checkpoints.initialise import init

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import training
import training_setup
from training_engines import Rows

SIZES = {"width": 3, "prompt": 6, "response": 4, "threads": 1}
REFERENCE = {"backend": "numpy", "backends": "numpy"}  # whose processes begin at once


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Two layers of a tiny host, and our own tree for the one before."""
    init(write_host(tmp_path / "host"), tmp_path / "blocks", heads=2, head_dim=4)
    options = Namespace(
        checkpoint=tmp_path / "blocks", before="HEAD", layers=2, rounds=2, **SIZES, **REFERENCE
    )
    monkeypatch.setattr(training, "BLOCKS_ROUNDS", 1)
    monkeypatch.setattr(training, "find_spec", lambda name: name != "trl")
    small = {"hidden_size": 18, "intermediate_size": 16, "vocab_size": 50}
    monkeypatch.setattr(training, "WIDE", {**training.WIDE, **small})
    made = training_setup.Place(tmp_path, options)
    made.made["before"] = training_setup.ROOT
    return made


def test_every_part_is_measured_and_shown(place, tmp_path):
    parts = {}
    for part in ("tailed", "memory", "blocks"):
        parts[part] = training.MEASURES[part](place, part) | place.asked()
    tailed = parts["tailed"]
    assert list(tailed["seconds"]) == [training.NOW, training.HOST, training.BEFORE]
    assert all(len(found) == 2 and min(found) > 0 for found in tailed["seconds"].values())
    first = tailed["first"]
    assert first[training.NOW]["tokens"] == sum(Rows(3, 16, 8, True).lengths()) == 18
    assert first[training.NOW]["loss"] == pytest.approx(first[training.HOST]["loss"])  # fresh
    assert tailed["times"][training.NOW] == 1
    assert {name: len(found) for name, found in parts["memory"]["bytes"].items()} == {
        "all": 2,
        "bridge": 2,
    }
    assert list(parts["blocks"]["backends"]) == ["numpy"]
    results = {"machine": training.earlier(tmp_path)["machine"], "parts": parts}
    said = training.table(json.loads(json.dumps(results)))
    assert "bridge of HEAD" in said and "1.00 times" in said and "share" in said


def test_rows_are_the_same_for_all_and_their_advantages_standard():
    rows = Rows(5, 7, 16, tailed=True)
    assert rows.lengths() == [16, 11, 8, 6, 4]
    assert rows.tokens(50) == rows.tokens(50)
    assert [len(said) for said in rows.tokens(50)[1]] == rows.lengths()
    assert np.mean(rows.advantages()) == pytest.approx(0) and np.std(rows.advantages()) == 1
    assert Rows(3, 7, 16).lengths() == [16, 16, 16]


def test_engines_that_differ_end_the_run():
    said = {"loss": 0.2, "entropy": 7.4, "grad_norm": 31.39}
    training.agree({training.HOST: said, training.TRL: {**said, "grad_norm": 31.391}})
    training.agree({training.NOW: said, training.HOST: {**said, "grad_norm": 30}})  # it has blocks
    with pytest.raises(SystemExit, match=r"differ in grad_norm: 31\.39 and 31\.5"):
        training.agree({training.HOST: said, training.TRL: {**said, "grad_norm": 31.5}})


def test_a_tree_that_is_not_used_is_noticed(place, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="it took that of"):
        place.bridge(tmp_path / "empty")
