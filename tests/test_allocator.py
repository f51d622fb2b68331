"""Memory that is freed stays with a process that asks for that."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import numpy as np
from bridge_cli.allocator import keep_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(1 << 23)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_memory()
first, again = faults(), faults()
print(again < first / 2)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
@pytest.mark.parametrize("said", [{}, {"MALLOC_TOP_PAD_": "0"}])
def test_freed_memory_is_kept_unless_the_environment_says_how(said):
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=said, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{not said}\n", "")
