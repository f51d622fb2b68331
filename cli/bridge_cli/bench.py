"""`bridge bench`: what Bridge costs here, as ratios against the same host without it."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from bridge_cli.options import Backend, Device, Dtype, integer
from bridge_cli.text import print_json


def bench(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint with blocks.")],
    backend: Backend = None,
    device: Device = None,
    dtype: Dtype = None,
    figures: Annotated[str, typer.Option(help="Which, by commas.")] = "decode,prefill,train",
    width: Annotated[int, integer("width", "-n", "--width", help="Rows decoded together.")] = 8,
    prompt_tokens: Annotated[int, integer("prompt_tokens", help="Length of the prompt.")] = 128,
    steps: Annotated[int, integer("steps", help="Decoded timesteps a round.")] = 32,
    rounds: Annotated[int, integer("rounds", help="Rounds; one more warms up.")] = 5,
    rows: Annotated[int, integer("rows", help="Rows of a training batch, groups of four.")] = 8,
    timesteps: Annotated[int, integer("timesteps", help="Tokens a row of a training batch.")] = 64,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure decoding, prefill and training with Bridge, as ratios within one run.

    Both sides are timed in turn, and the medians compared: 1.05 is 5 % slower than the host.

    Example: bridge bench ./smol-bridge --backend torch --width 8
    """
    from rich.console import Console
    from rich.table import Table

    from bridge.checkpoints.reading import open_checkpoint
    from bridge.evaluation.speed import Workload, bench
    from bridge.registry import find_backend, resolve_device, resolve_dtype

    opened = open_checkpoint(checkpoint)
    chosen = find_backend(backend)
    device = resolve_device(chosen, device)
    dtype = resolve_dtype(chosen, device, dtype, opened.dtype)
    workload = Workload(width, prompt_tokens, steps, rounds, rows, timesteps)
    names = tuple(name.strip() for name in figures.split(",") if name.strip())
    found = []
    with Console(stderr=True).status("measuring") as status:
        for figure in bench(opened, chosen.name, device, dtype, names, workload):
            found.append(figure)
            status.update(f"measured {', '.join(f.name for f in found)}")
    machine = _machine(chosen.name, device)
    if json:
        return print_json(
            {
                **machine,
                "dtype": dtype,
                "checkpoint": str(checkpoint),
                "workload": asdict(workload),
                "figures": [figure.to_json() for figure in found],
            }
        )
    table = Table("figure", "ms", "against", "ms", "ratio", box=None, pad_edge=False)
    for f in found:
        table.add_row(
            f.what,
            f"{1e3 * f.seconds:.1f}",
            f.against,
            f"{1e3 * f.against_seconds:.1f}",
            f"{f.ratio:.2f}",
        )
    console = Console(soft_wrap=True)
    console.print(table)
    where = f"{chosen.name} {machine['version']} on {machine['processor']} ({device}) in {dtype}"
    console.print(where, style="dim", highlight=False)


def processor() -> str:
    """The processor's name, as its maker gives it where the system tells."""
    import platform

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _machine(backend: str, device: str) -> dict[str, Any]:
    """What the figures are of."""
    import os
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed = version(backend)
    except PackageNotFoundError:
        installed = "?"
    name = processor()
    if device.startswith("cuda") and backend == "torch":
        import torch

        name = torch.cuda.get_device_name(device)
    cores = os.cpu_count()
    return {
        "backend": backend,
        "version": installed,
        "device": device,
        "processor": name,
        "cores": cores,
    }
