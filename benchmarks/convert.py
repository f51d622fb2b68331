"""Converting against copying, as ratios within one run, at the size of a real model: 8 billion.

    python benchmarks/convert.py [--layers 32] [--rounds 3] [--where /tmp]

Makes a Llama 8B checkpoint with random bf16 weights in shards (16 GB; `--layers` for less), and in
each round copies its files, synced, and converts it to jax and to mlx, in turn, each by a process
of its own whose peak of resident memory is measured. All of it is deleted after. The disk needs
room for two of it.
"""

import argparse
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from record import RESULTS, record

from bridge.checkpoints.tensor_specs import TensorSpec
from bridge.checkpoints.writing import write_checkpoint
from bridge.config import BridgeConfig, parse_config, tensor_shapes
from bridge_cli.machine import processor

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
COPY, TO = "copy", ("jax", "mlx")
BLOCK = 1 << 26  # random numbers made once, and used from changing places


def make(path: Path, layers: int) -> tuple[int, int]:
    """Write the checkpoint, blocks of 8 heads of 64 included; its bytes, and those of its largest
    stored tensor in any form, which is a stack of the jax form."""
    blocks = BridgeConfig("attention", 8, 64, tuple(range(layers)), 1e-5)
    raw = {**LLAMA_8B, "num_hidden_layers": layers, "bridge": blocks.to_json()}
    shapes = tensor_shapes(parse_config(raw))
    random = np.random.default_rng(0).normal(scale=0.02, size=BLOCK).astype(np.float32)
    pool = np.concatenate([random.astype(BFLOAT16)] * 2)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        rng = np.random.default_rng(1)
        for name, shape in shapes.items():
            count, start = prod(shape), int(rng.integers(BLOCK))
            repeats = -(-count // BLOCK)
            once = pool[start : start + BLOCK]
            yield name, np.tile(once, repeats)[:count].reshape(shape)

    specs = {name: TensorSpec(BFLOAT16, shape) for name, shape in shapes.items()}
    write_checkpoint(path, raw, specs, tensors())
    stacked = layers * LLAMA_8B["intermediate_size"] * LLAMA_8B["hidden_size"] * 2
    embedding = specs["model.embed_tokens.weight"].nbytes
    return sum(spec.nbytes for spec in specs.values()), max(stacked, embedding)


def copy(source: Path, target: Path) -> None:
    """What a plain copy does: every file by `cp`, and then synced to the disk."""
    subprocess.run(["cp", "-r", source, target], check=True)
    subprocess.run(["sync", *target.iterdir()], check=True)


def timed(work: str, source: Path, target: Path) -> tuple[float, int]:
    """Seconds and peak resident bytes of one copy or conversion, whose result is deleted."""
    start = time.perf_counter()
    if work == COPY:
        copy(source, target)
        seconds, peak = time.perf_counter() - start, 0
    else:
        command = [sys.executable, __file__, "--convert", str(source), str(target), work]
        said = subprocess.run(command, capture_output=True, check=True).stdout
        seconds, peak = time.perf_counter() - start, int(said.split()[-1])
    shutil.rmtree(target)
    subprocess.run(["sync"], check=True)  # nothing of it is left to write while the next one runs
    return seconds, peak


def convert_here(source: str, target: str, form: str) -> None:
    """Convert in this process, and print its peak of resident memory."""
    import resource

    import bridge

    bridge.convert(source, target, form)
    if Path("/proc/self/status").exists():  # what getrusage says there, a child inherits
        status = Path("/proc/self/status").read_text()
        print(int(status.partition("VmHWM:")[2].split()[0]) * 1024)
    else:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def machine() -> dict[str, Any]:
    """Where the figures are from."""
    return {"device": processor(), "python": platform.python_version(), "numpy": version("numpy")}


def report(results: dict[str, Any]) -> str:
    """The figures as a table."""
    lines = [
        f"{results['bytes'] / 1e9:.1f} GB of bf16 on {results['machine']['device']}",
        "",
        "| conversion | rate, of copying the files | peak memory, MB |",
        "|---|---|---|",
    ]
    for form in TO:
        figures = results["conversions"][form]
        peak = figures["peak_bytes"] / 1e6
        lines.append(f"| torch to {form} | {figures['rate_of_copy']:.2f} | {peak:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the ratios, and keep all of it as JSON."""
    parser = argparse.ArgumentParser(description="Converting against copying.")
    parser.add_argument("--layers", type=int, default=LLAMA_8B["num_hidden_layers"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--where", type=Path, default=None, help="a directory on the disk to use")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--convert", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.convert:
        return convert_here(*options.convert)
    measured: dict[str, list[tuple[float, int]]] = {work: [] for work in (COPY, *TO)}
    with tempfile.TemporaryDirectory(dir=options.where, prefix="bridge-convert-") as directory:
        source, target = Path(directory) / "source", Path(directory) / "target"
        size, largest = make(source, options.layers)
        for _ in range(options.rounds):
            for work, runs in measured.items():
                runs.append(timed(work, source, target))
    seconds = {w: statistics.median(s for s, _ in runs) for w, runs in measured.items()}
    results = {
        "machine": machine(),
        "layers": options.layers,
        "bytes": size,
        "largest_tensor_bytes": largest,
        "copy": {"seconds": [s for s, _ in measured[COPY]]},
        "conversions": {
            form: {
                "seconds": [s for s, _ in measured[form]],
                "rate_of_copy": seconds[COPY] / seconds[form],
                "bytes_per_second": size / seconds[form],
                "peak_bytes": max(peak for _, peak in measured[form]),
            }
            for form in TO
        },
    }
    print(report(results))
    record(results, "convert", options.out)


if __name__ == "__main__":
    main()
