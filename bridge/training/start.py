"""`train`: from settings to a run under way, a new one or one that was stopped, and to its result.

Everything is checked and the model loaded before the directory is made, and what a new run will
read is looked at: it is refused here where a prompt is past the context, or a group of rows that
all reach `max_new_tokens` would have to be cut (clause 7.3). Later it would cost what was sampled
by then. What happens from step to step, `loop` says.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bridge.checkpoints.reading import open_checkpoint
from bridge.checkpoints.tensors import content_hash
from bridge.config import tensor_shapes
from bridge.contract import SFT, AdamW, Objective, Trainer
from bridge.decoding.inputs import take_tensor
from bridge.decoding.memory import check_decoding, check_kept, check_training
from bridge.decoding.requests import row_length
from bridge.decoding.stops import read_stops
from bridge.errors import BridgeError
from bridge.model import Model, build
from bridge.tasks import Scorer, Scores, Task, find_task
from bridge.tasks.user_code import take_problems
from bridge.training import grpo
from bridge.training.batches import Group, check_fits
from bridge.training.directory import RunDirectory, absolute, check_directory
from bridge.training.health import Health
from bridge.training.log import Log, LoggedStep, PolicyStep, check_sinks, open_sinks, read_log
from bridge.training.loop import Learner, Run
from bridge.training.rollouts import split_size
from bridge.training.saving import Best, ModelWriter, Progress
from bridge.training.schedule import problem_number
from bridge.training.settings import GRPOSettings, Settings, SFTSettings
from bridge.training.sft import Correct, WarmUp, deal, read_samples, sampled_at_once
from bridge.training.trained import trained_names, with_updates
from bridge.training.watch import Interrupt, Silent, Watcher

FIRST = 64  # prompts that are looked at: those beyond are seen when their turn comes


@dataclass(frozen=True)
class Result:
    """What came of a run."""

    out: str
    kind: str
    steps: int
    final: str
    best: Best | None  # the evaluation of the best checkpoint
    last: dict[str, Any]  # the last step's record
    resumed_from: int | None  # None: it began with this call

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


def train(
    settings: Settings,
    *,
    resume: bool = False,
    task: Task | None = None,
    scorer: Scores | None = None,
    watch: Watcher | None = None,
) -> Result:
    """Run `settings` to the end, from the last checkpoint in `out` if there is one.

    `resume`: `out` must hold a run. `task` and `scorer`: in place of those that the settings name
    (None: a `bridge.tasks.Scorer`, in a process of its own). Raises BridgeError, in one line, and
    KeyboardInterrupt after a Ctrl-C; either way all that was saved is whole, and the same call goes
    on from it.
    """
    settings, watch = absolute(settings), watch or Silent()
    started = check_directory(settings, resume)
    watch.phase("loading")
    source = Source(settings)
    check_sinks(settings.log)
    task = task_of(settings) if task is None else task
    if settings.eval_every and task is not None:
        split_size(task, "validation")
    model = source.load()
    trainer = source.trainer(model, objective(settings))
    ahead = None if started else look_ahead(settings, model, task)
    digest = content_hash(source.opened.tensors, source.opened.specs)
    with ExitStack() as stack:
        directory = stack.enter_context(RunDirectory.open(settings, resume))
        progress = _restore(trainer, directory, source, digest)
        if directory.finished and progress.step >= getattr(settings, "steps", progress.step):
            return _result(settings, directory, progress, progress.step)
        interrupt = stack.enter_context(
            Interrupt(lambda: watch.note("stopping after this step; Ctrl-C again to stop at once"))
        )
        if scorer is None and task is not None:
            scorer = stack.enter_context(Scorer(task, time_limit=settings.reward_seconds))
        first = progress.step + 1 if directory.same else 0
        sinks = open_sinks(settings.log, directory.path, settings.to_json(), first)
        logged = PolicyStep if isinstance(settings, GRPOSettings) else LoggedStep
        log = Log(directory.log, progress.step, sinks, directory.same, logged)
        stack.callback(log.close)
        health = Health(settings, model.config.vocab_size, log.before, watch.note)
        parts = (settings, directory, model, trainer, source.writer, log, watch, interrupt, health)
        run = Run(*parts, progress, task, scorer)
        run.follow(_learner(run, source, ahead))
        return _result(settings, directory, run.progress, progress.step or None)


class Source:
    """The checkpoint that a run starts from: how its model is loaded, trained and saved."""

    def __init__(self, settings: Settings) -> None:
        """Raises BridgeError for one that cannot be opened, or not be trained as the settings
        say."""
        base = None if settings.base is None else Path(settings.base)
        self.settings = settings
        self.opened = with_updates(open_checkpoint(Path(settings.checkpoint), base), settings)
        self.names = trained_names(self.opened.config, settings)
        self.writer = ModelWriter(self.opened, self.names, settings.adapter)

    def load(self) -> Model:
        """A model of its weights, where the settings want it."""
        where = (self.settings.backend, self.settings.device, self.settings.dtype)
        return build(self.opened, self.opened.config, self.opened.tensors, *where)

    def start(self, model: Model) -> dict[str, np.ndarray]:
        """What is trained as it was before the first step, as `model` took it: all that the policy
        at the start needs (clause 7.16), of a run that goes on too."""
        shapes, tensors = tensor_shapes(self.opened.config), self.opened.tensors
        return {name: take_tensor(tensors, name, shapes[name], model.dtype) for name in self.names}

    def trainer(self, model: Model, objective: Objective) -> Trainer:
        """What moves a model's weights towards an objective."""
        given = (objective, optimizer(self.settings), self.names)
        return model.trainer(
            *given,
            checkpoint_activations=self.settings.checkpoint_activations,
            loss_chunk=self.settings.loss_chunk,
        )


def task_of(settings: Settings) -> Task | None:
    """The task that the settings name; None where they name none."""
    return find_task(settings.task, **settings.task_options) if settings.task else None


def objective(settings: Settings) -> Objective:
    """What the updates of a run improve."""
    return grpo.objective(settings) if isinstance(settings, GRPOSettings) else SFT()


def optimizer(settings: Settings) -> AdamW:
    """As the settings say."""
    s, (beta1, beta2) = settings, settings.betas
    return AdamW(s.lr, (beta1, beta2), s.adam_eps, s.weight_decay, s.max_grad_norm)


@dataclass(frozen=True)
class Ahead:
    """What a run will read first, as `look_ahead` saw it."""

    prompts: list[list[int]]  # ids of the first, or of all in a file
    size: int | None  # problems of the data; None: endless
    largest: Group  # of a file; else of the longest prompt, and as long as rows may get
    max_new_tokens: int  # as set, or what the longest prompt leaves
    data: list[Correct] | None  # of a file


def look_ahead(settings: Settings, model: Model, task: Task | None) -> Ahead:
    """The first prompts and the largest group. Raises BridgeError for what would not fit."""
    read_stops(settings.stop, model.tokenizer)
    data, groups, width, asked = None, [], settings.width, {}
    if isinstance(settings, SFTSettings) and settings.data is not None:
        data = read_samples(Path(settings.data), model, settings)
        groups = deal(data, settings, 0)
        prompts, size = [correct.prompt for correct in data], len(data)
    else:
        assert task is not None
        size = split_size(task, "train")
        count = min(settings.problems, FIRST if size is None else min(size, FIRST))
        numbers = [problem_number(size, settings.seed, i) for i in range(count)]
        asked = _encode(settings, model, task, "train", numbers)
        prompts = list(asked.values())
        if isinstance(settings, SFTSettings):
            width = min(width, settings.samples)
    if settings.eval_every and task is not None:
        most = split_size(task, "validation")
        count = min(settings.eval_problems, FIRST if most is None else min(most, FIRST))
        asked |= _encode(settings, model, task, "validation", range(count))
    lengths = {name: len(prompt) for name, prompt in asked.items()}
    length = row_length(settings.max_new_tokens, lengths, model.config.max_position_embeddings)
    if data is None:
        longest = max(prompts, key=len)
        advantages = np.where(np.arange(width) % 2, 1.0, -1.0)
        # Rows that agree nowhere: what they shared would be computed once.
        rows = [[(longest[-1] + row) % model.config.vocab_size] * length for row in range(width)]
        groups = [Group(longest, rows, advantages, "the longest group")]
    largest = max(groups, key=lambda group: group.cells)
    check_fits(largest, settings.micro_batch_tokens)
    config, device, dtype = model.config, model.device, model.dtype
    check_training(config, device, dtype, largest.rows, largest.length, largest.shared)
    if lengths:
        rows, count = settings.width, settings.problems
        if isinstance(settings, SFTSettings):
            rows, count = settings.samples, sampled_at_once(settings)
        check_kept(rows * count, length)
        together = min(count, max(1, settings.max_rows // rows))
        check_decoding(model.implementation, max(lengths.values()), rows, length, together)
    return Ahead(prompts, size, largest, length, data)


def _encode(
    settings: Settings, model: Model, task: Task, split: str, numbers: Sequence[int]
) -> dict[str, list[int]]:
    """Ids of the prompts of problems, by what to call them."""
    chat = model.has_chat_template and not settings.raw
    found = {}
    for problem, number in zip(take_problems(task, split, numbers), numbers, strict=True):
        name = f"task {task.name}: the prompt of problem {number} of {split}"
        found[name] = model.encode(problem.prompt, chat=chat, system=settings.system, name=name)
    return found


def _restore(trainer: Trainer, directory: RunDirectory, source: Source, digest: str) -> Progress:
    """How far the run is: as the newest checkpoint has it, and the trainer after it too."""
    latest = directory.latest()
    if latest is None:
        return Progress(source=digest, seed=source.settings.seed)
    progress, state = latest
    if progress.source != digest:
        raise BridgeError(
            f"{source.opened.path}: has changed since {directory.path} started from it; put back "
            "what was there, or choose another out"
        )
    trainer.restore(state)
    return progress


def _learner(run: Run, source: Source, ahead: Ahead | None) -> Learner:
    """What the run's steps are."""
    settings = run.settings
    if isinstance(settings, GRPOSettings):
        return grpo.PolicySteps(run, settings, source.start(run.model) if settings.beta else {})
    assert isinstance(settings, SFTSettings)
    return WarmUp(run, settings, None if ahead is None else ahead.data)


def _result(
    settings: Settings, directory: RunDirectory, progress: Progress, resumed: int | None
) -> Result:
    steps = [r for r in read_log(directory.log) if r["kind"] == "step"]
    return Result(
        str(directory.path),
        settings.kind,
        progress.step,
        str(directory.path / "final"),
        progress.best,
        steps[-1] if steps else {},
        resumed,
    )
