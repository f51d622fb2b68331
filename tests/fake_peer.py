"""An engine that computes nothing, for tests of `bridge bench --peers`: what it says of itself.

Its figures are those of its weights' name, so that what they come to is known: a row's first token
takes 1 s, every further token of a row `STEP` seconds.
"""

import os
from pathlib import Path

from bridge.evaluation.peers.engine import Call, Decoded, Setup

STEP = {"float32": 0.5, "bfloat16": 0.25, "int8": 30.0}
FILE = "made.txt"


class FakeSession:
    """Decodes by the clock that it makes up."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    def decode(self, call: Call) -> Decoded:
        """What its weights say: float16 raises, int4 ends the process, float64 gives a row less."""
        weights = self.setup.entry.weights
        if weights == "float16" and call.width > 1:
            raise RuntimeError("out of\nfakes")
        if weights == "int4" and call.width > 1:
            os._exit(3)
        rows = call.width - (weights == "float64" and call.width > 1)
        step = STEP.get(weights, 0.5) * call.width
        tokens = [[int(os.environ["OMP_NUM_THREADS"])] * call.new for _ in range(rows)]
        return Decoded(1.0, 1.0 + step * (call.new - 1), tokens)


def prepare(setup: Setup) -> None:
    """Leave the number of its process."""
    (setup.scratch / FILE).write_text(str(os.getpid()))


def load(setup: Setup) -> FakeSession:
    """Raises where another process did not prepare it, or the host is not there."""
    prepared = int((setup.scratch / FILE).read_text())
    if prepared == os.getpid() or not (Path(setup.host) / "model.safetensors").is_file():
        raise RuntimeError("was not prepared")
    return FakeSession(setup)
