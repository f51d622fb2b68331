"""`bridge inspect`: what a checkpoint is, from its headers alone."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bridge_cli.text import count, one_line, print_json, size

if TYPE_CHECKING:
    from rich.table import Table

    from bridge.inspect import Memory, Summary


def inspect(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint directory.")],
    width: Annotated[int, typer.Option("-n", "--width", help="Rows a prompt, for memory.")] = 8,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt, for memory.")] = 512,
    length: Annotated[int, typer.Option(help="New tokens of each row, for memory.")] = 512,
    dtype: Annotated[
        str | None, typer.Option(help="What to compute in, for memory; else as stored.")
    ] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    base: Annotated[Path | None, typer.Option(help="The host of an adapter.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show a checkpoint's sizes, and its memory at a width.

    Reads headers and no weights, so it is quick however large the model.

    Example: bridge inspect ./smol-bridge --width 16 --length 1024
    """
    from rich.console import Console

    from bridge.checkpoint import open_checkpoint
    from bridge.errors import BridgeError
    from bridge.inspect import WIDTHS, summarise
    from bridge.registry import ALIASES
    from bridge.safetensors_io import CODES

    for name, value in (("width", width), ("prompt", prompt), ("length", length)):
        if value < 1:
            raise BridgeError(f"{name} must be 1 or above, not {value}")
    dtype = ALIASES.get(dtype, dtype) if dtype else None
    if dtype is not None and dtype not in WIDTHS:
        raise BridgeError(f"dtype {dtype!r} is not known (known: {', '.join(WIDTHS)})")
    summary = summarise(open_checkpoint(checkpoint, base, headers_only=True))
    memory = summary.memory(width, prompt, length, dtype)
    opened = summary.checkpoint
    specs = {
        name: {"dtype": CODES[spec.dtype], "shape": list(spec.shape)}
        for name, spec in opened.specs.items()
    }
    if json:
        asked = {
            "width": width,
            "prompt": prompt,
            "length": length,
            "dtype": dtype or opened.dtype,
        }
        need = {**asked, **vars(memory), "total": memory.total}
        listed = {"tensors": specs} if tensors else {}
        return print_json({**summary.to_json(), "memory": need, **listed})

    console = Console(highlight=False)
    lines = _describe(summary)
    lines[f"memory at width {width}"] = _memory_line(memory, prompt, length, dtype or opened.dtype)
    console.print(_listing(lines))
    console.print()
    console.print(_groups(summary))
    if tensors:
        print()
        for name, spec in specs.items():
            print(f"{one_line(name):60} {spec['dtype']:5} {spec['shape']}")


def _describe(summary: "Summary") -> dict[str, str]:
    opened = summary.checkpoint
    config = opened.config
    blocks = "no blocks; bridge init adds them"
    if bridge := config.bridge:
        blocks = (
            f"{len(bridge.layers)} {bridge.kind} blocks of {bridge.num_heads} x {bridge.head_dim}, "
            f"after layers {_ranges(bridge.layers)}; spec {bridge.spec_version}"
        )
    lines = {
        "host": f"{config.model_type}, {config.num_hidden_layers} layers, width "
        f"{config.hidden_size}, {config.num_attention_heads} heads of {config.head_dim} "
        f"({config.num_key_value_heads} key-value heads), FFN {config.intermediate_size}, "
        f"vocabulary {config.vocab_size}{' (tied)' if config.tie_word_embeddings else ''}",
        "context": f"{config.max_position_embeddings} tokens, rope {config.rope.rope_type}",
        "Bridge": blocks,
        "parameters": f"{count(summary.host_parameters)} host + "
        f"{count(summary.bridge_parameters)} Bridge ({summary.share:.1%} of the host)",
        "on disk": f"{size(summary.disk_bytes)}, {opened.dtype}",
    }
    if opened.base:
        lines["adapter on"] = f"{opened.base.path} (its hash is checked when it is loaded)"
    return lines


def _memory_line(memory: "Memory", prompt: int, length: int, dtype: str) -> str:
    return (
        f"{size(memory.total)} in {dtype}: weights {size(memory.weights)}, keys and values of "
        f"{prompt} prompt tokens {size(memory.prompt_cache)} (shared by the rows) and of {length} "
        f"new tokens a row {size(memory.row_caches)}"
    )


def _listing(lines: dict[str, str]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in lines.items():
        table.add_row(name, Text(one_line(value)))
    return table


def _groups(summary: "Summary") -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tensors of")
    for heading in ("number", "parameters", "bytes"):
        table.add_column(heading, justify="right")
    table.add_column("stored as")
    for name, group in summary.groups.items():
        sizes = (str(group.tensors), count(group.parameters), size(group.bytes))
        table.add_row(name, *sizes, ", ".join(group.dtypes))
    return table


def _ranges(numbers: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) as 0-2,5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
