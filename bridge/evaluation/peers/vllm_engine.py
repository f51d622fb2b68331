"""vLLM, offline. Not tested: where it was written, vLLM was not installed.

Rows are samples of one request (`n`). It tells nothing of its steps here, so that the time to the
first token is that of a call for one token; its cache of prefixes is off, or the second call would
find the prompt read.
"""

import time
from typing import Any

from bridge.evaluation.peers.engine import Call, Decoded, Setup


class VllmSession:
    """An engine of vLLM's."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def decode(self, call: Call) -> Decoded:
        """Two calls: of one token, and of all."""
        first, _ = self._call(call, 1)
        return Decoded(first, *self._call(call, call.new))

    def _call(self, call: Call, new: int) -> tuple[float, list[list[int]]]:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        asked = SamplingParams(
            n=call.width,
            temperature=call.temperature,
            max_tokens=new,
            ignore_eos=True,
            seed=call.seed,
            detokenize=False,
        )
        start = time.perf_counter()
        prompt = {"prompt_token_ids": list(call.prompt)}
        [found] = self.engine.generate([prompt], asked, use_tqdm=False)
        seconds = time.perf_counter() - start
        return seconds, [list(row.token_ids) for row in found.outputs]


def load(setup: Setup) -> VllmSession:
    """The host, by vLLM alone."""
    from vllm import LLM  # pyright: ignore[reportMissingImports]

    engine = LLM(
        str(setup.host),
        dtype=setup.entry.weights,
        max_model_len=setup.context,
        max_num_seqs=setup.widest,
        gpu_memory_utilization=0.4,  # others are on the device too
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    return VllmSession(engine)
