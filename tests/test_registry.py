"""Backends are found by entry points; a broken one says how to mend it and hides nobody."""

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

import bridge
from bridge import registry
from bridge.errors import BridgeError

NUMPY = EntryPoint("numpy", "bridge_ref.backend:Reference", registry.GROUP)


@pytest.fixture
def points(monkeypatch):
    """Lets a test say which entry points there are."""

    def install(*entries):
        monkeypatch.setattr(registry, "entry_points", lambda group: list(entries))

    return install


def test_the_built_in_backends_are_there():
    names = [info.name for info in bridge.backends() if info.installed]
    assert {"numpy", "torch"} <= set(names) and names[-1] == "numpy"  # the reference comes last


def test_import_bridge_imports_no_framework():
    code = "import sys, bridge; print([m for m in ('torch','jax','mlx') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_missing_framework_names_the_extra_and_hides_nobody(points):
    points(NUMPY, EntryPoint("jax", "bridge_absent.backend:Backend", registry.GROUP))
    found = {info.name: info for info in bridge.backends()}
    assert found["numpy"].installed and not found["jax"].installed
    with pytest.raises(BridgeError, match=r"pip install 'bridge-llm\[jax\]'"):
        registry.find_backend("jax")
    assert registry.find_backend(None).name == "numpy"


def test_a_backend_that_breaks_at_start_is_told_apart(points):
    points(NUMPY, EntryPoint("theirs", "fractions:Fraction.from_float", registry.GROUP))
    found = {info.name: info for info in bridge.backends()}
    assert "fails to start" in (found["theirs"].problem or "")


def test_unknown_and_doubled_names(points):
    points(NUMPY)
    with pytest.raises(BridgeError, match=r"'tpu' is not known \(registered: numpy\)"):
        registry.find_backend("tpu")
    points(NUMPY, EntryPoint("numpy", "theirs:Backend", registry.GROUP))
    with pytest.raises(BridgeError, match="registered twice"):
        registry.find_backend("numpy")


def test_devices_and_dtypes_are_checked_by_name(points):
    points(NUMPY)
    backend = registry.find_backend("numpy")
    assert registry.resolve_device(backend, None) == "cpu"
    with pytest.raises(BridgeError, match=r"device 'cuda' is not there .* \(has: cpu\)"):
        registry.resolve_device(backend, "cuda")
    assert registry.resolve_dtype(backend, "cpu", "bf16", "float32") == "bfloat16"
    assert registry.resolve_dtype(backend, "cpu", None, "bfloat16") == "float64"
    with pytest.raises(BridgeError, match="dtype 'int4' is not there"):
        registry.resolve_dtype(backend, "cpu", "int4", "float32")
