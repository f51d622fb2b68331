"""llama.cpp by its own server, in this process (package `xllamacpp`).

Rows are completions of one request (`n`), which the server decodes in one batch; the prompt is read
once and its cache shared. Seconds of decoding are the server's own count.
"""

import time
from typing import Any

from bridge.checkpoints.reading import open_checkpoint
from bridge.errors import BridgeError, one_line
from bridge.evaluation.peers.engine import Call, Decoded, Setup
from bridge.evaluation.peers.gguf_file import ids_of, write_gguf

FILE = "host.gguf"
# The whole distribution: temperature alone of llama.cpp's samplers.
SAMPLING = {"samplers": ["temperature"], "ignore_eos": True}


class LlamaCppSession:
    """A running server, without a port."""

    def __init__(self, server: Any) -> None:
        self.server = server

    def decode(self, call: Call) -> Decoded:
        """One request. The server counts on from its seed, so that each row has its own."""
        asked = {"prompt": list(call.prompt), "n_predict": call.new, "n": call.width}
        asked |= {
            "seed": call.seed * call.width,
            "temperature": call.temperature,
            "cache_prompt": False,
        }
        start = time.perf_counter()
        found = self.server.handle_completions(asked | SAMPLING)
        whole = time.perf_counter() - start
        if "choices" not in found:
            raise RuntimeError(one_line(found.get("message", found)))
        tokens = [ids_of(row["text"]) for row in found["choices"]]
        return Decoded(whole - found["timings"]["predicted_ms"] / 1000, whole, tokens)


def prepare(setup: Setup) -> None:
    """Write the host as GGUF. Raises BridgeError where rows would reach past a sliding window,
    which llama.cpp's Llama has not."""
    opened = open_checkpoint(setup.host)
    if any(window and window < setup.context for window in opened.config.sliding_windows):
        raise BridgeError("its layers have sliding windows, shorter than what is measured")
    write_gguf(opened, setup.scratch / FILE, setup.entry.weights)


def load(setup: Setup) -> LlamaCppSession:
    """A server with a place for each row."""
    from xllamacpp import CommonParams, Server  # pyright: ignore[reportMissingImports]

    params = CommonParams()
    params.model.path = str(setup.scratch / FILE)
    params.n_parallel = setup.widest
    params.n_ctx = setup.widest * setup.context
    params.kv_unified = True  # so that rows share the cells of their prompt
    params.cache_ram_mib = 0  # every call reads its prompt
    params.fit_params = False
    params.n_gpu_layers = 0
    params.verbosity = -1
    for pool in (params.cpuparams, params.cpuparams_batch):
        pool.n_threads = setup.threads
    return LlamaCppSession(Server(params))
