"""Continuous batching against static batches, in one run: 64 prompts of 8 rows, of uneven lengths.

    python benchmarks/engine.py [--backend torch] [--max-rows 64] [--rounds 2]

Lengths are drawn from a log-normal distribution, half of whose spread is the prompt's and half the
row's own, and forced: the decoder's draws are computed and then replaced, so that a row says EOS
where its length has it and nowhere before. `--forced request` gives all rows of a prompt the
longest's length instead, by its `max_new_tokens`, and leaves draws alone, also those ahead. Static
batches are what an engine makes of as many prompts as fit `--max-rows`, where the next ones must
wait until the last row of these has ended. Both are timed in turn, and given are medians.

`alive`: of the row-steps that were computed, those whose row had not ended. `occupied`: of the
places for rows at all timesteps, those with such a row; and the same while prompts wait for one.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from beside import make
from jaxtyping import Int
from record import RESULTS, record

import bridge
from bridge.contract import BackendModel, Decoder, Sampling
from bridge.decoding.budget import Budget
from bridge.decoding.engine import Engine
from bridge.decoding.requests import Request
from bridge.decoding.stats import Stats
from bridge_cli.machine import processor

EOS, OTHER = 0, 1  # what a row says at its end, and where it drew EOS before it
SAMPLING = Sampling(temperature=1.0, seed=0)


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--median", type=float, default=24, help="length of a response")
    parser.add_argument("--sigma", type=float, default=1, help="of its logarithm")
    parser.add_argument("--longest", type=int, default=384)
    parser.add_argument("--forced", choices=("row", "request"), default="row")
    parser.add_argument("--max-rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--checkpoint", type=Path, help="else SmolLM2-135M with blocks of 2 x 48")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = options.checkpoint or make(Path(scratch))
        how = {"backend": options.backend, "device": options.device, "dtype": options.dtype}
        results = measure(bridge.load(checkpoint, **how), options)
    print(table(results))
    record(results, f"engine-{options.backend}", options.out)


def draw_lengths(options: argparse.Namespace) -> Int[np.ndarray, "prompts width"]:
    """How many tokens each row says."""
    rng = np.random.default_rng(0)
    of_prompt = rng.normal(size=(options.prompts, 1))
    of_row = rng.normal(size=(options.prompts, options.width))
    spread = options.sigma * (of_prompt + of_row) / 2**0.5
    lengths = np.clip(np.rint(options.median * np.exp(spread)), 1, options.longest).astype(int)
    if options.forced == "request":
        lengths[:] = lengths.max(axis=1, keepdims=True)
    return lengths


@dataclass
class Went:
    """One go at all prompts."""

    seconds: float
    stats: Stats
    waiting: Stats  # up to when the last prompt was let in


def measure(model: bridge.Model, options: argparse.Namespace) -> dict[str, Any]:
    """Both ways, in turn."""
    lengths = draw_lengths(options)
    rng, vocab = np.random.default_rng(1), model.config.vocab_size
    by_row = options.forced == "row"
    requests = [
        Request(
            "",
            rng.integers(100, vocab, options.prompt_tokens).tolist(),
            options.width,
            number,
            options.longest if by_row else int(lengths[number, 0]),
            SAMPLING,
            frozenset({EOS} if by_row else ()),
        )
        for number in range(options.prompts)
    ]
    implementation = model.implementation
    forced: Any = Forced(implementation, lengths) if by_row else implementation
    together = max(1, options.max_rows // options.width)
    batches = [requests[at : at + together] for at in range(0, len(requests), together)]
    ways = {"static": batches, "engine": [requests]}
    went: dict[str, list[Went]] = {name: [] for name in ways}
    answer(forced, requests[:together], options.max_rows, most=8)  # compiled and warm
    for turn in range(options.rounds):
        for name, parts in ways.items() if turn % 2 else reversed(ways.items()):
            went[name].append(added([answer(forced, part, options.max_rows) for part in parts]))
            assert went[name][-1].stats.tokens == lengths.sum()
            print(f"round {turn + 1}: {name} {went[name][-1].seconds:.1f} s", file=sys.stderr)
    asked = {k: v for k, v in vars(options).items() if k not in ("out", "checkpoint")}
    device = processor() if model.device == "cpu" else model.device
    return {
        "machine": {"device": device, "cores": os.cpu_count(), "load_before": os.getloadavg()[0]},
        "asked": asked,
        "lengths": {
            "mean": float(lengths.mean()),
            "median": float(np.median(lengths)),
            "longest": int(lengths.max()),
        },
        "ways": {name: figures(found) for name, found in went.items()},
        "times_static": statistics.median(
            s.seconds / e.seconds for s, e in zip(went["static"], went["engine"], strict=True)
        ),
    }


def answer(
    model: BackendModel, requests: Sequence[Request], max_rows: int, most: int | None = None
) -> Went:
    """All requests by one engine, or its first so many steps."""
    start = time.perf_counter()
    engine = Engine(model, budget=Budget(model, max_rows))
    for request in requests:
        engine.submit(request)
    waiting, steps = replace(engine.stats), 0
    while not engine.idle and (most is None or steps < most):
        engine.step()
        steps += 1
        if engine.queue:
            waiting = replace(engine.stats)
    return Went(time.perf_counter() - start, engine.stats, waiting)


def added(parts: Sequence[Went]) -> Went:
    """Several goes as one: while one goes, the prompts of the next ones wait."""

    def total(stats: Sequence[Stats]) -> Stats:
        return Stats(**{name: sum(getattr(s, name) for s in stats) for name in vars(stats[0])})

    seconds, stats = sum(part.seconds for part in parts), [part.stats for part in parts]
    return Went(seconds, total(stats), total([*stats[:-1], parts[-1].waiting]))


def figures(went: Sequence[Went]) -> dict[str, Any]:
    """Of one way; its counts are the same in each round."""
    stats, waiting = went[0].stats, went[0].waiting
    seconds = statistics.median(w.seconds for w in went)
    return {
        "seconds": [w.seconds for w in went],
        "tokens_per_second": stats.tokens / seconds,
        "alive_share": stats.alive_share,
        "occupancy": stats.occupancy,
        "occupancy_while_prompts_wait": waiting.occupancy,
        **vars(stats),
        "prefill_seconds": statistics.median(w.stats.prefill_seconds for w in went),
        "decode_seconds": statistics.median(w.stats.decode_seconds for w in went),
    }


class Forced:
    """A model whose rows end where a table of lengths has it."""

    def __init__(self, model: BackendModel, lengths: Int[np.ndarray, "prompts width"]) -> None:
        self.model, self.lengths = model, lengths
        self.config, self.device, self.dtype = model.config, model.device, model.dtype

    def free_bytes(self) -> int | None:
        """The model's."""
        return self.model.free_bytes()

    def prefill(
        self,
        prompts: Sequence[np.ndarray],
        widths: Sequence[int],
        max_new_tokens: int,
        prompt_ids: Sequence[int],
    ) -> "ForcedDecoder":
        """The model's decoder, whose draws are replaced."""
        decoder = self.model.prefill(prompts, widths, max_new_tokens, prompt_ids)
        return ForcedDecoder(decoder, self.lengths, prompt_ids)


class ForcedDecoder:
    """Draws as the decoder does, a token at a time, and says what the table has."""

    def __init__(self, decoder: Decoder, lengths: np.ndarray, prompt_ids: Sequence[int]) -> None:
        self.decoder, self.lengths = decoder, lengths
        self.left = self._rows(prompt_ids)  # tokens of each row, until and with its last

    def _rows(self, prompt_ids: Sequence[int]) -> Int[np.ndarray, " R"]:
        return np.concatenate([self.lengths[number] for number in prompt_ids])

    def admit(
        self,
        prompts: Sequence[np.ndarray],
        widths: Sequence[int],
        max_new_tokens: int,
        prompt_ids: Sequence[int],
    ) -> None:
        """Further prompts."""
        self.decoder.admit(prompts, widths, max_new_tokens, prompt_ids)
        self.left = np.concatenate([self.left, self._rows(prompt_ids)])

    def sample_ahead(
        self, sampling: Sampling | Sequence[Sampling], steps: int, ends: Collection[int]
    ) -> Int[np.ndarray, "R one"]:
        """One column: the device knows nothing of the table."""
        drawn = self.decoder.sample(sampling)
        drawn = np.where(drawn == EOS, OTHER, drawn)
        return np.where(self.left == 1, EOS, drawn)[:, None]

    def advance(self, tokens: np.ndarray, keep: np.ndarray, back: None) -> None:
        """As it is."""
        self.decoder.advance(tokens, keep)
        self.left = self.left[keep] - 1


def table(results: dict[str, Any]) -> str:
    """A line a way, and how many times as fast the engine was."""
    lines = [f"{'':8} {'tokens/s':>9} {'alive':>7} {'occupied':>9} {'while some wait':>16}"]
    for name, found in results["ways"].items():
        shares = f"{found['alive_share']:7.1%} {found['occupancy']:9.1%}"
        waiting = f"{found['occupancy_while_prompts_wait']:16.1%}"
        lines.append(f"{name:8} {found['tokens_per_second']:9.1f} {shares} {waiting}")
    lines.append(f"the engine is {results['times_static']:.2f} times as fast")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
