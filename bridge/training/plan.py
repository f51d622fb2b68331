"""`--dry-run`: what a run would do, what memory it needs, and how long it may take.

Sizes follow from the settings; the time from one measured micro-step and a few measured timesteps
of decoding, on the task's own prompts. Both are upper bounds where they can be: every row is taken
to reach `max_new_tokens`. The weights that the measured step changes are nowhere kept.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import ceil, prod
from typing import Any

from bridge.checkpoints.forms import BLOCK
from bridge.config import tensor_shapes
from bridge.contract import GRPO
from bridge.model import Model
from bridge.tasks import Task
from bridge.training.batches import Group, count_cells, pack
from bridge.training.directory import absolute, check_directory
from bridge.training.memory import Load, first_to_lower, peak
from bridge.training.rollouts import generate
from bridge.training.settings import GRPOSettings, Settings, SFTSettings
from bridge.training.start import Ahead, Source, look_ahead, objective, task_of

TIMESTEPS = 16  # of decoding that are measured


@dataclass(frozen=True)
class Plan:
    """What `--dry-run` shows; bytes and seconds."""

    kind: str
    checkpoint: str
    out: str
    model: str
    task: str
    train_problems: int | None  # None: endless
    trained_parameters: int
    parameters: int
    steps: int  # of SFT: at most
    groups: int  # of a step
    rows: int  # of a step
    updates: int  # of a step
    micro_batches: int  # of an update, at most
    micro_batch: list[int]  # rows, timesteps and computed cells of the largest
    memory: dict[str, int]  # parts of the most at once
    memory_of: dict[str, dict[str, int]]  # what is kept, and what a rollout and an update add
    lower_first: str  # the setting that brings the most of it down
    measured_peak: int | None  # of this process, on a CPU
    seconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


def plan(settings: Settings, *, task: Task | None = None) -> Plan:
    """Load the model, measure, and write nothing. Raises BridgeError for all that `train` refuses
    before its first step."""
    settings = absolute(settings)
    check_directory(settings)
    source = Source(settings)
    task = task_of(settings) if task is None else task
    model = source.load()
    ahead = look_ahead(settings, model, task)
    size, example = ahead.size, ahead.largest
    groups, minibatches, updates = 1, 1, 1
    if isinstance(settings, SFTSettings):
        groups = settings.groups
    elif isinstance(settings, GRPOSettings):
        groups, minibatches = settings.problems, settings.minibatches
        updates = minibatches * settings.epochs
    of_update = ceil(groups / minibatches)
    fitting = min(of_update, settings.micro_batch_tokens // example.cells)
    micro_batches = ceil(of_update / fitting)
    samples = ahead.data is None or settings.eval_every  # else nothing is decoded
    decode = _decoding(settings, ahead, model) if samples else {}
    micro = _micro_step(settings, model, source, [example] * fitting)
    steps = _steps(settings, size)
    parts = _seconds(settings, ahead, decode, micro, micro_batches, updates)
    shapes = tensor_shapes(model.config)
    trained = sum(prod(shapes[name]) for name in source.names)
    rows = fitting * example.rows
    load = Load(
        count_cells([example] * fitting),
        rows * example.alone,
        rows * (example.length - len(example.prompt) + 1),
        micro_batches,
        settings.checkpoint_activations,
        settings.loss_chunk,
        settings.temperature,
        (max(map(len, ahead.prompts)),) * int(decode["groups"]) if decode else (),
        int(decode["width"]) if decode else 1,
        ahead.max_new_tokens,
        packed=model.device.startswith("cpu"),
    )
    foretold = peak(model.config, model.dtype, source.names, load)
    host = any(BLOCK not in name and ".lora_" not in name for name in source.names)
    lower = first_to_lower(foretold.parts, model.dtype, load, host)
    every = settings.eval_every
    evaluations = (steps // every + 1 + bool(steps % every)) if every else 0
    total = steps * parts["step"] + evaluations * parts["evaluation"] + parts["sampling"]
    return Plan(
        settings.kind,
        settings.checkpoint,
        settings.out,
        str(model),
        settings.task or str(getattr(settings, "data", "")),
        size,
        trained,
        sum(prod(shape) for shape in shapes.values()),
        steps,
        groups,
        groups * settings.width,
        updates,
        micro_batches,
        [rows, example.length, load.cells],
        foretold.parts,
        foretold.to_json(),
        lower,
        _peak() if model.device.startswith("cpu") else None,
        {**parts, "total": total},
    )


def _decoding(settings: Settings, ahead: Ahead, model: Model) -> dict[str, float]:
    """Seconds of a timestep of a full decoding batch, and its rows, groups and their width."""
    width = settings.samples if isinstance(settings, SFTSettings) else settings.width
    count = max(1, min(settings.problems, settings.max_rows // width))
    asked = [ahead.prompts[i % len(ahead.prompts)] for i in range(count)]
    timesteps = min(TIMESTEPS, ahead.max_new_tokens)
    short = replace(settings, max_new_tokens=timesteps)
    seconds = _second(lambda: generate(model, asked, short, 0, width))
    return {
        "timestep": seconds / timesteps,
        "rows": count * width,
        "groups": count,
        "width": width,
    }


def _micro_step(
    settings: Settings, model: Model, source: Source, groups: list[Group]
) -> dict[str, float]:
    """Seconds of an update on one full micro-batch, and of its log-probabilities."""
    [batch] = pack(groups, settings.micro_batch_tokens)
    improved = objective(settings)
    if isinstance(improved, GRPO):
        improved = replace(improved, beta=0.0)  # the KL would need a reference, and is little work
    trainer = source.trainer(model, improved)
    logprobs = _second(lambda: model.logprobs(batch))
    # At rate 0 the weights stay as they are, and the second update is timed on the same.
    update = _second(lambda: trainer.step(batch, lr=0.0))
    return {"update": update, "logprobs": logprobs}


def _second(run: Callable[[], object]) -> float:
    """Seconds of a second call: the first may compile."""
    run()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _steps(settings: Settings, size: int | None) -> int:
    if isinstance(settings, GRPOSettings):
        return settings.steps
    assert isinstance(settings, SFTSettings)
    problems = settings.problems if size is None else min(size, settings.problems)
    problems = size if settings.data is not None and size is not None else problems
    parts = ceil(settings.samples / settings.width) if settings.data is None else 1
    return settings.epochs * ceil(problems * parts / settings.groups)


def _seconds(
    settings: Settings,
    ahead: Ahead,
    decode: dict[str, float],
    micro: dict[str, float],
    micro_batches: int,
    updates: int,
) -> dict[str, float]:
    """Of the parts of a step, of an evaluation, and of SFT's sampling."""

    def sampling(problems: int, width: int) -> float:
        if not decode:
            return 0.0
        timesteps = ceil(problems * width / decode["rows"]) * ahead.max_new_tokens
        return timesteps * decode["timestep"]

    update = updates * micro_batches * micro["update"]
    found = {"rollout": 0.0, "logprobs": 0.0, "update": update, "sampling": 0.0, "evaluation": 0.0}
    if isinstance(settings, GRPOSettings):
        found["rollout"] = sampling(settings.problems, settings.width)
        forwards = (updates > 1) + bool(settings.beta)
        found["logprobs"] = forwards * settings.minibatches * micro_batches * micro["logprobs"]
    elif isinstance(settings, SFTSettings) and settings.data is None:
        found["sampling"] = sampling(settings.problems, settings.samples)
    found["step"] = found["rollout"] + found["logprobs"] + found["update"]
    if settings.eval_every:
        found["evaluation"] = sampling(settings.eval_problems, settings.width)
    return found


def _peak() -> int:
    """The most memory that this process has had, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
