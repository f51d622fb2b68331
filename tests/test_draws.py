"""What Hypothesis draws under profile `ci` is a function of the test, not of the process's past."""

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge_conformance.cases_json import readable
from bridge_conformance.examine import draw


def drawn():
    """Some of what a property here, and conformance, are run on."""
    found = []

    @settings(max_examples=200)
    @given(st.integers(), st.text(), st.floats())
    def some(number, text, real):
        found.append(repr((number, text, real)))

    some()
    return found + [readable(case) for case in draw(4, "float32", 0, 10)]


@pytest.mark.skipif(settings.get_current_profile_name() != "ci", reason="others explore")
def test_what_is_loaded_does_not_change_what_is_drawn(tmp_path, monkeypatch):
    before = drawn()
    (tmp_path / "many_constants.py").write_text(f"MANY = {[7919 * n for n in range(500)]}")
    monkeypatch.syspath_prepend(tmp_path)
    import many_constants  # pyright: ignore[reportMissingImports]

    assert drawn() == before
    del sys.modules[many_constants.__name__]
