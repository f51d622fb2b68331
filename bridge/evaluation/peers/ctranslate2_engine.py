"""CTranslate2, of the host as its converter writes it.

Rows are hypotheses of one prompt (`num_hypotheses`), sampled from the whole distribution. It tells
nothing of its steps, so that the time to the first token is that of a call for one token.
"""

import time
from typing import Any

from bridge.evaluation.peers.engine import Call, Seconds, Setup

DIRECTORY = "ctranslate2"


class CTranslate2Session:
    """A generator of CTranslate2."""

    def __init__(self, generator: Any, words: list[str]) -> None:
        self.generator, self.words = generator, words

    def decode(self, call: Call) -> Seconds:
        """Two calls: of one token, and of all."""
        return Seconds(self._call(call, 1), self._call(call, call.new))

    def _call(self, call: Call, new: int) -> float:
        start = time.perf_counter()
        [found] = self.generator.generate_batch(
            [[self.words[token] for token in call.prompt]],
            num_hypotheses=call.width,
            beam_size=1,
            sampling_topk=0,
            sampling_temperature=1.0,
            max_length=new,
            min_length=new,
            include_prompt_in_result=False,
        )
        assert [len(ids) for ids in found.sequences_ids] == [new] * call.width
        return time.perf_counter() - start


def prepare(setup: Setup) -> None:
    """Convert the host."""
    from ctranslate2.converters import TransformersConverter

    converter = TransformersConverter(str(setup.host), low_cpu_mem_usage=True)
    converter.convert(str(setup.scratch / DIRECTORY), quantization=setup.entry.weights)


def load(setup: Setup) -> CTranslate2Session:
    """The generator, and the words that it calls tokens by."""
    import json

    import ctranslate2

    directory = setup.scratch / DIRECTORY
    generator = ctranslate2.Generator(
        str(directory),
        device=setup.device.partition(":")[0],
        compute_type=setup.entry.weights,
        inter_threads=1,
        intra_threads=setup.threads,
    )
    words = json.loads((directory / "vocabulary.json").read_text(encoding="utf-8"))
    return CTranslate2Session(generator, words)
