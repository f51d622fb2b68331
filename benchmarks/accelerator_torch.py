"""What torch has for CUDA alone, against what it has everywhere: whether it is right, and how fast.

Three stages: attention over a shared prefix by Triton kernels, against batched products; tokens
drawn ahead, in turns and by CUDA graphs, against one at a time; attention over rows that are padded
on the right, which needs no mask. A rehearsal on a CPU runs the kernels in Triton's interpreter,
where that is installed, and turns without graphs.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any

import accelerator_stages
import numpy as np
import torch
from accelerator_speed import HOSTS, WORK, Found, RandomTensors, configs
from torch.nn.attention import SDPBackend, sdpa_kernel

from bridge.contract import Backend, Sampling
from bridge.decoding.rows import Rows
from bridge_torch.ahead import Ahead
from bridge_torch.backend import TorchModel
from bridge_torch.block import Grid
from bridge_torch.cache import PaddedCache, Reach
from bridge_torch.cells import Cells, attend
from bridge_torch.step import ByKernels, ByProducts

# Rows of each group, tokens of their prompt, own timesteps.
SHAPES = {
    "1.5b": (
        ([1], 512, 256),
        ([8], 512, 256),
        ([8] * 8, 512, 256),
        ([8] * 8, 4096, 1024),
        ([64], 8192, 128),
        ([3, 8, 5], 700, 300),
    ),
    "tiny": (([2, 1], 5, 3),),
}
HEADS = {"1.5b": (12, 2, 128), "tiny": (4, 2, 8)}  # of queries, of keys, their width
PADDED = {"1.5b": (8, 2048), "tiny": (3, 16)}  # rows and timesteps
AHEAD = 8  # tokens in a table


def kernels(_: Backend, device: str, size: str, machine: dict[str, Any]) -> Iterator[Found]:
    """One layer's attention in a step, by kernels and by products; errors are against products in
    float64. A kernel's may be four times that of products in the same dtype, or a few ulps."""
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    if find_spec("triton") is None:
        yield "triton", None, "Triton is not installed: products are all there is"
        return
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for dtype in dtypes[:1] if size == "tiny" else dtypes:
        for widths, prompt, own in SHAPES[size]:
            q, k, v, cache = _step(widths, prompt, own, dtype, device, size)
            at = torch.from_numpy(cache.rows.steps).to(device)
            reach: dict[int | None, Reach] = {None: cache.reach(None)}
            by = {
                "kernels": ByKernels.of(cache, cache.readers, at, own + 1, {None}),
                "products": ByProducts(cache, cache.grid, own, reach),
            }
            wide = PaddedCache(cache.prefix.double(), cache.own.double(), cache.rows)
            exact = ByProducts(wide, wide.grid, own, reach)(
                0, None, q.double(), k.double(), v.double()
            )
            y = {name: attends(0, None, q, k, v) for name, attends in by.items()}
            error = {name: float((got.double() - exact).abs().max()) for name, got in y.items()}
            largest = float(exact.abs().max())
            allowed = max(4 * error["products"], 8 * torch.finfo(dtype).eps * largest)
            seconds = {
                name: _seconds(partial(attends, 0, None, q, k, v), device, size)
                for name, attends in by.items()
            }
            read = (cache.prefix.numel() + cache.own.numel()) * cache.own.element_size()
            figures: dict[str, Any] = {"seconds": seconds, "error": error}
            figures["kernels_against_products"] = seconds["kernels"] / seconds["products"]
            if "bandwidth" in machine:
                figures["share_of_bandwidth"] = read / machine["bandwidth"] / seconds["kernels"]
            if not error["kernels"] <= allowed:
                figures["failed"] = True
            name = f"{str(dtype)[6:]}, {len(widths)} x {max(widths)} rows, {prompt} + {own}"
            yield name, figures, _kernels_line(name, figures, allowed)


def _step(
    widths: list[int], prompt: int, own: int, dtype: torch.dtype, device: str, size: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, PaddedCache]:
    """Random q, k and v of a timestep, and a cache in which `own` others were fed."""
    H, K, d = HEADS[size]
    # Prompts of different lengths, so that there is padding.
    prompts = [np.zeros(prompt - g % 3) for g in range(len(widths))]
    rows = Rows.of(prompts, widths, own + 2).fed(own)
    torch.manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    R = len(rows)
    cache = PaddedCache(
        normal(1, 2, len(widths), K, prompt, d), normal(1, 2, R, K, own + 1, d), rows
    )
    return normal(R, H, d), normal(R, K, d), normal(R, K, d), cache


def _kernels_line(name: str, figures: dict[str, Any], allowed: float) -> str:
    seconds, error = figures["seconds"], figures["error"]
    line = f"{name}: {1e6 * seconds['kernels']:.0f} us by kernels, "
    line += f"{1e6 * seconds['products']:.0f} by products; errors {error['kernels']:.1e} and "
    line += f"{error['products']:.1e}, {allowed:.1e} allowed"
    if (share := figures.get("share_of_bandwidth")) is not None:
        line += f"; {share:.0%} of the bandwidth"
    return line + ("; WRONG" if figures.get("failed") else "")


def ahead(backend: Backend, device: str, size: str, machine: dict[str, Any]) -> Iterator[Found]:
    """Tokens of a text one at a time, and `AHEAD` at a time in turns and by graphs. Different
    splits of a sum may part two texts, so how many tokens agree is told and not judged."""
    on_cuda, work = device != "cpu", WORK[size]
    # Where there is a CPU alone, float64 has the step that turns take.
    dtype = "bfloat16" if on_cuda else "float64"
    config = configs(size)["on"]
    model = backend.load(config, RandomTensors(config), device=device, dtype=dtype)
    assert isinstance(model, TorchModel)
    prompt = np.random.default_rng(0).integers(0, HOSTS[size]["vocab_size"], work["prompt"])
    tokens = max(work["steps"] // AHEAD, 2) * AHEAD
    packed = model.weights.packed()
    ways: dict[str, tuple[int, Ahead | None]] = {
        "one at a time": (1, None),
        f"{AHEAD} in turns": (AHEAD, Ahead(packed, captures=False)),
    }
    if on_cuda:
        ways[f"{AHEAD} by graphs"] = (AHEAD, Ahead(packed, captures=True))
    for widths in ([1], [8], [8] * 8):
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        texts: dict[str, np.ndarray] = {}
        for turn in range(int(work["rounds"]) + 1):
            for name, (k, runs) in ways.items():
                decoder: Any = model.prefill([prompt] * len(widths), widths, tokens + AHEAD)
                decoder.ahead = runs
                first = decoder.sample_ahead(Sampling(seed=turn), k, ())  # what is captured is so
                start = time.perf_counter()
                tables = [first]
                for _ in range(tokens // k - 1):
                    decoder.advance()
                    tables.append(decoder.sample_ahead(Sampling(seed=turn), k, ()))
                if turn:
                    seconds[name].append((time.perf_counter() - start) / (tokens - k))
                texts[name] = np.concatenate(tables, 1)
        step = {name: float(np.median(values)) for name, values in seconds.items()}
        alone = texts["one at a time"]
        agree = {name: float((text == alone).mean()) for name, text in texts.items()}
        rates = {name: sum(widths) / value for name, value in step.items()}
        figures = {"step": step, "steps": seconds, "tokens_per_second": rates, "agree": agree}
        line = "; ".join(
            f"{name} {1e3 * value:.2f} ms a step, {agree[name]:.0%} agree"
            for name, value in step.items()
        )
        yield f"{sum(widths)} rows", figures, f"{sum(widths)} rows: {line}"


def padding(_: Backend, device: str, size: str, machine: dict[str, Any]) -> Iterator[Found]:
    """One layer's attention over rows padded on the right, forward and back: causal alone, with a
    mask, and with a mask by the maths kernel."""
    (B, S), (H, K, d) = PADDED[size], HEADS[size]
    lengths = S - np.arange(B) * S // (2 * B)
    active = torch.from_numpy(np.arange(S) < lengths[:, None]).to(device)
    mask = active[:, None] & torch.ones(S, S, dtype=torch.bool, device=device).tril()
    mask = (mask | torch.eye(S, dtype=torch.bool, device=device))[:, None]
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        qkv = [torch.randn(B, S, n, d, device=device).to(dtype).requires_grad_() for n in (H, K, K)]
        ways = {"causal alone": (None, None), "masked": (mask, None)}
        ways["masked, maths"] = (mask, SDPBackend.MATH)
        found: dict[str, torch.Tensor] = {}
        seconds, peak = {}, {}
        for name, (masked, kernel) in ways.items():
            cells = Cells(Grid.of(np.arange(B), device), torch.empty(0), active, {None: masked})

            run = partial(_forward_and_back, qkv, cells, kernel)
            if device != "cpu":
                torch.cuda.reset_peak_memory_stats()
            found[name] = run().detach()
            if device != "cpu":
                peak[name] = torch.cuda.max_memory_allocated()
            seconds[name] = _seconds(run, device, size)
        off = float((found["causal alone"] - found["masked, maths"]).abs().max())
        largest = float(found["masked, maths"].abs().max())
        figures: dict[str, Any] = {"seconds": seconds, "peak_memory": peak, "difference": off}
        if not off <= 8 * torch.finfo(dtype).eps * largest:
            figures["failed"] = True
        told = ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in seconds.items())
        line = f"{str(dtype)[6:]}, {B} x {S}: {told}; they differ by {off:.1e}"
        yield str(dtype)[6:], figures, line + ("; WRONG" if figures.get("failed") else "")


def _forward_and_back(
    qkv: Sequence[torch.Tensor], cells: Cells, kernel: SDPBackend | None
) -> torch.Tensor:
    q, k, v = qkv
    with nullcontext() if kernel is None else sdpa_kernel([kernel]):
        y = attend(q, k, v, cells, None)
        torch.autograd.grad(y.square().sum(), qkv)
    return y


def _seconds(run: Callable[[], Any], device: str, size: str) -> float:
    """Of one call, many in a row; in a rehearsal one is enough."""
    if size == "tiny":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    return accelerator_stages.median(run, device)
