"""CTranslate2, of the host as its converter writes it.

Rows are hypotheses of one prompt (`num_hypotheses`), sampled from the whole distribution. It tells
nothing of its steps, so that the time to the first token is that of a call for one token.
"""

import json
import time
from typing import Any

from bridge.evaluation.peers.engine import Call, Decoded, Setup

DIRECTORY = "ctranslate2"


class CTranslate2Session:
    """A generator of CTranslate2."""

    def __init__(self, generator: Any, words: list[str]) -> None:
        self.generator, self.words = generator, words

    def decode(self, call: Call) -> Decoded:
        """Two calls: of one token, and of all."""
        first, _ = self._call(call, 1)
        return Decoded(first, *self._call(call, call.new))

    def _call(self, call: Call, new: int) -> tuple[float, list[list[int]]]:
        start = time.perf_counter()
        [found] = self.generator.generate_batch(
            [[self.words[token] for token in call.prompt]],
            num_hypotheses=call.width,
            beam_size=1,
            sampling_topk=0 if call.temperature else 1,  # 0: of all
            sampling_temperature=1.0,
            max_length=new,
            min_length=new,
            include_prompt_in_result=False,
        )
        return time.perf_counter() - start, found.sequences_ids


def prepare(setup: Setup) -> None:
    """Convert the host."""
    from ctranslate2.converters import TransformersConverter  # pyright: ignore[reportMissingImports]

    converter = TransformersConverter(str(setup.host), low_cpu_mem_usage=True)
    converter.convert(str(setup.scratch / DIRECTORY), quantization=setup.entry.weights)
    config = setup.scratch / DIRECTORY / "config.json"
    said = json.loads(config.read_text(encoding="utf-8"))
    for name in ("bos_token", "eos_token", "unk_token"):  # a tokenizer need not have each of them
        said[name] = said.get(name) or _words(setup)[0]
    config.write_text(json.dumps(said), encoding="utf-8")


def load(setup: Setup) -> CTranslate2Session:
    """The generator, and the words that it calls tokens by."""
    import ctranslate2  # pyright: ignore[reportMissingImports]

    generator = ctranslate2.Generator(
        str(setup.scratch / DIRECTORY),
        device=setup.device.partition(":")[0],
        compute_type=setup.entry.weights,
        inter_threads=1,
        intra_threads=setup.threads,
    )
    return CTranslate2Session(generator, _words(setup))


def _words(setup: Setup) -> list[str]:
    return json.loads((setup.scratch / DIRECTORY / "vocabulary.json").read_text(encoding="utf-8"))
