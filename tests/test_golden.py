"""The golden vectors: made again byte for byte, and met by every backend (clause 10.4)."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bridge_conformance import golden
from bridge_conformance.checks import CHECKS
from bridge_conformance.checks_golden import GoldenCase, golden_vector_is_met
from bridge_conformance.trial import Nonconformance, Target
from bridge_ref.backend import Reference

SPEC = Path(__file__).parent.parent / "spec"
VECTORS = {path.stem: golden.Vector.read(path) for path in sorted((SPEC / "golden").iterdir())}
GRID = 2.0**-28  # of the largest magnitude's power of two


def check():
    command = [sys.executable, str(SPEC / "make_golden.py"), "--check"]
    return subprocess.run(command, capture_output=True, text=True)


def test_they_regenerate_byte_for_byte():
    result = check()
    assert result.returncode == 0, result.stderr


def test_a_change_is_found(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SPEC))
    import make_golden

    made, kept = tmp_path / "made", tmp_path / "kept"
    for directory in (made, kept):
        directory.mkdir()
        make_golden.make("3.2-norm", directory / "3.2-norm.safetensors")
    assert make_golden.differences(made, kept) == []
    file = kept / "3.2-norm.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    (kept / "9.9-other.safetensors").touch()
    assert make_golden.differences(made, kept) == [file.name, "9.9-other.safetensors"]


@pytest.mark.parametrize("name", VECTORS)
def test_the_reference_meets_it(name):
    vector = VECTORS[name]
    got = golden.compute(name, vector.settings, vector.inputs)
    assert got.keys() == vector.outputs.keys()
    for output, want in vector.outputs.items():
        assert got[output].dtype == want.dtype and got[output].shape == want.shape
        scale = np.abs(want.astype(np.float64)).max(initial=0) if want.dtype.kind == "f" else 0
        np.testing.assert_allclose(got[output], want, rtol=0, atol=2 * GRID * scale)


def test_backends_are_held_to_those_that_the_contract_reaches():
    checked = {check.golden for check in CHECKS.values() if check.golden}
    assert checked >= {name for name, vector in VECTORS.items() if golden.reachable(vector)}
    assert checked >= {"3.6-block", "3.6-block-ragged", "8.1-block-mlp"}


@pytest.mark.parametrize("dtype", ("float64", "float32"))
@pytest.mark.parametrize("name", [c.golden for c in CHECKS.values() if c.golden])
def test_a_backend_that_misses_one_is_found(name, dtype):
    """Outputs that are off by a few thousand ulps are outside the allowance."""
    case = GoldenCase(name)
    outputs = {
        n: a + (a.dtype.kind == "i" or 2.0**-10 * np.abs(a).max(initial=1))
        for n, a in case.vector.outputs.items()
    }
    case.__dict__["vector"] = replace(case.vector, outputs=outputs)
    with pytest.raises(Nonconformance):
        golden_vector_is_met(Target(Reference(), "cpu", dtype, "10.4"), case)


def test_a_wrong_output_is_not_met():
    vector = VECTORS["3.6-block"]
    for change in (lambda a: a * (1 + 1e-6), lambda a: a[::-1]):
        inputs = {**vector.inputs, "weights.v_proj.weight": change(vector.inputs["hidden"][:, 0])}
        with pytest.raises((AssertionError, ValueError)):
            got = golden.compute(vector.name, vector.settings, inputs)
            np.testing.assert_allclose(got["hidden"], vector.outputs["hidden"], atol=1e-7)


def test_they_are_small():
    sizes = [path.stat().st_size for path in (SPEC / "golden").iterdir()]
    assert max(sizes) < 60_000 and sum(sizes) < 1_000_000
