"""How torch's threads wait, as libgomp itself says of its settings when it is loaded."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from bridge_torch.threads import SPINS

PROGRAM = """
import os
{first}
import bridge_torch
import torch
print(sorted(name for name in os.environ if name.startswith(("OMP_", "GOMP_"))))
"""
LIBGOMP = Path(find_spec("torch").origin).parent / "lib" / "libgomp.so.1"
pytestmark = pytest.mark.skipif(not LIBGOMP.exists(), reason="libgomp comes with torch for Linux")


def settings(*path, first="", **said):
    """What libgomp shows of itself, and what the environment is left with."""
    path = ":".join([*map(str, path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(first=first)],
        env={"PYTHONPATH": path, "OMP_DISPLAY_ENV": "verbose", **said},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return dict(re.findall(r"(\w+) = '([^']*)'", done.stderr)), done.stdout.strip()


@pytest.fixture
def quick(tmp_path):
    """All of torch that matters here, without its other seconds: it loads its libgomp."""
    (tmp_path / "torch.py").write_text(f"import ctypes\nctypes.CDLL({str(LIBGOMP)!r})")
    return tmp_path


def test_they_spin_for_a_moment():
    shown, left = settings()
    assert shown["GOMP_SPINCOUNT"] == str(SPINS)
    assert left == "['OMP_DISPLAY_ENV']"


@pytest.mark.parametrize(
    "said,spins",
    [
        ({}, str(SPINS)),
        ({"OMP_WAIT_POLICY": "passive"}, "0"),
        ({"OMP_WAIT_POLICY": "active"}, "30000000000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
    ],
)
def test_what_the_environment_says_wins(quick, said, spins):
    shown, left = settings(quick, **said)
    assert shown["GOMP_SPINCOUNT"] == spins
    assert left == str(sorted(["OMP_DISPLAY_ENV", *said]))


def test_who_has_imported_torch_has_chosen(quick):
    shown, left = settings(quick, first="import torch")
    assert shown["GOMP_SPINCOUNT"] == "300000" and left == "['OMP_DISPLAY_ENV']"
