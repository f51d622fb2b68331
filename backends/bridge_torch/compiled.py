"""C sources of this package as libraries, compiled by this machine's own compiler.

In a second or two, once: they are kept in the user's cache directory, by what they are made of.
Without a compiler, or with BRIDGE_TORCH_FUSED=0, there is none, and whoever asked does without.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

POINTER, SIZE, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
Signatures = Mapping[str, Sequence[type]]


def library(
    source: Path, options: tuple[str, ...], functions: Signatures, includes: Sequence[Path] = ()
) -> ctypes.CDLL | None:
    """The library of a source, with the arguments of its functions, which return nothing.
    `includes`: what it includes, by name. None where it is switched off or cannot be had."""
    if os.environ.get("BRIDGE_TORCH_FUSED") == "0":
        return None
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None
    # OpenMP is not linked: its symbols are those that torch has loaded, and so are the threads.
    for threads in ("-fopenmp", "-fopenmp-simd"):
        try:
            made = _compiled(source, compiler, (*options, threads), includes)
            found = ctypes.CDLL(str(made))
        except (OSError, RuntimeError, subprocess.SubprocessError):  # no home, no space, ...
            continue
        for name, arguments in functions.items():
            function = getattr(found, name)
            function.argtypes, function.restype = arguments, None
        return found
    return None


def _compiled(
    source: Path, compiler: str, options: tuple[str, ...], includes: Sequence[Path]
) -> Path:
    """The library, from the cache if this machine has made it before."""
    texts = [file.read_bytes() for file in (source, *includes)]
    made_of = (texts, compiler, options, platform.machine(), _processor())
    key = hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bridge"
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    target = home / f"{source.stem}-{key}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=home) as scratch:
            # Two steps: what links decides what else is linked, such as another OpenMP.
            unit, made = Path(scratch, "made.o"), Path(scratch, "made.so")
            where = [f"-I{directory}" for directory in {file.parent for file in includes}]
            compiling = [compiler, *options, *where, "-c", str(source), "-o", str(unit)]
            linking = [compiler, "-shared", str(unit), "-lm", "-o", str(made)]
            for command in (compiling, linking):
                subprocess.run(command, check=True, capture_output=True, timeout=60)
            made.replace(target)
    return target


def _processor() -> str:
    """What -march=native stands for: a home directory may be shared by unlike machines."""
    try:
        described = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    names = ("model name", "flags", "Features")
    return "\n".join(line for line in described if line.startswith(names))
