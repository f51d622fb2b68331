"""Training, written once for every backend: SFT warm-up, then GRPO (chapter 7).

    from bridge.training import GRPOSettings, train

    train(GRPOSettings(checkpoint="smol-bridge", out="run", task="reasoning-gym:countdown"))

In: settings, which name a checkpoint and a task. Out: a run, which is a directory with a log and
checkpoints, `best` and `final` among them. What happens in it is a pure function of its settings:
killed at any moment and started again, it ends with the same weights, to the byte, on a CPU.

One step of GRPO, from top to bottom:

    loop      `Run.follow`: the next step; then its record, a checkpoint, an evaluation
    grpo      `PolicySteps.step`: responses, their advantages, one update or more
    rollouts  `roll_out`: problems become groups of responses with rewards
    batches   `pack`: groups become micro-batches, which `Run.update` learns from

`sft` takes the place of `grpo` in a warm-up. What goes before the first step is in `start` (`train`
itself) and `plan` (`--dry-run`); what falls on which step, in `schedule`. `directory`, `saving` and
`log` are what is kept, `watch` who sees it, and `health` whether the run still learns.
"""

from bridge.training.settings import GRPOSettings, Settings, SFTSettings, read_settings
from bridge.training.start import Result, train

__all__ = ["GRPOSettings", "Result", "SFTSettings", "Settings", "read_settings", "train"]
