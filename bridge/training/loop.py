"""The loop: step after step, each recorded, with a checkpoint and an evaluation where one is due.

In: the parts of a run and a learner, whose steps these are (`grpo.PolicySteps`, `sft.WarmUp`). Out:
what stands in the run's directory. A step is a pure function of the weights, the optimizer's state,
the settings and its number, which a checkpoint holds: so a resumed run is the run that was not
stopped. Weights change in one place, `Run.update`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from bridge.contract import Batch, Trainer
from bridge.errors import BridgeError
from bridge.model import Model
from bridge.tasks import Scores, Task
from bridge.training.batches import Group, pack
from bridge.training.directory import RunDirectory
from bridge.training.health import Health
from bridge.training.log import Log
from bridge.training.rollouts import evaluate
from bridge.training.saving import Best, ModelWriter, Progress, StateReader
from bridge.training.schedule import VALIDATION, stream_seed
from bridge.training.settings import Settings
from bridge.training.watch import Interrupt, Phases, Stopped, Watcher

LARGE = 1000.0  # advantages above it are those of a reward's scale: std would divide it out


class Learner(Protocol):
    """SFT or GRPO: what a step is."""

    @property
    def steps(self) -> int:
        """Of the whole run."""
        ...

    def step(self, step: int) -> dict[str, Any]:
        """One step, which may call `Run.update`; its figures."""
        ...

    def position(self, step: int) -> int:
        """How much of the data was used before a step."""
        ...


@dataclass
class Run:
    """What both kinds of training work with. `progress` is of the last step boundary."""

    settings: Settings
    directory: RunDirectory
    model: Model
    trainer: Trainer
    writer: ModelWriter
    log: Log
    watch: Watcher
    interrupt: Interrupt
    health: Health
    progress: Progress
    task: Task | None = None
    scorer: Scores | None = None

    def __post_init__(self) -> None:
        self.phases = Phases(self.watch)
        self.at_boundary = True  # whether the weights are those of `progress`

    def follow(self, learner: Learner) -> None:
        """Steps up to the last, then `final`."""
        settings, total = self.settings, learner.steps
        self.watch.started(self.progress.step, total)
        while True:
            step = self.progress.step
            every = settings.eval_every
            try:
                self.interrupt.boundary()
                if every and (step % every == 0 or step == total):
                    self._evaluate()
                if step >= total:
                    break
                figures = learner.step(step)
            except (Exception, Stopped) as error:
                # Where nothing of this step was learnt, what was before it is kept.
                if self.at_boundary and step:
                    place = self.save()
                    if isinstance(error, Stopped):
                        self.watch.note(f"saved {place}; the same command goes on from there")
                raise
            self._done(learner.position(step + 1))
            self._record({"kind": "step", "step": step + 1, **figures})
            self.health.record({"kind": "step", **figures})
            if (step + 1) % settings.save_every == 0 or step + 1 == total:
                self.save()
        self.health.end()
        self.watch.phase("save")
        said = {"kind": settings.kind, **vars(self.progress)}
        self.directory.save_model("final", self._state(), self.writer, said)

    def norms(self, step: int, groups: Sequence[Group]) -> dict[str, Any]:
        """Each `norms_every` steps, how much the blocks add to what they read (clause 3.9), over
        one micro-batch of a step's groups before its update; {} at other steps and without blocks.
        """
        every, bridge = self.settings.norms_every, self.model.config.bridge
        if not every or step % every or bridge is None or not bridge.layers:
            return {}
        self.phases("norms")
        ratios = self.model.norm_ratios(pack(groups, self.settings.micro_batch_tokens)[0])
        return {"norm_ratio": float(ratios.mean()), "norm_ratios": ratios.tolist()}

    def update(self, step: int, batches: Sequence[Batch], lr: float) -> dict[str, float]:
        """One update of the weights. Raises BridgeError, its batch saved, where the loss or the
        gradient is not finite, the gradient's norm is above `stop_grad_norm`, or `Health` finds
        that the loss has exploded."""
        self.at_boundary = False
        metrics = self.trainer.step(batches, lr=lr)
        limit = self.settings.stop_grad_norm
        for name in ("loss", "grad_norm"):
            if not math.isfinite(metrics[name]):
                self._fail(step, batches, f"{name} is {metrics[name]}")
        if metrics["grad_norm"] > limit:
            what = f"grad_norm {metrics['grad_norm']:.3g} is above {limit:.3g}"
            self._fail(step, batches, what, "stop_grad_norm")
        if trouble := self.health.trouble(metrics, batches):
            self._fail(step, batches, *trouble)
        return metrics

    def save(self) -> Path:
        """A checkpoint of this boundary."""
        assert self.at_boundary
        self.watch.phase("save")
        self.log.sync()
        return self.directory.save(self.progress, self._state(), self.writer, self.settings.keep)

    def _evaluate(self) -> None:
        """An evaluation of this boundary; the best one's checkpoint is kept."""
        assert self.task is not None and self.scorer is not None
        self.phases("evaluate")
        seed = stream_seed(self.settings.seed, VALIDATION, 0)
        with self.interrupt.dropping():
            found = evaluate(self.model, self.task, self.scorer, self.settings, seed)
        seconds = self.phases.take()
        step, best = self.progress.step, self.progress.best
        self._record({"kind": "evaluation", "step": step, **found, **seconds})
        if best is None or _merit(found) > _merit(best):
            kept = cast(Best, {"step": step, **found})
            self.progress = replace(self.progress, best=kept)
            said = {"kind": self.settings.kind, "evaluation": kept}
            self.directory.save_model("best", self._state(), self.writer, said)

    def _state(self) -> StateReader:
        return StateReader(self.trainer, self.model.config, self.writer.trained)

    def _done(self, problems: int) -> None:
        """The step after `progress` is done, and so are so many problems of the data."""
        self.progress = replace(self.progress, step=self.progress.step + 1, problems=problems)
        self.at_boundary = True

    def _record(self, record: dict[str, Any]) -> None:
        self.log.write(record)
        self.watch.record(record)

    def _fail(self, step: int, batches: Sequence[Batch], what: str, bound: str = "") -> None:
        """Stop, with the batch kept; `bound` is the setting that it goes past. The weights are
        those after the update: what they were before is not copied at each step, but whoever goes
        on with `save_every` at 1 comes here again and has it."""
        kept = self.directory.save_failed(step + 1, batches)
        steps = self.directory.steps()
        last, start = "there is no checkpoint yet", ""
        if steps:
            last = f"the last checkpoint is {self.directory.place(steps[-1])}"
            start = ", which may start from it"
        if step not in {0, *steps}:
            last += " (the same command with save_every 1 keeps the one before this step)"
        go_on = f", or raise {bound} to go on with this one" if bound else ""
        mend = "lower lr or max_grad_norm in a new run"
        given = [np.abs(b.advantages).max() for b in batches if b.advantages is not None]
        if (largest := max(given, default=0.0)) > LARGE:
            mend = f"advantages reach {largest:.3g}: scale the reward down, or set normalise_std"
            mend += ", in a new run"
        raise BridgeError(
            f"step {step + 1}: {what}; its batch is {kept}, and {last}; {mend}{start}{go_on}"
        )


def _merit(evaluation: Any) -> tuple[float, float]:
    """What the best evaluation has most of; the earliest of equals stays."""
    return evaluation["accuracy"], evaluation["reward_mean"]
