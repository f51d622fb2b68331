"""Backends are found by entry points; a broken one says how to mend it and hides nobody."""

import subprocess
import sys
import types
from importlib.metadata import EntryPoint
from itertools import product

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


@pytest.fixture
def fakes(points, monkeypatch):
    """Backends of made-up devices, by name; None: one whose framework is missing. Gives the names
    of those that were constructed."""
    made = []

    def install(devices, accelerated):
        entries = []
        for name, there in devices.items():
            module = types.ModuleType(f"fake_{name}")

            def construct(name=name, there=there):
                made.append(name)
                if there is None:
                    raise ImportError(name=name)
                return types.SimpleNamespace(
                    name=name, devices=lambda: there, dtypes=lambda _: ["float32"]
                )

            vars(module)["construct"] = construct
            monkeypatch.setitem(sys.modules, module.__name__, module)
            entries.append(EntryPoint(name, f"{module.__name__}:construct", registry.GROUP))
        points(*entries)
        monkeypatch.setattr(registry, "_may_have_accelerator", accelerated.__contains__)
        made.clear()
        return made

    return install


def test_the_best_backend_is_the_first_of_all_whatever_is_imported(fakes):
    names = ("mlx", "jax", "torch", "another")
    for theirs in product((None, ["cpu"], ["gpu", "cpu"]), repeat=len(names)):
        devices = dict(zip(names, theirs, strict=True)) | {"numpy": ["cpu"]}
        fakes(devices, {name for name, there in devices.items() if there and "gpu" in there})
        assert registry.find_backend(None).name == bridge.backends()[0].name, devices


def test_what_cannot_be_the_best_is_not_imported(fakes):
    on_cpus = {name: ["cpu"] for name in ("numpy", "torch", "jax", "mlx")}
    made = fakes(on_cpus, set())
    assert registry.find_backend(None).name == "torch" and made == ["torch"]
    made = fakes({**on_cpus, "jax": ["tpu:0", "cpu"]}, {"jax", "mlx"})
    assert registry.find_backend(None).name == "jax" and made == ["torch", "jax"]
    made = fakes({**on_cpus, "torch": None}, set())
    assert registry.find_backend(None).name == "jax" and made == ["torch", "jax"]


def test_accelerators_are_told_from_what_is_installed(monkeypatch):
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    monkeypatch.setattr(registry, "entry_points", lambda group: [])
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.delenv("PJRT_NAMES_AND_LIBRARY_PATHS", raising=False)
    assert not registry._may_have_accelerator("jax")
    for found in ("jax_plugins", "libtpu"):
        monkeypatch.setattr(registry, "find_spec", lambda name, found=found: name == found or None)
        assert registry._may_have_accelerator("jax")
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    monkeypatch.setattr(registry, "entry_points", lambda group: [group])
    assert registry._may_have_accelerator("jax")
    monkeypatch.setattr(sys, "platform", "linux")
    parts = ["mlx-cuda-12==1; extra == 'cuda12'", "mlx-cuda-13==1; extra == 'cuda13'"]
    mlx = types.SimpleNamespace(requires=[*parts, "numpy>=2", "mlx-cpu==1; extra == 'cpu'"])
    monkeypatch.setattr(registry, "distribution", lambda name: mlx)
    for there, expected in (
        ({"mlx", "mlx-cpu"}, False),
        ({"mlx", "mlx-cuda-13"}, True),
        ({"mlx", "mlx-cpu", "mlx-cuda-12"}, True),
        (set(), True),  # built by hand: who knows
    ):
        monkeypatch.setattr(registry, "_installed", there.__contains__)
        assert registry._may_have_accelerator("mlx") is expected
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(registry, "_installed", {"mlx-cpu"}.__contains__)
    assert registry._may_have_accelerator("mlx")
    assert registry._may_have_accelerator("another") and registry._may_have_accelerator("torch")


def test_loading_without_a_name_imports_no_more_than_it_must():
    code = (
        "import sys, bridge.registry as r; b = r.find_backend(None); "
        "print(b.name, *(m for m in ('jax', 'mlx') if m in sys.modules and m != b.name and not "
        "r._may_have_accelerator(m)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == [bridge.backends()[0].name]


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
