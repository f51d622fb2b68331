"""The written spec beside this package: what its clauses are called, and its golden vectors.

In a checkout they lie in `spec/`; a wheel carries them inside the package.
"""

import re
from functools import cache
from pathlib import Path

from bridge.errors import BridgeError


@cache
def directory() -> Path:
    """Where `bridge-1.0.md` and `golden/` are. Raises BridgeError where they are missing."""
    here = Path(__file__).parent
    for place in (here / "spec", here.parent.parent / "spec"):
        if (place / "golden").is_dir():
            return place
    raise BridgeError("the golden vectors of the spec are missing; install bridge-llm again")


@cache
def titles() -> dict[str, str]:
    """The heading of every clause and chapter, by its number."""
    text = (directory() / "bridge-1.0.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^#{2,3} (\d+(?:\.\d+)?) (.+)$", text, re.MULTILINE))


def golden_files() -> list[Path]:
    """Every golden vector, by name."""
    return sorted((directory() / "golden").glob("*.safetensors"))
