"""`bridge bench`: what Bridge costs here, as ratios against the same host without it; and, with
`--peers`, beside other engines."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from bridge_cli.machine import device_name
from bridge_cli.options import Backend, Device, Dtype, Weights, integer, number
from bridge_cli.text import print_json

# Options that are for figures without --peers alone, and with it alone.
RATIOS = (
    "backend",
    "dtype",
    "weights",
    "figures",
    "width",
    "steps",
    "rows",
    "timesteps",
)  # without --peers
PEERS = ("widths", "new", "seconds", "threads", "engines", "dtypes", "plot", "save")
PANEL = "With --peers"


def bench(
    ctx: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint with blocks.")],
    backend: Backend = None,
    device: Device = None,
    dtype: Dtype = None,
    weights: Weights = None,
    figures: Annotated[
        str | None,
        typer.Option(help="decode, prefill, train, by commas; else all that weights allow."),
    ] = None,
    width: Annotated[int, integer("width", "-n", "--width", help="Rows decoded together.")] = 8,
    prompt_tokens: Annotated[
        int | None, integer("prompt_tokens", help="Of the prompt; else 128, with --peers 85.")
    ] = None,
    steps: Annotated[int, integer("steps", help="Decoded timesteps a round.")] = 32,
    rounds: Annotated[
        int | None, integer("rounds", help="After a warm-up; else 5, with --peers 3.")
    ] = None,
    rows: Annotated[int, integer("rows", help="Rows of a training batch, groups of four.")] = 8,
    timesteps: Annotated[int, integer("timesteps", help="Tokens a row of a training batch.")] = 64,
    peers: Annotated[
        bool, typer.Option("--peers", help="Beside other engines.", rich_help_panel=PANEL)
    ] = False,
    widths: Annotated[
        str, typer.Option(help="By commas.", rich_help_panel=PANEL)
    ] = "1,2,4,8,16,32",
    new: Annotated[
        int, integer("bench.new", help="New tokens of each row.", rich_help_panel=PANEL)
    ] = 128,
    seconds: Annotated[
        float,
        number(
            "bench.seconds",
            float,
            help="Of a call: one that would take longer is of fewer tokens.",
            rich_help_panel=PANEL,
        ),
    ] = 20.0,
    threads: Annotated[
        int | None,
        integer(
            "threads",
            help="Of every engine; else the processors that there are.",
            rich_help_panel=PANEL,
        ),
    ] = None,
    engines: Annotated[
        str,
        typer.Option(
            help="Backends and peers, by commas; else all but numpy.", rich_help_panel=PANEL
        ),
    ] = "",
    dtypes: Annotated[
        str,
        typer.Option(
            help="float32, bfloat16, int8 or int4 weights, by commas; else what is worth showing.",
            rich_help_panel=PANEL,
        ),
    ] = "",
    plot: Annotated[
        Path | None,
        typer.Option(help="Tokens a second by width, .png or .svg.", rich_help_panel=PANEL),
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="The figures, as JSON.", rich_help_panel=PANEL)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure decoding, prefill and training with Bridge, as ratios within one run.

    Both sides are timed in turn, and the medians compared: 1.05 is 5 % slower than the host.
    With --peers: tokens a second of the same model in transformers, llama.cpp and others too.

    Example: bridge bench ./smol-bridge --backend torch --width 8

    Example: bridge bench ./smol-bridge --peers --widths 1,8 --plot peers.png
    """
    from bridge.errors import BridgeError

    for name in RATIOS if peers else PEERS:
        source = ctx.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            raise BridgeError(f"--{name}: {'not' if peers else 'only'} with --peers; leave it out")
    if peers:
        from bridge_cli.bench_peers import bench_peers

        chosen = {"widths": widths, "engines": engines, "dtypes": dtypes}
        sizes = {"new": new, "seconds": seconds, "threads": threads}
        sizes |= {"prompt_tokens": prompt_tokens, "rounds": rounds}
        return bench_peers(checkpoint, device, chosen, sizes, plot, save, json)
    from rich.console import Console
    from rich.table import Table

    from bridge.checkpoints.reading import open_checkpoint
    from bridge.evaluation.speed import Workload, bench
    from bridge.registry import find_backend, resolve_device, resolve_dtype

    opened = open_checkpoint(checkpoint)
    chosen = find_backend(backend)
    device = resolve_device(chosen, device)
    dtype = resolve_dtype(chosen, device, dtype, opened.dtype)
    workload = Workload(width, prompt_tokens or 128, steps, rounds or 5, rows, timesteps)
    if figures is None:
        figures = "decode,prefill,train" if weights is None else "decode,prefill"
    names = tuple(name.strip() for name in figures.split(",") if name.strip())
    found = []
    with Console(stderr=True).status("measuring") as status:
        for figure in bench(opened, chosen.name, device, dtype, names, workload, weights):
            found.append(figure)
            status.update(f"measured {', '.join(f.name for f in found)}")
    machine = _machine(chosen.name, device)
    if json:
        return print_json(
            {
                **machine,
                "dtype": dtype,
                "weights": weights,
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
    where += f" with {weights} weights" if weights else ""
    console.print(where, style="dim", highlight=False)


def _machine(backend: str, device: str) -> dict[str, Any]:
    """What the figures are of."""
    import os
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed = version(backend)
    except PackageNotFoundError:
        installed = "?"
    return {
        "backend": backend,
        "version": installed,
        "device": device,
        "processor": device_name(device, backend),
        "cores": os.cpu_count(),
    }
