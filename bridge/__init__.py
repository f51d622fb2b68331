"""Bridge: N parallel responses to one prompt that see each other while they are generated.

    model = bridge.load("my-checkpoint", backend="torch")
    [answers] = model.generate("What is 17 * 23?", width=8, max_new_tokens=256)

The method is "Generalized Parallel Scaling with Interdependent Generations" (arXiv 2510.01143).
Importing this package imports no framework.
"""

from bridge.checkpoints.conversion import Converted, convert
from bridge.contract import GRPO, SFT, AdamW, Batch, Sampling
from bridge.decoding.events import Response, ResponseSet
from bridge.errors import BridgeError
from bridge.model import Model, load
from bridge.registry import BackendInfo, backends

__version__ = "0.1.0"
__all__ = [
    "GRPO",
    "SFT",
    "AdamW",
    "BackendInfo",
    "Batch",
    "BridgeError",
    "Converted",
    "Model",
    "Response",
    "ResponseSet",
    "Sampling",
    "backends",
    "convert",
    "load",
]
