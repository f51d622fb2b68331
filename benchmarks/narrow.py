"""What narrow weights give and cost, on a real model: SmolLM2-135M with blocks, on torch.

    python benchmarks/narrow.py [--widths 1,8,32] [--steps 32] [--rounds 3] [--blocks 2x48]

float32, bfloat16, int8 and int4 in one run. Decoded tokens a second, single steps of all of them in
turn; the memory of a process that has loaded each and decodes; and what the host loses: perplexity
of a text of this tree, read in windows, and how often the likeliest token is that of float32.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from beside import make
from record import RESULTS, record

import bridge
from bridge.contract import Sampling
from bridge_cli.machine import processor

QUESTION = "There are 5 bags with 8 marbles in each bag. How many marbles are there in total?"
SEED = Sampling(temperature=1.0, seed=0)
KINDS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float32", "weights": "int8"},
    "int4": {"dtype": "float32", "weights": "int4"},
}
TEXT = Path(__file__).parents[1] / "spec" / "bridge-1.0.md"


def load(checkpoint: Path | str, kind: str) -> bridge.Model:
    """One of the four."""
    return bridge.load(checkpoint, backend="torch", device="cpu", **KINDS[kind])


def machine() -> dict[str, Any]:
    """What the figures are of."""
    threads = torch.get_num_threads()
    return {"device": processor(), "torch": version("torch"), "threads": threads}


def speeds(models: dict[str, bridge.Model], width: int, steps: int, rounds: int) -> Any:
    """Tokens a second of each, and against float32: medians of steps taken in turn."""
    ids = np.asarray(models["float32"].encode([{"role": "user", "content": QUESTION}], chat=True))
    seconds: dict[str, list[float]] = {kind: [] for kind in models}
    for _ in range(rounds):
        decoders = {
            kind: model.implementation.prefill([ids], [width], steps + 1)
            for kind, model in models.items()
        }
        for step in range(steps):
            for kind, decoder in decoders.items():
                start = time.perf_counter()
                decoder.sample(SEED)
                decoder.advance()
                decoder.logits()
                if step >= 4:
                    seconds[kind].append(time.perf_counter() - start)
    median = {kind: statistics.median(values) for kind, values in seconds.items()}
    return {
        "tokens_per_second": {kind: width / value for kind, value in median.items()},
        "against_float32": {kind: median["float32"] / value for kind, value in median.items()},
    }


def quality(models: dict[str, bridge.Model], windows: int, length: int) -> Any:
    """Perplexity of each on the first tokens of a text, and agreement with float32."""
    ids = models["float32"].encode(TEXT.read_text(encoding="utf-8"))[: windows * length]
    tokens = np.asarray(ids).reshape(-1, length)
    found: dict[str, Any] = {}
    for kind, model in models.items():
        logits = np.concatenate(
            [model.logits(window[None], groups=[0])[0, :-1] for window in tokens]
        ).astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        likeliest = logp.argmax(-1)
        said = np.take_along_axis(logp, tokens[:, 1:].reshape(-1, 1), -1)
        first = found.setdefault("likeliest", likeliest)
        found[kind] = {
            "perplexity": float(np.exp(-said.mean())),
            "same_likeliest_token": float((likeliest == first).mean()),
        }
    del found["likeliest"]
    return {"text": TEXT.name, "tokens": tokens.size, "window": length, **found}


def memory(checkpoint: Path) -> Any:
    """Bytes of a process each: resident while it decodes, and its peak, which is at loading."""
    found = {}
    for kind in KINDS:
        command = [sys.executable, __file__, "--memory", kind, str(checkpoint)]
        said = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()
        found[kind] = dict(zip(("resident", "peak"), map(int, said[-2:]), strict=True))
    return found


def measure_memory(kind: str, checkpoint: str) -> None:
    """Load one alone, decode a little, and print what the system says."""
    model = load(checkpoint, kind)
    decoder = model.implementation.prefill([np.arange(100, 185)], [8], 16)
    for _ in range(4):
        decoder.sample(SEED)
        decoder.advance()
    status = Path("/proc/self/status").read_text()
    # What maps the checkpoint's file is the system's to take back: anonymous memory is the model.
    for name in ("RssAnon:", "VmHWM:"):
        print(int(status.partition(name)[2].split()[0]) * 1024)


def report(results: dict[str, Any]) -> str:
    """The figures as a table."""
    where = results["machine"]
    lines = [f"torch {where['torch']} on {where['device']}, {where['threads']} threads", ""]
    lines += ["| | " + " | ".join(KINDS) + " |", "|---" * (1 + len(KINDS)) + "|"]
    for width, found in results["widths"].items():
        rates = [
            f"{found['tokens_per_second'][kind]:.0f} ({found['against_float32'][kind]:.2f}x)"
            for kind in KINDS
        ]
        lines.append(f"| tokens a second, width {width} | " + " | ".join(rates) + " |")
    for kind, title in (("resident", "memory, decoding"), ("peak", "memory, at most")):
        sizes = [f"{results['memory'][k][kind] / 1e6:.0f} MB" for k in KINDS]
        lines.append(f"| {title} | " + " | ".join(sizes) + " |")
    for name, digits in (("perplexity", 3), ("same_likeliest_token", 4)):
        values = [f"{results['quality'][kind][name]:.{digits}f}" for kind in KINDS]
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and keep all of it as JSON."""
    parser = argparse.ArgumentParser(description="Narrow weights on SmolLM2-135M.")
    parser.add_argument("--widths", default="1,8,32")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--blocks", default="2x48", help="heads x head width")
    parser.add_argument("--windows", type=int, default=8, help="of text")
    parser.add_argument("--window", type=int, default=512, help="tokens of each")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        return measure_memory(*options.memory)
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = make(Path(directory), *map(int, options.blocks.split("x")))
        models = {kind: load(checkpoint, kind) for kind in KINDS}
        results: dict[str, Any] = {
            "machine": {
                "device": processor(),
                "torch": version("torch"),
                "threads": torch.get_num_threads(),
            },
            "blocks": options.blocks,
            "steps": options.steps,
            "widths": {
                width: speeds(models, int(width), options.steps, options.rounds)
                for width in options.widths.split(",")
            },
            "quality": quality(models, options.windows, options.window),
            "memory": memory(checkpoint),
        }
    print(report(results))
    record(results, "narrow-torch", options.out)


if __name__ == "__main__":
    main()
