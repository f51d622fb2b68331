"""Rope settings spelled twice mean the same, and what was added goes away without a trace."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.checkpoints.older_rope import with_older_rope, without_older_rope
from bridge.config import parse_config
from bridge_conformance import strategies


@given(strategies.host_configs(), st.booleans())
def test_an_added_spelling_says_the_same_and_goes_away(raw, outside):
    if outside and "rope_theta" in raw.get("rope_parameters", {}):
        newer = dict(raw["rope_parameters"])
        raw = {**raw, "rope_theta": newer.pop("rope_theta"), "rope_parameters": newer}
    added = with_older_rope(raw)
    assert parse_config(added) == parse_config(raw)
    assert list(without_older_rope(added).items()) == list(raw.items())
    if "rope_parameters" in raw:
        assert added["rope_theta"] == parse_config(raw).rope.rope_theta
        assert added["rope_scaling"]["type"] == parse_config(raw).rope.rope_type
    else:
        assert added == raw


@pytest.mark.parametrize(
    "own",
    [
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 10.0},
        {"rope_scaling": None},
        {},
    ],
)
def test_what_a_config_says_itself_stays(own):
    raw = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10.0}, **own}
    if own:
        assert with_older_rope(raw) == without_older_rope(raw) == raw
    other = {**raw, "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 3.0}}
    assert without_older_rope(other) == other
    assert with_older_rope({"rope_parameters": 3}) == {"rope_parameters": 3}
