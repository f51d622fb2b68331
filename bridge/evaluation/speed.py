"""What Bridge costs on this machine: a model against its own host, as ratios within one run.

Written on the contract, so it measures every backend alike. Two things are timed in turn, so that
both meet the same machine; a figure is a ratio of medians, and the first round, which compiles and
warms caches, does not count. Nothing here judges a figure.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bridge.checkpoints.reading import Checkpoint
from bridge.contract import SFT, AdamW, BackendModel, Batch, Sampling
from bridge.decoding.memory import check_decoding, check_training
from bridge.errors import BridgeError
from bridge.model import build, trainable_names
from bridge.numbers.ranges import take

FIGURES = ("decode", "prefill", "train")
SAMPLING = Sampling(temperature=1.0, seed=0)


@dataclass(frozen=True)
class Figure:
    """Two medians in seconds, and `measured / against`."""

    name: str
    what: str
    against: str
    seconds: float
    against_seconds: float

    @property
    def ratio(self) -> float:
        """How many times as long."""
        return self.seconds / self.against_seconds

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {**asdict(self), "ratio": self.ratio}


@dataclass(frozen=True)
class Workload:
    """The sizes that are measured."""

    width: int = 8
    prompt_tokens: int = 128
    steps: int = 32
    rounds: int = 5
    rows: int = 8  # of a training batch, in groups of four
    timesteps: int = 64  # of a training batch

    def check(self, context: int) -> None:
        """Raises BridgeError for a size that is out of its range or past the context."""
        for name, value in asdict(self).items():
            take(name, value)
        if self.rows % 4:
            raise BridgeError(f"rows must be a multiple of 4, groups of four; not {self.rows}")
        if max(self.prompt_tokens + self.steps, self.timesteps) > context:
            raise BridgeError(
                f"prompt_tokens, steps and timesteps go past the context of {context}"
            )


def bench(
    opened: Checkpoint,
    backend: str | None,
    device: str | None,
    dtype: str | None,
    figures: tuple[str, ...] = FIGURES,
    workload: Workload | None = None,
    weights: str | None = None,
) -> Iterator[Figure]:
    """Measure `figures` one after another. `weights`: as for `bridge.load`.
    Raises BridgeError for a host without blocks."""
    workload = Workload() if workload is None else workload
    if opened.config.bridge is None:
        raise BridgeError(f"{opened.path}: has no Bridge blocks to measure; bridge init adds them")
    if unknown := sorted(set(figures) - set(FIGURES)):
        raise BridgeError(f"figure {unknown[0]!r} is not known; use {', '.join(FIGURES)}")
    workload.check(opened.config.max_position_embeddings)
    on, off = (
        build(opened, config, opened.tensors, backend, device, dtype, weights)
        for config in (opened.config, opened.config.without_bridge())
    )
    w = workload
    check_decoding(on.implementation, w.prompt_tokens, w.width, w.steps + 1)
    check_training(opened.config, on.device, on.dtype, w.rows, w.timesteps)
    measures = {"decode": decode, "prefill": prefill, "train": train}
    for name in figures:
        yield measures[name](on.implementation, off.implementation, workload)


def decode(on: BackendModel, off: BackendModel, workload: Workload) -> Figure:
    """A step of sampling and feeding every row."""
    prompt = _prompt(on, workload)
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(workload.rounds + 1):
        decoders = [m.prefill([prompt], [workload.width], workload.steps + 1) for m in (on, off)]
        for _ in range(workload.steps):
            for spent, decoder in zip(seconds, decoders, strict=True):
                start = time.perf_counter()
                decoder.sample(SAMPLING)
                decoder.advance()
                decoder.logits()  # waits, or the other one's step would pay for this one's
                elapsed = time.perf_counter() - start
                if turn:
                    spent.append(elapsed)
    what = f"a decoding step of {workload.width} rows after {workload.prompt_tokens} tokens"
    return _figure("decode", what, "the host without Bridge", seconds)


def prefill(on: BackendModel, off: BackendModel, workload: Workload) -> Figure:
    """A prompt read for all rows, up to their first token, against for one."""
    prompt = _prompt(on, workload)

    def read(width: int) -> None:
        on.prefill([prompt], [width], workload.steps).sample(SAMPLING)

    seconds = _alternate(lambda: read(workload.width), lambda: read(1), workload.rounds)
    what = f"reading {workload.prompt_tokens} tokens for {workload.width} rows"
    return _figure("prefill", what, "for one row", seconds)


def train(on: BackendModel, off: BackendModel, workload: Workload) -> Figure:
    """An SFT update of every tensor, on the same batch."""
    rng = np.random.default_rng(0)
    shape = (workload.rows, workload.timesteps)
    tokens = rng.integers(0, on.config.vocab_size, (shape[0], shape[1] + 1))
    mask = np.ones(shape, bool)
    groups = np.arange(shape[0]) // 4
    batch = Batch(tokens[:, :-1], groups, mask, tokens[:, 1:], mask)
    trainers = [
        m.trainer(SFT(), AdamW(lr=1e-6), trainable_names(m.config, "all")) for m in (on, off)
    ]
    on_trainer, off_trainer = trainers
    seconds = _alternate(
        lambda: on_trainer.step(batch), lambda: off_trainer.step(batch), workload.rounds
    )
    what = f"a training step of {shape[0]} rows of {shape[1]} tokens, every tensor trained"
    return _figure("train", what, "the host without Bridge", seconds)


def _prompt(model: BackendModel, workload: Workload) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, model.config.vocab_size, workload.prompt_tokens)


def _alternate(
    first: Callable[[], object], second: Callable[[], object], rounds: int
) -> tuple[list[float], list[float]]:
    """Seconds of each call, in turn, without the first round."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        for spent, run in zip(seconds, (first, second), strict=True):
            start = time.perf_counter()
            run()
            elapsed = time.perf_counter() - start
            if turn:
                spent.append(elapsed)
    return seconds


def _figure(name: str, what: str, against: str, seconds: tuple[list[float], list[float]]) -> Figure:
    measured, base = (statistics.median(values) for values in seconds)
    return Figure(name, what, against, measured, base)
