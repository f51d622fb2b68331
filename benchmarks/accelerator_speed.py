"""Decoding and training of a random host on any backend, as shares of what the device can do.

Weights are random bits of the size that trained ones have: what is measured does not depend on
them. Shares are of the two ceilings of the stage `machine`: of its bandwidth, counting the weights
and caches that a step must read; of its GEMM rate, counting the multiplications that a step must
do. A step that waits for neither has a low share of both.
"""

import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from math import prod
from typing import Any

import numpy as np
from operations import Work, update

from bridge.config import ModelConfig, parse_config, tensor_shapes
from bridge.config.sizes import token_bytes
from bridge.contract import SFT, AdamW, Backend, BackendModel, Batch, Sampling
from bridge.model import trainable_names

Found = tuple[str, Any, str]
SAMPLING = Sampling(temperature=1.0, seed=0)
# The shapes of DeepSeek-R1-Distill-Qwen-1.5B, and the paper's blocks of inner width 512.
HOSTS: dict[str, dict[str, Any]] = {
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
    },
}
REST = {"model_type": "qwen2", "max_position_embeddings": 32768, "tie_word_embeddings": False}
BLOCKS = {"1.5b": (8, 64), "tiny": (2, 8)}  # heads and head width
WORK = {  # prompt tokens, decoding steps a round, rounds; rows and timesteps of a training batch
    "1.5b": {"prompt": 512, "steps": 64, "rounds": 5, "rows": 8, "timesteps": 512},
    "tiny": {"prompt": 8, "steps": 4, "rounds": 1, "rows": 4, "timesteps": 8},
}


class RandomTensors(Mapping[str, np.ndarray]):
    """bfloat16 tensors of the config's shapes, each made when it is read."""

    def __init__(self, config: ModelConfig) -> None:
        import ml_dtypes

        self.shapes, self.dtype = tensor_shapes(config), ml_dtypes.bfloat16
        bits = np.random.default_rng(0).integers(0, 2**16, 2**22, dtype=np.uint16)
        # Any sign and mantissa, and the exponent of 2^-6: what trained weights are about.
        self.block = (bits & 0x807F) | (121 << 7)

    def __getitem__(self, name: str) -> np.ndarray:
        shape = self.shapes[name]
        if len(shape) == 1:
            return np.full(shape, 0 if name.endswith("bias") else 1, self.dtype)
        return np.resize(self.block, shape).view(self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def raw_config(size: str) -> dict[str, Any]:
    """A `config.json` of the host with blocks."""
    heads, head_dim = BLOCKS[size]
    layers = list(range(HOSTS[size]["num_hidden_layers"]))
    bridge = {"spec_version": "1.0", "kind": "attention", "num_heads": heads}
    bridge |= {"head_dim": head_dim, "layers": layers, "norm_eps": 1e-6}
    return {**HOSTS[size], **REST, "bridge": bridge}


def configs(size: str) -> dict[str, ModelConfig]:
    """The host with blocks and without."""
    on = parse_config(raw_config(size))
    return {"on": on, "off": on.without_bridge()}


def parameters(config: ModelConfig, *, embedding: bool = True) -> int:
    """How many there are; without the embedding, those that every step multiplies by."""
    shapes = tensor_shapes(config).items()
    return sum(prod(s) for name, s in shapes if embedding or name != "model.embed_tokens.weight")


def decode(backend: Backend, device: str, size: str, machine: dict[str, Any]) -> Iterator[Found]:
    """Steps of 1, 8 and 64 rows (eight groups of eight), with blocks and without, in turn."""
    work, dtype = WORK[size], "bfloat16"
    models: dict[str, BackendModel] = {}
    for name, config in configs(size).items():
        start = time.perf_counter()
        models[name] = backend.load(config, RandomTensors(config), device=device, dtype=dtype)
        spent = time.perf_counter() - start
        yield f"load {name}", spent, f"{parameters(config) / 1e9:.2f} B loaded, {spent:.1f} s"
    prompt = np.random.default_rng(0).integers(0, HOSTS[size]["vocab_size"], work["prompt"])
    for widths in ([1], [8], [8] * 8):
        rows = sum(widths)
        seconds: dict[str, list[float]] = {name: [] for name in models}
        reading: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(work["rounds"] + 1):
            for name, model in models.items():
                start = time.perf_counter()
                decoder = model.prefill([prompt] * len(widths), widths, work["steps"] + 1)
                decoder.sample(SAMPLING)  # tokens reach the host: everything before is done
                read = time.perf_counter()
                for _ in range(work["steps"]):
                    decoder.advance()
                    decoder.sample(SAMPLING)
                end = time.perf_counter()
                if turn:
                    reading[name].append(read - start)
                    seconds[name].append((end - read) / work["steps"])
        step = {name: statistics.median(values) for name, values in seconds.items()}
        figures = {
            "step": step,
            "steps": seconds,
            "prefill": {name: statistics.median(values) for name, values in reading.items()},
            "tokens_per_second": {name: rows / value for name, value in step.items()},
            "on_against_off": step["on"] / step["off"],
        }
        if "bandwidth" in machine:
            figures["share_of_bandwidth"] = {
                name: _bytes(model.config, widths, work) / machine["bandwidth"] / step[name]
                for name, model in models.items()
            }
        yield f"{rows} rows", figures, _decode_line(rows, figures)


def _bytes(config: ModelConfig, widths: list[int], work: dict[str, int]) -> float:
    """What a step in the middle of a round must read: weights, prompts once a group, own cells."""
    cells = len(widths) * work["prompt"] + sum(widths) * work["steps"] / 2
    return 2 * parameters(config, embedding=False) + token_bytes(config, "bfloat16") * cells


def _decode_line(rows: int, figures: dict[str, Any]) -> str:
    on, off = figures["step"]["on"], figures["step"]["off"]
    line = f"{rows} rows: {1e3 * on:.2f} ms a step, {figures['tokens_per_second']['on']:.0f} tokens"
    line += f"/s; the host alone {1e3 * off:.2f} ms, ratio {figures['on_against_off']:.3f}"
    if (share := figures.get("share_of_bandwidth")) is not None:
        line += f"; {share['on']:.0%} and {share['off']:.0%} of the bandwidth"
    return f"{line}; prefill {1e3 * figures['prefill']['on']:.0f} ms"


def train(backend: Backend, device: str, size: str, machine: dict[str, Any]) -> Iterator[Found]:
    """SFT updates: the blocks alone, then every tensor, then every tensor of the plain host."""
    work, dtype = WORK[size], "bfloat16"
    rng = np.random.default_rng(0)
    rows, timesteps = work["rows"], work["timesteps"]
    tokens = rng.integers(0, HOSTS[size]["vocab_size"], (rows, timesteps + 1))
    mask = np.ones((rows, timesteps), bool)
    batch = Batch(tokens[:, :-1], np.arange(rows) // 4, mask, tokens[:, 1:], mask)
    for name, blocks, what in (
        ("blocks alone", "on", "bridge"),
        ("all, blocks on", "on", "all"),
        ("all, blocks off", "off", "all"),
    ):
        config = configs(size)[blocks]
        trained = trainable_names(config, what)
        model = trainer = None  # what the last one held, even one that ran out of memory
        forget_peak(backend.name)
        try:
            model = backend.load(config, RandomTensors(config), device=device, dtype=dtype)
            trainer = model.trainer(SFT(), AdamW(lr=1e-6), trained)
            seconds = []
            for turn in range(work["rounds"] + 1):
                start = time.perf_counter()
                trainer.step(batch)  # its metrics reach the host
                if turn:
                    seconds.append(time.perf_counter() - start)
            step = statistics.median(seconds)
            figures: dict[str, Any] = {"step": step, "steps": seconds}
            figures |= {"tokens_per_second": rows * timesteps / step}
            if (most := peak(backend.name)) is not None:
                figures["peak_memory"] = most
            if "gemm" in machine:
                done = update(config, trained, Work(1, rows, 0, timesteps))
                figures["share_of_gemm"] = done / machine["gemm"] / step
            yield name, figures, _train_line(name, figures)
        except Exception as error:  # out of memory differs by framework; the next may fit
            reason = f"{type(error).__name__}: {error}".partition("\n")[0][:500]
            yield name, {"failed": True, "why": reason}, f"{name}: {reason}"


def _train_line(name: str, figures: dict[str, Any]) -> str:
    step, rate = figures["step"], figures["tokens_per_second"]
    line = f"{name}: {1e3 * step:.0f} ms a step, {rate:.0f} tokens/s"
    if (share := figures.get("share_of_gemm")) is not None:
        line += f", {share:.0%} of the GEMM rate"
    if (peak := figures.get("peak_memory")) is not None:
        line += f", {peak / 2**30:.1f} GiB at most"
    return line


def forget_peak(backend: str) -> None:
    """Free what nobody holds, and count the peak from here."""
    if backend == "torch":
        import gc

        import torch

        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def peak(backend: str) -> int | None:
    """Bytes of the device's memory in use at once; of JAX since the process began."""
    if backend == "torch":
        import torch

        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    if backend == "jax":
        import jax

        with suppress(Exception):  # a device need not count
            return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return None
