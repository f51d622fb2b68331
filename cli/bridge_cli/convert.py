"""`bridge convert`: a checkpoint in another form, dtype or packing."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from bridge_cli.options import integer
from bridge_cli.progress import byte_bar
from bridge_cli.text import harmless_line, print_json, size


def convert(
    src: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help="A checkpoint directory of any form, an adapter, or a GGUF file (the first "
            "part, where it is split).",
        ),
    ],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="The checkpoint directory to make.")],
    to: Annotated[str, typer.Option(help="The form: torch, jax or mlx.")],
    dtype: Annotated[
        str | None, typer.Option(help="Store as float32, bfloat16 or float16; else as SRC.")
    ] = None,
    quantize: Annotated[
        int | None, integer("quantize", help="Bits of the host's matrices, 4 or 8; --to mlx alone.")
    ] = None,
    group_size: Annotated[int, integer("group_size", help="Weights that share a scale.")] = 64,
    quantize_blocks: Annotated[
        bool, typer.Option("--quantize-blocks", help="Quantise the Bridge blocks too.")
    ] = False,
    shard_size: Annotated[
        str, typer.Option(help="At most so much a file, such as 500MB or 2GiB.")
    ] = "5GB",
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write the blocks alone, with SRC as their base.")
    ] = False,
    merge: Annotated[
        Path | None, typer.Option(metavar="BASE", help="Put the adapter SRC on this base.")
    ] = None,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Take a base that the adapter was not made for.")
    ] = False,
    remote_code: Annotated[
        bool,
        typer.Option(
            "--remote-code", help="Add the code with which transformers or mlx-lm runs the blocks."
        ),
    ] = False,
    lora: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Take low-rank updates of the host, as PEFT saved them."),
    ] = None,
    merge_lora: Annotated[
        bool,
        typer.Option(
            "--merge-lora",
            help="Add low-rank updates (LoRA) to the matrices; else they stay beside them.",
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print what was made as JSON.")] = False,
) -> None:
    """Write a checkpoint in the form of another framework.

    Every tensor travels byte for byte unless another dtype is asked for. SRC is left as it is.

    Example: bridge convert ./smol-bridge ./smol-mlx --to mlx --quantize 4

    Example: bridge convert ./smol-bridge ./smol-adapter --to torch --adapter

    Example: bridge convert ./run/final ./merged --to torch --merge-lora
    """
    from bridge.checkpoints.conversion import convert as make
    from bridge.config.quantization import parse_quantization

    with byte_bar(json) as progress:
        made = make(
            src,
            dst,
            to,
            dtype=dtype,
            quantize=quantize,
            group_size=group_size,
            shard_size=shard_size,
            adapter=adapter,
            merge=merge,
            any_base=any_base,
            remote_code=remote_code,
            quantize_blocks=quantize_blocks,
            lora=lora,
            merge_lora=merge_lora,
            progress=progress,
        )
    if json:
        return print_json(made.to_json())
    what = "adapter" if made.adapter else "checkpoint"
    how = made.dtype
    if made.quantization:
        most = parse_quantization({"quantization": made.quantization})
        assert most is not None
        how = f"{most.bits} bits in groups of {most.group_size}, the rest in {made.dtype}"
    tensors = f"{made.tensors} tensors, {size(made.bytes)}; {how}"
    print(f"{harmless_line(str(dst))}: {made.form} {what}, {tensors}")
    if made.lora_rank:
        print(f"Updates of rank {made.lora_rank} are beside it, in lora; PEFT reads them too.")
    if made.merged:
        print("Updates are added to the matrices, rounded once.")
    if made.dequantised:
        print(f"Dequantised to {made.dtype}: the form {made.form} stores no quantised weights.")
    print(f"Try: bridge generate {shlex.quote(str(dst))} 'What is 17 + 25?' --width 8")
