"""Low-rank updates of the host's matrices (clause 5.10): which there are, and how they count.

They are no part of `config.json`: a checkpoint that has some keeps them in files of their own, as
PEFT writes them (clause 9.13).
"""

from dataclasses import dataclass

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraConfig:
    """Updates of one rank on the `targets` of every layer: some of `TARGETS`, in that order. What
    fresh ones hold, clause 8.3 says."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = TARGETS

    @property
    def scale(self) -> float:
        """What `lora_B(lora_A(x))` is multiplied by."""
        return self.alpha / self.rank
