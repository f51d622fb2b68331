"""llama.cpp by its own server, in this process (package `xllamacpp`).

Rows are completions of one request (`n`), which the server decodes in one batch; the prompt is read
once and its cache shared. Seconds of decoding are the server's own count.
"""

import time
from typing import Any

from bridge.checkpoints.reading import open_checkpoint
from bridge.evaluation.peers.engine import Call, Seconds, Setup
from bridge.evaluation.peers.gguf_file import write_gguf

FILE = "host.gguf"
# The whole distribution: temperature alone of llama.cpp's samplers.
SAMPLING = {"samplers": ["temperature"], "temperature": 1.0, "ignore_eos": True}


class LlamaCppSession:
    """A running server, without a port."""

    def __init__(self, server: Any) -> None:
        self.server = server

    def decode(self, call: Call) -> Seconds:
        """One request. Each row has a seed of its own, counted on from the call's."""
        asked = {"prompt": list(call.prompt), "n_predict": call.new, "n": call.width}
        asked |= {"seed": call.seed, "cache_prompt": False, **SAMPLING}
        start = time.perf_counter()
        found = self.server.handle_completions(asked)
        whole = time.perf_counter() - start
        rows = len(found.get("choices", ()))
        if rows != call.width or found["timings"]["predicted_n"] != call.new:
            raise RuntimeError(f"asked for {call.width} rows, and got {rows}: {str(found)[:120]}")
        return Seconds(whole - found["timings"]["predicted_ms"] / 1000, whole)


def prepare(setup: Setup) -> None:
    """Write the host as GGUF."""
    write_gguf(open_checkpoint(setup.host), setup.scratch / FILE, setup.entry.weights)


def load(setup: Setup) -> LlamaCppSession:
    """A server with a place for each row."""
    from xllamacpp import CommonParams, Server

    params = CommonParams()
    params.model.path = str(setup.scratch / FILE)
    params.n_parallel = setup.widest
    params.n_ctx = setup.widest * setup.context
    params.kv_unified = True  # so that rows share the cells of their prompt
    params.cache_ram_mib = 0  # every call reads its prompt
    params.fit_params = False
    params.verbosity = -1
    for pool in (params.cpuparams, params.cpuparams_batch):
        pool.n_threads = setup.threads
    return LlamaCppSession(Server(params))
