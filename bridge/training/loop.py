"""`train`: a run from its settings to its final checkpoint, or on from where it was stopped.

Everything is checked, and the model loaded, before the directory is made. Then, again and again: a
step, its record, a checkpoint where one is due, an evaluation where one is due. A step is a pure
function of the weights, the optimizer's state, the settings and its number, which a checkpoint
holds: so a resumed run is the run that was not stopped.
"""

from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

from bridge.checkpoints.reading import open_checkpoint
from bridge.checkpoints.tensors import content_hash
from bridge.contract import SFT, AdamW
from bridge.errors import BridgeError
from bridge.model import build, trainable_names
from bridge.tasks import Scores, Task
from bridge.training import grpo
from bridge.training.ahead import look_ahead
from bridge.training.directory import RunDirectory, absolute, check_directory
from bridge.training.health import Health
from bridge.training.log import Log, LoggedStep, PolicyStep, check_sinks, open_sinks, read_log
from bridge.training.rollouts import evaluate, split_size
from bridge.training.run import Run
from bridge.training.saving import Best, ModelWriter, Progress
from bridge.training.schedule import VALIDATION, stream_seed
from bridge.training.settings import GRPOSettings, Settings, SFTSettings
from bridge.training.sft import WarmUp
from bridge.training.watch import Interrupt, Silent, Stopped, Watcher


class Learner(Protocol):
    """SFT or GRPO: what a step is."""

    @property
    def steps(self) -> int: ...
    def step(self, step: int) -> dict[str, Any]: ...
    def position(self, step: int) -> int: ...


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
    base = None if settings.base is None else Path(settings.base)
    opened = open_checkpoint(Path(settings.checkpoint), base)
    names = trainable_names(opened.config, settings.trained)
    writer = ModelWriter(opened, names, settings.adapter)
    check_sinks(settings.log)
    task = find_task(settings) if task is None else task
    if settings.eval_every and task is not None:
        split_size(task, "validation")

    def load() -> Any:
        where = (settings.backend, settings.device, settings.dtype)
        return build(opened, opened.config, opened.tensors, *where)

    model = load()
    sft = isinstance(settings, SFTSettings)
    trainer = model.trainer(
        SFT() if sft else grpo.objective(_grpo(settings)),
        optimizer(settings),
        names,
        checkpoint_activations=settings.checkpoint_activations,
    )
    ahead = None if started else look_ahead(settings, model, task)
    digest = content_hash(opened.tensors, opened.specs)
    with ExitStack() as stack:
        directory = stack.enter_context(RunDirectory.open(settings, resume))
        progress = Progress(source=digest, seed=settings.seed)
        latest = directory.latest()
        if latest is not None:
            progress = latest[0]
            if progress.source != digest:
                raise BridgeError(
                    f"{opened.path}: has changed since {directory.path} started from it; put back "
                    "what was there, or choose another out"
                )
            trainer.restore(latest[1])
        del latest
        if directory.finished and progress.step >= getattr(settings, "steps", progress.step):
            return _result(settings, directory, progress, progress.step)
        interrupt = stack.enter_context(
            Interrupt(lambda: watch.note("stopping after this step; Ctrl-C again to stop at once"))
        )
        if scorer is None and task is not None:
            from bridge.tasks import Scorer

            scorer = stack.enter_context(Scorer(task, time_limit=settings.reward_seconds))
        first = progress.step + 1 if directory.same else 0
        sinks = open_sinks(settings.log, directory.path, settings.to_json(), first)
        logged = LoggedStep if sft else PolicyStep
        log = Log(directory.log, progress.step, sinks, directory.same, logged)
        stack.callback(log.close)
        health = Health(settings, opened.config.vocab_size, log.before, watch.note)
        run = Run(
            *(settings, directory, model, trainer, writer, log, watch, interrupt, health, progress),
            *(task, scorer),
        )
        learner: Learner
        if isinstance(settings, SFTSettings):
            learner = WarmUp(run, settings, None if ahead is None else ahead.data)
        else:
            chosen = _grpo(settings)
            learner = grpo.PolicySteps(run, chosen, load() if chosen.beta else None)
        first = progress.step
        _follow(run, learner)
        return _result(settings, directory, run.progress, first or None)


def _follow(run: Run, learner: Learner) -> None:
    """Steps up to the last, then `final`."""
    settings, total = run.settings, learner.steps
    run.watch.started(run.progress.step, total)
    while True:
        step = run.progress.step
        every = settings.eval_every
        try:
            run.interrupt.boundary()
            if every and (step % every == 0 or step == total):
                _evaluate(run)
            if step >= total:
                break
            figures = learner.step(step)
        except (Exception, Stopped) as error:
            if run.at_boundary and step:  # nothing of this step was learnt: keep what was before
                place = run.save()
                if isinstance(error, Stopped):
                    run.watch.note(f"saved {place}; the same command goes on from there")
            raise
        run.done(learner.position(step + 1))
        _record(run, {"kind": "step", "step": step + 1, **figures})
        run.health.record({"kind": "step", **figures})
        if (step + 1) % settings.save_every == 0 or step + 1 == total:
            run.save()
    run.health.end()
    run.watch.phase("save")
    said = {"kind": settings.kind, **vars(run.progress)}
    run.directory.save_model("final", run.trainer.state(), run.writer, said)


def _evaluate(run: Run) -> None:
    """An evaluation of this boundary; the best one's checkpoint is kept."""
    assert run.task is not None and run.scorer is not None
    run.phases("evaluate")
    seed = stream_seed(run.settings.seed, VALIDATION, 0)
    with run.interrupt.dropping():
        found = evaluate(run.model, run.task, run.scorer, run.settings, seed)
    seconds = run.phases.take()
    step = run.progress.step
    _record(run, {"kind": "evaluation", "step": step, **found, **seconds})
    best = run.progress.best
    if best is None or _merit(found) > _merit(best):
        kept = cast(Best, {"step": step, **found})
        run.progress = replace(run.progress, best=kept)
        said = {"kind": run.settings.kind, "evaluation": kept}
        run.directory.save_model("best", run.trainer.state(), run.writer, said)


def _merit(evaluation: Any) -> tuple[float, float]:
    """What the best evaluation has most of; the earliest of equals stays."""
    return evaluation["accuracy"], evaluation["reward_mean"]


def _record(run: Run, record: dict[str, Any]) -> None:
    run.log.write(record)
    run.watch.record(record)


def find_task(settings: Settings) -> Task | None:
    """The task that the settings name; None where they name none."""
    if not settings.task:
        return None
    from bridge.tasks import find_task as find

    return find(settings.task, **settings.task_options)


def optimizer(settings: Settings) -> AdamW:
    """As the settings say."""
    first, second = settings.betas
    return AdamW(
        settings.lr,
        (first, second),
        settings.adam_eps,
        settings.weight_decay,
        settings.max_grad_norm,
    )


def _grpo(settings: Settings) -> GRPOSettings:
    assert isinstance(settings, GRPOSettings)
    return settings


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
