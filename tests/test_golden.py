"""The golden vectors: made again byte for byte, and met by every backend (clause 10.4)."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bridge.registry import backends, find_backend
from bridge_conformance import golden
from bridge_conformance.tolerance import allowance

SPEC = Path(__file__).parent.parent / "spec"
VECTORS = {path.stem: golden.Vector.read(path) for path in sorted((SPEC / "golden").iterdir())}
REACHABLE = [name for name, vector in VECTORS.items() if golden.reachable(vector)]
BACKENDS = [(i.name, d) for i in backends() for d in i.devices if "float64" in i.dtypes[d]]
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


@pytest.mark.parametrize("name", REACHABLE)
@pytest.mark.parametrize("backend,device", BACKENDS)
def test_backends_meet_it(backend, device, name):
    vector = VECTORS[name]
    model = golden.load(vector, find_backend(backend), device, "float64")
    got = golden.run(name, vector.settings, vector.inputs, model)
    for output, want in vector.outputs.items():
        # A vector knows its outputs up to its grid; float64 rounding is far below it.
        largest = np.abs(want.astype(np.float64)).max(initial=0)
        allowed = allowance(want.astype(np.float64), want, "float64") + GRID * largest
        assert np.abs(got[output] - want).max(initial=0) <= allowed, output


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
