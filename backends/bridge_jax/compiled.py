"""What is compiled: for which sizes, with how much effort, and for how long it is kept. Only JAX
has need of this file.

Sizes come in buckets, so that few are compiled as batches grow, shrink and change. A model so small
that compiling takes longer than it will ever compute is compiled with less effort.
"""

import hashlib
import os
import platform
from collections.abc import Callable
from contextlib import suppress
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

MAPS, MAPPINGS = Path("/proc/self/maps"), 20_000
WORTH_KEEPING = 0.1  # seconds of compiling from which on its result goes to a file
SMALL = 2**20  # parameters of a model below which compiling is most of the time
# XLA's older emitters of CPU code, in one piece, without LLVM's optimisations: a ninth of the time.
QUICK = {
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
    "xla_backend_optimization_level": 0,
}


def make_room() -> None:
    """Forget what was compiled before a process has so many memory mappings that XLA crashes.

    Each compiled function keeps some, and Linux allows 65530: thousands of models in one process,
    as conformance loads, would reach that.
    """
    try:
        mappings = MAPS.read_bytes().count(b"\n")
    except OSError:  # not Linux: no such limit
        return
    if mappings > MAPPINGS:
        jax.clear_caches()


def keep() -> None:
    """Have what is compiled kept in the user's cache directory, for the processes to come.

    Whoever names a directory of JAX's own (JAX_COMPILATION_CACHE_DIR), or turns its cache off
    (JAX_ENABLE_COMPILATION_CACHE=0), has it so.
    """
    settings: Any = jax.config
    if settings.jax_compilation_cache_dir or not settings.jax_enable_compilation_cache:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bridge"
    where = home / f"jax-{hashlib.sha256(_processor().encode()).hexdigest()[:16]}"
    with suppress(OSError):  # no home, no space: compiled anew each time
        where.mkdir(mode=0o700, parents=True, exist_ok=True)
        settings.update("jax_compilation_cache_dir", str(where))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            settings.update("jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING)
        compilation_cache.reset_cache()  # else it stays as it was at the process's first function


def _processor() -> str:
    """What CPU code is compiled for: a home directory may be shared by unlike machines."""
    try:
        described = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(line for line in described if line.startswith(("flags", "Features")))


def bucket(n: int, floor: int = 1) -> int:
    """The smallest size for which functions are compiled that holds n: a power of two or, from 8
    on, one and a half of one; at least `floor`."""
    size = 1 << max(n - 1, 0).bit_length()
    size = size * 3 // 4 if size > 8 and n <= size * 3 // 4 else size
    return max(size, floor)


def fine(n: int, floor: int = 1) -> int:
    """As `bucket`, in steps of an eighth of the power of two above n, for what computes long enough
    to be worth compiling for; 0 for 0."""
    step = max((1 << max(n - 1, 0).bit_length()) // 8, 1)
    return max(-(-n // step) * step, floor) if n else 0


@cache
def known_options() -> dict[str, Any]:
    """Those of `QUICK` that this XLA has: they come and go with its versions, and to ask for one
    that it has not is an error."""
    return {name: value for name, value in QUICK.items() if _knows(name, value)}


def _knows(name: str, value: Any) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


class Compiled:
    """A jitted function; the keyword `quick` says with which effort it is compiled."""

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        """`options` are those of `jax.jit`."""
        self.function, self.options = function, options
        self.full = jax.jit(function, **options)
        self.__doc__ = function.__doc__

    @cached_property
    def quick(self) -> Callable[..., Any]:
        """The same with less effort."""
        return jax.jit(self.function, compiler_options=known_options(), **self.options)

    def __call__(self, *arguments: Any, quick: bool, **keywords: Any) -> Any:
        return (self.quick if quick else self.full)(*arguments, **keywords)


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Compiled]:
    """Decorates a function of arrays; `options` are those of `jax.jit`."""
    return lambda function: Compiled(function, **options)
