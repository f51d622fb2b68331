"""What a run ran on, as a reader of its report needs to know."""

import platform
import re
from importlib.metadata import PackageNotFoundError, distribution, entry_points, version

from bridge.config import SPEC_VERSION
from bridge.contract import Backend
from bridge.registry import GROUP

OURS = "bridge-llm"


def versions(backend: Backend) -> dict[str, str]:
    """Versions by name: bridge, the spec, the backend's package and frameworks, Python, platform.

    Frameworks are what the package that registers the backend requires; ours requires them in an
    extra of the backend's name.
    """
    found = {"bridge": version(OURS), "spec": SPEC_VERSION}
    point = next((p for p in entry_points(group=GROUP) if p.name == backend.name), None)
    package = point.dist.name if point is not None and point.dist is not None else None
    if package is not None:
        if package != OURS:
            found[package] = version(package)
        for requirement in distribution(package).requires or []:
            name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
            extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", requirement)
            if (extra.group(1) if extra else None) == (backend.name if package == OURS else None):
                found |= _installed(name)
    found |= _installed("numpy")
    return found | {"python": platform.python_version(), "platform": platform.platform()}


def _installed(name: str) -> dict[str, str]:
    try:
        return {name: version(name)}
    except PackageNotFoundError:
        return {}
