"""Whether a run still learns: rewards that teach nothing, and a loss or an entropy that explodes.

It reads the records of the log alone, and those from before a stop are read again: so a run that
goes on judges as the run that was not stopped. It knows no weights, and says rather than does: a
trouble ends the run, a note does not.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from bridge.contract import Batch
from bridge.training.settings import GRPOSettings, Settings

RECENT = 20  # steps whose median is what a figure is at
UNTAUGHT = 3  # first steps without a group whose rewards differ, after which it is said


class Lowest:
    """The lowest that a figure has been, by the median of its recent values; infinite at first."""

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.value = math.inf

    def add(self, value: float) -> None:
        """One more value."""
        self.recent.append(value)
        self.value = min(self.value, median(self.recent))


class Health:
    """Of one run. `records`: those of the log that it goes on from."""

    def __init__(
        self,
        settings: Settings,
        vocab_size: int,
        records: Iterable[Mapping[str, Any]] = (),
        note: Callable[[str], object] = lambda text: None,
    ) -> None:
        """`note` hears what the user should see."""
        self.settings, self.uniform, self.note = settings, math.log(vocab_size), note
        self.loss, self.entropy = Lowest(), Lowest()
        self.steps = self.equal = self.cut = 0
        self.accuracies: set[float] = set()
        self.failed: list[str] = []  # of steps whose rewards all failed, the commonest reason
        for record in records:
            self._add(record)

    def trouble(
        self, metrics: Mapping[str, float], batches: Sequence[Batch]
    ) -> tuple[str, str] | None:
        """Why the run must end with this update, and the setting that says so; None where all is
        well.

        SFT: the loss is above `stop_loss` times its lowest median, and above that of guessing at
        random. GRPO, whose loss is around 0: it is above `stop_loss` times the largest
        advantage (or 1), which only ratios and the KL can bring about; or the entropy is above
        `stop_entropy` of that of the uniform distribution, and was below half of it.
        """
        settings, loss = self.settings, metrics["loss"]
        if not isinstance(settings, GRPOSettings):
            bound = max(settings.stop_loss * self.loss.value, self.uniform)
            if loss > bound:
                was = f", and was {self.loss.value:.4g}" if self.loss.recent else ""
                return f"loss {loss:.4g} is above {bound:.4g}{was}", "stop_loss"
            return None
        given = [np.abs(b.advantages).max() for b in batches if b.advantages is not None]
        bound = settings.stop_loss * max(1.0, *given)
        if loss > bound:
            return f"loss {loss:.4g} is above {bound:.4g}", "stop_loss"
        entropy, bound = metrics.get("entropy", 0.0), settings.stop_entropy * self.uniform
        if entropy > bound and self.entropy.value < self.uniform / 2:
            was = f"was {self.entropy.value:.4g}"
            return f"entropy {entropy:.4g} is above {bound:.4g}, and {was}", "stop_entropy"
        return None

    def record(self, record: Mapping[str, Any]) -> None:
        """A step that was done; the first ones without anything to learn from are noted, once."""
        self._add(record)
        if self.steps == self.equal == UNTAUGHT:
            self.note(f"nothing to learn from in the first {UNTAUGHT} steps: {self._why()}")

    def end(self) -> None:
        """The run is done: note where it has learnt from nothing."""
        if self.steps and self.steps == self.equal:
            self.note(f"nothing was learnt in {self.steps} steps: {self._why()}")

    def _add(self, record: Mapping[str, Any]) -> None:
        if record["kind"] != "step":
            return
        for name, lowest in (("loss", self.loss), ("entropy", self.entropy)):
            value = record.get(name)
            if value is not None and math.isfinite(value):
                lowest.add(value)
        if isinstance(self.settings, GRPOSettings):
            self.steps += 1
            self.equal += (
                record.get("idle_groups", record["equal_groups"]) == self.settings.problems
            )
            self.cut += self.settings.mask_truncated and record["cut_off"] == 1
            self.accuracies.add(record["accuracy"])
            if record["bad_rewards"] == record["rows"]:
                self.failed.append(record.get("bad_reward", "a reward failed"))

    def _why(self) -> str:
        """Of steps without a group whose rewards differ."""
        if self.cut == self.steps:
            return (
                "every row was cut off at max_new_tokens, and mask_truncated leaves those out; "
                "raise max_new_tokens, or leave mask_truncated false"
            )
        said = "no group has rewards that differ, and so no gradient"
        if len(self.failed) == self.steps:
            return f"every reward failed and counts as 0 ({self.failed[0]}); mend the task"
        if self.accuracies == {0.0}:
            return (
                f"{said}, and no response is correct; choose easier problems, a larger width or "
                "max_new_tokens, or warm up with bridge train sft"
            )
        if self.accuracies == {1.0}:
            return f"{said}, since every response is correct; choose harder problems"
        return f"{said}; raise width or temperature, or choose a reward that tells rows apart"
