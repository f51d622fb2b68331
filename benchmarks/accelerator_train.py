"""Updates as they are made in practice: groups that share a prompt, all tensors or few trained.

GRPO updates of the random host of accelerator_speed: every tensor, the blocks alone, and low-rank
updates of the host (LoRA) beside the blocks. What does not fit without is tried once more with
activations computed again in the backward pass, and says so.
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from accelerator_speed import HOSTS, Found, RandomTensors, configs, forget_peak, peak
from operations import Work, update

from bridge.config import LoraConfig, ModelConfig, lora_names
from bridge.contract import GRPO, AdamW, Backend, Batch
from bridge.model import trainable_names
from bridge.training.batches import Group, make_batch

WORK = {"1.5b": Work(4, 8, 512, 512), "tiny": Work(2, 3, 6, 4)}
ROUNDS = {"1.5b": 5, "tiny": 1}
RANK = {"1.5b": 16, "tiny": 2}


def updates(backend: Backend, device: str, size: str, machine: dict[str, Any]) -> Iterator[Found]:
    """Seconds, peak memory and share of the GEMM rate, by what is trained."""
    work = WORK[size]
    batch = _batch(work, HOSTS[size]["vocab_size"])
    plain = configs(size)["on"]
    low_rank = replace(plain, lora=LoraConfig(RANK[size], 2.0 * RANK[size]))
    blocks = trainable_names(plain, "bridge")
    cases = {
        "all": (plain, trainable_names(plain, "all")),
        "blocks alone": (plain, blocks),
        f"blocks, LoRA of rank {RANK[size]}": (low_rank, [*blocks, *lora_names(low_rank)]),
    }
    for name, (config, trained) in cases.items():
        for again in (False, True):
            said = f"{name}, activations again" if again else name
            forget_peak(backend.name)
            try:
                figures = _measure(backend, device, config, trained, batch, again, ROUNDS[size])
            except Exception as error:  # out of memory differs by framework; the next may fit
                reason = f"{type(error).__name__}: {error}".partition("\n")[0][:500]
                # Only the last try is a failure of the stage.
                yield said, {"failed": again, "why": reason}, f"{said}: {reason}"
                continue
            figures["cells_per_second"] = work.cells / figures["step"]
            line = f"{said}: {1e3 * figures['step']:.0f} ms an update of {work.cells} cells"
            if "gemm" in machine:
                done = update(config, trained, work)
                figures["share_of_gemm"] = done / machine["gemm"] / figures["step"]
                line += f", {figures['share_of_gemm']:.0%} of the GEMM rate"
            if figures["peak_memory"] is not None:
                line += f", {figures['peak_memory'] / 2**30:.1f} GiB at most"
            yield said, figures, line
            break


def _measure(
    backend: Backend,
    device: str,
    config: ModelConfig,
    trained: list[str],
    batch: Batch,
    again: bool,
    rounds: int,
) -> dict[str, Any]:
    """In a scope of its own, so that what it held is free when the next begins."""
    model = backend.load(config, RandomTensors(config), device=device, dtype="bfloat16")
    trainer = model.trainer(GRPO(), AdamW(lr=1e-6), trained, checkpoint_activations=again)
    seconds = []
    for turn in range(rounds + 1):
        start = time.perf_counter()
        trainer.step(batch)  # its metrics reach the host
        if turn:
            seconds.append(time.perf_counter() - start)
    return {"step": statistics.median(seconds), "steps": seconds, "peak_memory": peak(backend.name)}


def _batch(work: Work, vocabulary: int) -> Batch:
    """Random tokens, and advantages of both signs."""
    random = np.random.default_rng(0)
    advantages = np.linspace(-1, 1, work.width)
    shape = (work.width, work.response)
    groups = [
        Group(
            random.integers(0, vocabulary, work.prompt).tolist(),
            random.integers(0, vocabulary, shape).tolist(),
            advantages,
        )
        for _ in range(work.groups)
    ]
    return make_batch(groups)
