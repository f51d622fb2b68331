"""Bridge itself, by the contract: any backend, with the blocks or as the host alone."""

import time
from typing import Any

import numpy as np

from bridge.checkpoints.reading import open_checkpoint
from bridge.contract import BackendModel, Sampling
from bridge.evaluation.peers.engine import Call, Decoded, Setup, tokens_of
from bridge.model import build
from bridge.registry import DTYPES

AHEAD = 8  # tokens that are drawn at most before any is looked at, as when text is generated


class BridgeSession:
    """A loaded model of ours."""

    def __init__(self, model: BackendModel, room: int) -> None:
        """`room`: tokens that a row may come to have, the same in every call, since what a backend
        compiles may depend on it."""
        self.model, self.room = model, room

    def decode(self, call: Call) -> Decoded:
        """As the engine of `bridge.decoding` does, without text."""
        sampling = Sampling(temperature=call.temperature, seed=call.seed)
        start = time.perf_counter()
        decoder = self.model.prefill([tokens_of(call)], [call.width], self.room - len(call.prompt))
        drawn = [decoder.sample_ahead(sampling, 1, ())]
        first = time.perf_counter() - start
        while left := call.new - sum(part.shape[1] for part in drawn):
            decoder.advance()
            drawn.append(decoder.sample_ahead(sampling, min(left, AHEAD), ()))
        whole = time.perf_counter() - start
        return Decoded(first, whole, np.concatenate(drawn, 1).tolist())


def load(setup: Setup) -> BridgeSession:
    """The checkpoint on the entry's backend."""
    opened, entry = open_checkpoint(setup.checkpoint), setup.entry
    config = opened.config if entry.blocks else opened.config.without_bridge()
    if entry.weights in DTYPES:
        kind: dict[str, Any] = {"dtype": entry.weights}
    else:
        kind = {"weights": entry.weights}
    model = build(opened, config, opened.tensors, entry.backend, setup.device, **kind)
    return BridgeSession(model.implementation, setup.context)
