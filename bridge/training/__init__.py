"""Training, written once for every backend: SFT warm-up, then GRPO (chapter 7).

    from bridge.training import GRPOSettings, train

    train(GRPOSettings(checkpoint="smol-bridge", out="run", task="reasoning-gym:countdown"))

A run is a directory, and what happens in it is a pure function of its settings: killed at any
moment and started again, it ends with the same weights, to the byte, on a CPU.
"""

from bridge.training.settings import GRPOSettings, Settings, SFTSettings, read_settings
from bridge.training.start import Result, train

__all__ = ["GRPOSettings", "Result", "SFTSettings", "Settings", "read_settings", "train"]
