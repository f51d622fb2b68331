"""SFT warm-up: the blocks learn to use what other rows hold, from groups of correct responses.

As the paper does it: 8 responses a problem from the model, correct ones kept, problems with fewer
than two dropped, several correct responses of a problem put into one group; the new parameters
alone are trained. What the paper leaves open: a problem's rows are dealt anew each epoch into as
few groups of at most `width` as hold them, of about equal width, and a row left alone sits out.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bridge.contract import SFT
from bridge.training.batches import Group, check_fits, pack
from bridge.training.directory import SAMPLES
from bridge.training.run import Run
from bridge.training.samples import Correct, make_samples, read_samples
from bridge.training.schedule import GROUPS, ROWS, learning_rate, permutation
from bridge.training.settings import SFTSettings


class WarmUp:
    """The steps of SFT: each one update on `groups` groups, every epoch in an order of its own."""

    objective = SFT()

    def __init__(self, run: Run, settings: SFTSettings, data: list[Correct] | None = None) -> None:
        """Samples first, or goes on with it. `data`: what is in the settings' file, where it was
        read already. Raises BridgeError where nothing is correct."""
        self.run, self.settings = run, settings
        path = run.directory.path / SAMPLES
        if settings.data is None:
            assert run.task is not None and run.scorer is not None
            make_samples(path, run.model, run.task, run.scorer, settings, run.watch, run.interrupt)
        else:
            path = Path(settings.data)
        self.data = read_samples(path, run.model, settings) if data is None else data
        self.dealt: tuple[int, list[Group]] = (0, deal(self.data, settings, 0))
        for group in self.dealt[1]:
            check_fits(group, settings.micro_batch_tokens)
        self.per_epoch = -(-len(self.dealt[1]) // settings.groups)

    @property
    def steps(self) -> int:
        """Of all epochs."""
        return self.settings.epochs * self.per_epoch

    def position(self, step: int) -> int:
        """Groups learnt from before a step."""
        epoch, within = divmod(step, self.per_epoch)
        return epoch * len(self.dealt[1]) + within * self.settings.groups

    def step(self, step: int) -> dict[str, Any]:
        """One update; its figures."""
        settings, run = self.settings, self.run
        epoch, within = divmod(step, self.per_epoch)
        if self.dealt[0] != epoch:
            self.dealt = (epoch, deal(self.data, settings, epoch))
        groups = self.dealt[1]
        order = permutation(len(groups), settings.seed, GROUPS, epoch)
        start = within * settings.groups
        chosen = [groups[i] for i in order[start : start + settings.groups]]
        lr = learning_rate(
            step, self.steps, settings.lr, settings.schedule, settings.warmup, settings.lr_end
        )
        norms = run.norms(step, chosen)
        run.phases("update")
        metrics = run.update(step, pack(chosen, settings.micro_batch_tokens), lr)
        seconds = run.phases.take()
        rows = sum(group.rows for group in chosen)
        rate = metrics["tokens"] / seconds["seconds_update"]
        return {
            "epoch": epoch,
            **metrics,
            **norms,
            "lr": lr,
            "groups": len(chosen),
            "rows": rows,
            "train_tokens_per_second": rate,
            **seconds,
        }


def deal(data: Sequence[Correct], settings: SFTSettings, epoch: int) -> list[Group]:
    """The groups of an epoch: a pure function of seed and epoch, as many in each."""
    groups = []
    for number, correct in enumerate(data):
        rows = correct.responses
        order = permutation(len(rows), settings.seed, ROWS, epoch * len(data) + number)
        parts = -(-len(rows) // settings.width)
        for part in range(parts):
            chosen = [rows[i] for i in order[part::parts]]
            if len(chosen) > 1:
                groups.append(Group(correct.prompt, chosen, name=correct.name))
    return groups
