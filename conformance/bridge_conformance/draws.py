"""What Hypothesis draws, by its seed alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from hypothesis.internal.conjecture import providers


@contextmanager
def by_seed_alone() -> Iterator[None]:
    """Keep Hypothesis from drawing numbers that it found in modules: which those are depends on
    what is loaded and on how it was installed, and with them every case after the first such."""
    internals = ("_local_constants", "_get_local_constants", "CONSTANTS_CACHE")
    if not all(hasattr(providers, name) for name in internals):  # another version of Hypothesis
        yield
        return
    none, cache = type(providers._local_constants), type(providers.CONSTANTS_CACHE)
    with patch.multiple(providers, _get_local_constants=none, CONSTANTS_CACHE=cache(1024)):
        yield
