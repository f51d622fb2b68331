"""`bridge inspect`: what a checkpoint is, or what a config calls for, from headers alone."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bridge_cli.options import Base
from bridge_cli.text import count, one_line, print_json, size

if TYPE_CHECKING:
    from rich.table import Table

    from bridge.inspect import Summary


def inspect(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CKPT", help="A checkpoint directory, or a config.json.")
    ],
    width: Annotated[int, typer.Option("-n", "--width", help="Rows a prompt, for memory.")] = 8,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt, for memory.")] = 512,
    length: Annotated[int, typer.Option(help="New tokens of each row, for memory.")] = 512,
    dtype: Annotated[
        str | None, typer.Option(help="What to compute in, for memory; else as stored.")
    ] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    base: Base = None,
    heads: Annotated[
        int | None, typer.Option(help="Of a config alone: heads of a block.", show_default="8")
    ] = None,
    head_dim: Annotated[
        int | None, typer.Option(help="Of a config alone: width of a head.", show_default="64")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(help="Of a config alone: attention or mlp.", show_default="attention"),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Of a config alone: layers with a block.", show_default="all"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show a checkpoint's sizes, and its memory at a width.

    Reads headers and no weights, so it is quick however large the model.

    Of a config without weights, it shows what blocks would add.

    Example: bridge inspect ./smol-bridge --width 16 --length 1024

    Example: bridge inspect ./llama/config.json --heads 16 --layers 0-15
    """
    from rich.console import Console

    from bridge.errors import BridgeError
    from bridge.inspect import WIDTHS
    from bridge.inspect import inspect as look
    from bridge.registry import ALIASES

    for name, value in (("width", width), ("prompt", prompt), ("length", length)):
        if value < 1:
            raise BridgeError(f"{name} must be 1 or above, not {value}")
    dtype = ALIASES.get(dtype, dtype) if dtype else None
    if dtype is not None and dtype not in WIDTHS:
        raise BridgeError(f"dtype {dtype!r} is not known (known: {', '.join(WIDTHS)})")
    blocks = {"heads": heads, "head_dim": head_dim, "kind": kind, "layers": layers}
    summary = look(checkpoint, base, **blocks)
    memory = summary.memory(width, prompt, length, dtype)
    if json:
        asked = {
            "width": width,
            "prompt": prompt,
            "length": length,
            "dtype": dtype or summary.dtype,
        }
        need = {**asked, **vars(memory), "total": memory.total}
        listed = {"tensors": summary.tensors} if tensors else {}
        return print_json({**summary.to_json(), "memory": need, **listed})

    console = Console(highlight=False)
    lines = _describe(summary)
    packed = summary.checkpoint.quantization if summary.checkpoint and not dtype else None
    weights = f"weights {size(memory.weights)}" + (f" ({packed.bits}-bit)" if packed else "")
    lines[f"memory at width {width}"] = (
        f"{size(memory.total)} in {dtype or summary.dtype}: {weights}, keys and values of "
        f"{prompt} prompt tokens {size(memory.prompt_cache)} (shared by the rows) and of {length} "
        f"new tokens a row {size(memory.row_caches)}"
    )
    console.print(_listing(lines))
    console.print()
    console.print(_groups(summary))
    if tensors:
        print()
        for name, spec in summary.tensors.items():
            packed = f" {spec['bits']}-bit" if "bits" in spec else ""
            print(f"{one_line(name):60} {spec['dtype']:5} {spec['shape']}{packed}")


def _describe(summary: "Summary") -> dict[str, str]:
    config, opened = summary.config, summary.checkpoint
    lines = {
        "host": f"{config.model_type}, {config.num_hidden_layers} layers, width "
        f"{config.hidden_size}, {config.num_attention_heads} heads of {config.head_dim} "
        f"({config.num_key_value_heads} key-value heads), FFN {config.intermediate_size}, "
        f"vocabulary {config.vocab_size}{' (tied)' if config.tie_word_embeddings else ''}",
        "context": f"{config.max_position_embeddings} tokens, rope {config.rope.rope_type}",
    }
    if bridge := config.bridge:
        lines["would add" if summary.planned else "Bridge"] = (
            f"{len(bridge.layers)} {bridge.kind} blocks of {bridge.num_heads} x {bridge.head_dim}, "
            f"after layers {_ranges(bridge.layers)}; spec {bridge.spec_version}"
        )
        lines["parameters"] = (
            f"{count(summary.host_parameters)} host + {count(summary.bridge_parameters)} Bridge "
            f"({summary.share:.1%} of the host; in the paper {_paper()})"
        )
    else:
        lines["Bridge"] = "no blocks; bridge init adds them"
        lines["parameters"] = f"{count(summary.host_parameters)} host"
    if opened is None:
        lines["on disk"] = f"no weights; counted as {summary.dtype}"
        return lines
    lines["form"] = opened.form
    lines["on disk"] = f"{size(summary.disk_bytes)}, {_stored(summary)}"
    if opened.base:
        lines["adapter on"] = f"{opened.base.path} (its hash is checked when it is loaded)"
    return lines


def _stored(summary: "Summary") -> str:
    """The dtype, or how most matrices are packed."""
    how = summary.checkpoint.quantization if summary.checkpoint else None
    if how is None:
        return summary.dtype
    return f"{how.bits}-bit in groups of {how.group_size}, scales in {summary.dtype}"


def _paper() -> str:
    from bridge.inspect import PAPER_SHARES

    return " to ".join(f"{share:.1%}" for share in PAPER_SHARES)


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
