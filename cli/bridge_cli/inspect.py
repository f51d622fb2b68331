"""`bridge inspect`: what a checkpoint is, from its headers."""

from pathlib import Path
from typing import Annotated

import typer

from bridge_cli.text import count, print_json, size


def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint directory.")],
    width: Annotated[int, typer.Option(min=1, help="Rows a prompt, for the memory.")] = 8,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    length: Annotated[int, typer.Option(min=1, help="New tokens of each row.")] = 512,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    base: Annotated[Path | None, typer.Option(help="The host of an adapter.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show a checkpoint's sizes and its memory at a width.

    Example: bridge inspect ./smol-bridge --width 16 --length 1024
    """
    from rich.console import Console
    from rich.table import Table

    from bridge.checkpoint import open_checkpoint
    from bridge.inspect import summarise
    from bridge.safetensors_io import CODES

    summary = summarise(open_checkpoint(checkpoint, base))
    config, memory = summary.checkpoint.config, summary.memory(width, prompt, length)
    specs = {
        name: {"dtype": CODES[spec.dtype], "shape": list(spec.shape)}
        for name, spec in summary.checkpoint.specs.items()
    }
    if json:
        need = {"width": width, "prompt": prompt, "length": length, **vars(memory)}
        listed = {"tensors": specs} if tensors else {}
        return print_json(
            {**summary.to_json(), "memory": {**need, "total": memory.total}, **listed}
        )

    blocks = "none"
    if bridge := config.bridge:
        blocks = (
            f"{len(bridge.layers)} {bridge.kind} blocks of {bridge.num_heads} x {bridge.head_dim}, "
            f"spec {bridge.spec_version}, after layers {_ranges(bridge.layers)}"
        )
    lines = {
        "host": f"{config.model_type}, {config.num_hidden_layers} layers, width "
        f"{config.hidden_size}, {config.num_attention_heads} heads of {config.head_dim} "
        f"({config.num_key_value_heads} key heads), FFN {config.intermediate_size}, vocabulary "
        f"{config.vocab_size}{' (tied)' if config.tie_word_embeddings else ''}",
        "context": f"{config.max_position_embeddings} tokens, rope {config.rope.rope_type}",
        "Bridge": blocks,
        "parameters": f"{count(summary.host_parameters)} host + "
        f"{count(summary.bridge_parameters)} Bridge ({summary.share:.1%} of the host)",
        "stored": f"{size(summary.bytes)}, "
        + ", ".join(f"{n} tensors in {code}" for code, n in summary.dtypes.items()),
        f"memory at width {width}": f"{size(memory.total)}: weights {size(memory.weights)}, "
        f"cache of {prompt} prompt tokens {size(memory.prompt_cache)} (shared), of {length} new "
        f"tokens a row {size(memory.row_caches)}",
    }
    if summary.checkpoint.base:
        lines["adapter on"] = str(summary.checkpoint.base.path)
    console = Console(soft_wrap=False, highlight=False)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in lines.items():
        table.add_row(name, value)
    console.print(table, markup=False)
    if tensors:
        for name, spec in specs.items():
            print(f"{name:60} {spec['dtype']:5} {spec['shape']}")


def _ranges(numbers: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) as 0-2,5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
