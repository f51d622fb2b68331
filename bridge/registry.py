"""Finding backends: entry points of the group `bridge.backends`, built-in or a third party's alike.

Nothing is imported until it is asked for, since a framework may be absent, heavy or broken; what is
wrong is kept as text that says how to mend it, and never hides the other backends.
"""

import os
import re
import sys
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, PackageNotFoundError, distribution, entry_points
from importlib.util import find_spec

from bridge.contract import Backend, NarrowBackend
from bridge.errors import BridgeError

GROUP = "bridge.backends"
EXTRAS = ("torch", "jax", "mlx")
DTYPES = ("float64", "float32", "bfloat16", "float16")
ALIASES = {
    "f64": "float64",
    "fp64": "float64",
    "f32": "float32",
    "fp32": "float32",
    "bf16": "bfloat16",
    "f16": "float16",
    "fp16": "float16",
    "half": "float16",
}


@dataclass(frozen=True)
class BackendInfo:
    """One registered backend: where it runs, or the problem that keeps it from running."""

    name: str
    installed: bool
    devices: list[str] = field(default_factory=list)  # best first
    dtypes: dict[str, list[str]] = field(default_factory=dict)  # by device, default first
    problem: str | None = None


def backends() -> list[BackendInfo]:
    """Every registered backend, best first: those on an accelerator, then the fastest on CPUs."""
    found = []
    for name, point in _registered().items():
        try:
            backend = _construct(name, point)
        except BridgeError as error:
            found.append(BackendInfo(name, installed=False, problem=str(error)))
            continue
        devices = backend.devices()
        dtypes = {device: backend.dtypes(device) for device in devices}
        found.append(BackendInfo(name, True, devices, dtypes))
    return sorted(found, key=_preference)


def find_backend(name: str | None) -> Backend:
    """The backend of that name; None: the first of `backends()` that works, found without importing
    those that cannot be it: once one works on a CPU, those after it without an accelerator.

    Raises BridgeError for an unknown name, and for a backend whose framework is not installed.
    """
    registered = _registered()
    if name is None:
        return _best(registered)
    if name not in registered:
        known = ", ".join(sorted(registered))
        raise BridgeError(f"backend {name!r} is not known (registered: {known})")
    return _construct(name, registered[name])


def resolve_device(backend: Backend, device: str | None) -> str:
    """A device of the backend: None is its best one, and `cuda` means the first `cuda:N`."""
    devices = backend.devices()
    if device is None:
        return devices[0]
    for candidate in devices:
        if device in (candidate, candidate.partition(":")[0]):
            return candidate
    raise BridgeError(
        f"device {device!r} is not there for backend {backend.name!r} (has: {', '.join(devices)})"
    )


def resolve_dtype(backend: Backend, device: str, dtype: str | None, stored: str) -> str:
    """The dtype to compute in. None: on a CPU the backend's default, elsewhere the stored one."""
    able = backend.dtypes(device)
    if dtype is None:
        return stored if stored in able and not device.startswith("cpu") else able[0]
    name = ALIASES.get(dtype, dtype)
    if name not in able:
        raise BridgeError(
            f"dtype {dtype!r} is not there for backend {backend.name!r} on {device} "
            f"(has: {', '.join(able)})"
        )
    return name


def weights_of(backend: Backend, device: str) -> list[str]:
    """What it can make a host's matrices of there, if anything (clause 10.5)."""
    return backend.weights(device) if isinstance(backend, NarrowBackend) else []


def _registered() -> dict[str, EntryPoint]:
    points: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        if point.name in points and points[point.name].value != point.value:
            raise BridgeError(
                f"backend {point.name!r} is registered twice, as {points[point.name].value} and "
                f"{point.value}; uninstall one of the two"
            )
        points[point.name] = point
    return points


def _construct(name: str, point: EntryPoint) -> Backend:
    try:
        return point.load()()
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        mend = f"pip install 'bridge-llm[{name}]'" if name in EXTRAS else f"install {missing!r}"
        raise BridgeError(f"backend {name!r} cannot be imported ({error}); try: {mend}") from None
    except Exception as error:  # a broken framework must not take the others down
        raise BridgeError(f"backend {name!r} fails to start: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _best(registered: dict[str, EntryPoint]) -> Backend:
    best = None
    for name in sorted(registered, key=_rank):
        if best is not None and not _may_have_accelerator(name):
            continue
        try:
            backend = _construct(name, registered[name])
        except BridgeError:
            continue
        if not _on_cpu(backend.devices()):
            return backend
        best = best or backend
    if best is None:
        raise BridgeError("no backend works; try: pip install 'bridge-llm[torch]'")
    return best


def _may_have_accelerator(name: str) -> bool:
    """False where what is installed shows, without an import, that a backend has none."""
    if name == "numpy":
        return False
    if name == "jax":  # whose accelerators are plugins, all of them found in one of these ways
        libraries = ("PJRT_NAMES_AND_LIBRARY_PATHS", "TPU_LIBRARY_PATH")
        packages = ("jax_plugins", "libtpu")
        return (
            any(os.environ.get(variable) for variable in libraries)
            or any(find_spec(package) is not None for package in packages)
            or bool(entry_points(group="jax_plugins"))
        )
    if name == "mlx" and sys.platform == "linux":  # where each kind of device is a package
        return not _installed("mlx-cpu") or any(map(_installed, _packages_of("mlx", "mlx-cuda")))
    return True


def _installed(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


def _packages_of(package: str, prefix: str) -> list[str]:
    """What a package names as its parts, in any of its extras, if they start so."""
    if not _installed(package):
        return []
    names = (re.split(r"[^\w.-]", text)[0] for text in distribution(package).requires or ())
    return [name for name in names if name.startswith(prefix)]


def _on_cpu(devices: list[str]) -> bool:
    return not devices or devices[0].startswith("cpu")


def _rank(name: str) -> tuple:
    order = ("torch", "jax", "mlx")  # as fast as they are on CPUs
    return (name == "numpy", order.index(name) if name in order else len(order), name)


def _preference(info: BackendInfo) -> tuple:
    return (not info.installed, _on_cpu(info.devices), *_rank(info.name))
