"""Decoding of a random host beside other engines on the device: `bridge bench --peers` in bfloat16.

The engines are Bridge's backend, transformers, and vLLM where it is installed. The checkpoint, of
the sizes of `accelerator_speed`, is written for them into a directory that goes away.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from accelerator_speed import WORK, Found, RandomTensors, raw_config

from bridge.checkpoints.reading import open_checkpoint
from bridge.checkpoints.tensor_specs import TensorSpec
from bridge.checkpoints.writing import write_checkpoint
from bridge.config import parse_config
from bridge.contract import Backend
from bridge.evaluation.peers.measure import run
from bridge.evaluation.peers.plan import plan
from bridge.evaluation.peers.results import Workload
from bridge.numbers.machine import available_processors
from bridge.registry import backends

ENGINES = ("transformers", "vLLM")
WIDTHS = (1, 8, 64)
ROUNDS, SECONDS = 2, 8.0  # which fit the stage


def peers(backend: Backend, device: str, size: str, machine: dict[str, Any]) -> Iterator[Found]:
    """Tokens a second and the time to the first token of each engine that there is."""
    raw, work = raw_config(size), WORK[size]
    tensors = RandomTensors(parse_config(raw))
    specs = {name: TensorSpec(np.dtype(tensors.dtype), s) for name, s in tensors.shapes.items()}
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "bridge"
        write_checkpoint(out, raw, specs, tensors.items())
        planned = plan(backends(), device, engines=(backend.name, *ENGINES), weights=("bfloat16",))
        threads = 1 if size == "tiny" else available_processors()
        sizes = Workload(WIDTHS, work["steps"], work["prompt"], ROUNDS, SECONDS, threads)
        results = run(open_checkpoint(out), planned, device, sizes, print)
    for found in results.found:
        figures = found.to_json()
        rates = ((width, found.tokens_per_second(width)) for width in WIDTHS)
        told = ", ".join(f"{rate:.0f} at width {width}" for width, rate in rates if rate)
        yield found.entry.label, figures, f"{found.entry.label}: tokens a second: {told or 'none'}"
    for missing in (*results.absent, *results.failed):
        yield missing.name, {"why": missing.why}, f"{missing.name}: {missing.why}"
