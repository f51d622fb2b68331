"""`bridge init`: a host becomes a Bridge model."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from bridge_cli.options import integer
from bridge_cli.progress import byte_bar
from bridge_cli.text import count, harmless_line, print_json, size


def init(
    host: Annotated[
        Path,
        typer.Argument(
            metavar="HOST",
            help="A Hugging Face directory, or a GGUF file (the first part, where it is split).",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The checkpoint directory to make.")],
    heads: Annotated[int, integer("heads", help="Heads of a block.")] = 8,
    head_dim: Annotated[int, integer("head_dim", help="Width of a head.")] = 64,
    kind: Annotated[
        str, typer.Option(help="attention, or mlp for the baseline of equal size.")
    ] = "attention",
    layers: Annotated[
        str, typer.Option(help="Layers that get a block: all, or such as 0-14,20.")
    ] = "all",
    seed: Annotated[int, integer("seed", help="Of the fresh matrices.")] = 0,
    dtype: Annotated[
        str | None, typer.Option(help="Store as float32, bfloat16 or float16; else as the host.")
    ] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write the blocks alone; the host stays where it is.")
    ] = False,
    lora: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Take low-rank updates of HOST, as PEFT saved them."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print what was made as JSON.")] = False,
) -> None:
    """Add fresh Bridge blocks to a host.

    Their outputs start at zero, so the new model is its host, exactly, until it is trained.

    Example: bridge init ./SmolLM2-135M-Instruct ./smol-bridge --heads 8 --head-dim 64

    Example: bridge init model.gguf ./smol-pmatch --kind mlp --layers 0-14,20
    """
    from bridge.checkpoints.initialise import init as make

    # A host in GGUF is read first, which says nothing of its progress.
    with byte_bar(json) as progress:
        made = make(
            host,
            out,
            heads=heads,
            head_dim=head_dim,
            kind=kind,
            layers=layers,
            seed=seed,
            dtype=dtype,
            adapter=adapter,
            lora=lora,
            progress=progress,
        )
    if json:
        return print_json(made.to_json())
    print(
        f"{harmless_line(str(out))}: {count(made.host_parameters)} host parameters, and "
        f"{made.layers} {kind} blocks with {count(made.bridge_parameters)} "
        f"({made.share:.1%} of the host); {size(made.bytes)} in {made.dtype}\n"
        "The fresh blocks add zero: until they are trained, rows answer as the host alone would.\n"
        f"Try: bridge generate {shlex.quote(str(out))} 'What is 17 + 25?' --width 8"
    )
