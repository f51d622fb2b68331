"""Bridge itself, by the contract: any backend, with the blocks or as the host alone."""

import time

from bridge.checkpoints.reading import open_checkpoint
from bridge.contract import BackendModel, Sampling
from bridge.evaluation.peers.engine import Call, Seconds, Setup, tokens_of
from bridge.model import build


class BridgeSession:
    """A loaded model of ours."""

    def __init__(self, model: BackendModel, room: int) -> None:
        """`room`: tokens that a row may come to have, the same in every call, since what a backend
        compiles may depend on it."""
        self.model, self.room = model, room

    def decode(self, call: Call) -> Seconds:
        """As `Model.generate` does, without text."""
        sampling = Sampling(seed=call.seed)
        start = time.perf_counter()
        decoder = self.model.prefill([tokens_of(call)], [call.width], self.room - len(call.prompt))
        decoder.sample(sampling)
        first = time.perf_counter()
        for _ in range(call.new - 1):
            decoder.advance()
            decoder.sample(sampling)
        return Seconds(first - start, time.perf_counter() - start)


def load(setup: Setup) -> BridgeSession:
    """The checkpoint on the entry's backend."""
    opened, entry = open_checkpoint(setup.checkpoint), setup.entry
    config = opened.config if entry.blocks else opened.config.without_bridge()
    model = build(opened, config, opened.tensors, entry.backend, setup.device, entry.weights)
    return BridgeSession(model.implementation, setup.context)
