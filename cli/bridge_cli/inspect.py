"""`bridge inspect`: what a checkpoint is, or what a config calls for, from headers alone; with
`--trace`, what its blocks do while a group answers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bridge_cli.options import (
    AnswerSeed,
    Backend,
    Base,
    Device,
    MaxNewTokens,
    MinP,
    Raw,
    Stop,
    System,
    Temperature,
    TopK,
    TopP,
    integer,
)
from bridge_cli.text import count, harmless_line, print_json, size

if TYPE_CHECKING:
    from rich.table import Table

    from bridge.checkpoints.sizes import Summary

OF_TRACES = "With --trace"
# Options that mean something without --trace alone, and those that mean something with it alone.
SIZES = ("prompt", "length", "tensors", "heads", "head_dim", "kind", "layers")
TRACES = (
    *("layer", "png", "html", "max_new_tokens", "temperature", "top_k", "top_p", "min_p"),
    *("seed", "stop", "system", "raw", "backend", "device"),
)


def inspect(
    ctx: typer.Context,
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            metavar="[CKPT]",
            help="A checkpoint directory, or a config.json; without one, the small bundled model.",
        ),
    ] = None,
    width: Annotated[int, integer("width", "-n", "--width", help="Rows a prompt.")] = 8,
    prompt: Annotated[int, integer("prompt", help="Tokens of the prompt, for memory.")] = 512,
    length: Annotated[int, integer("length", help="New tokens of each row, for memory.")] = 512,
    dtype: Annotated[str | None, typer.Option(help="What to compute in; else as stored.")] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    base: Base = None,
    heads: Annotated[
        int | None, integer("heads", help="Of a config alone: heads of a block.", show_default="8")
    ] = None,
    head_dim: Annotated[
        int | None,
        integer("head_dim", help="Of a config alone: width of a head.", show_default="64"),
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
    trace: Annotated[
        str | None,
        typer.Option(metavar="PROMPT", help="Answer this, and show what rows read of each other."),
    ] = None,
    layer: Annotated[
        int | None,
        integer(
            "layer",
            help="Whose attention to show; else the mean.",
            rich_help_panel=OF_TRACES,
            show_default=False,
        ),
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option(help="Plot the trace into this new file.", rich_help_panel=OF_TRACES),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Write a page of it, with every token.", rich_help_panel=OF_TRACES),
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = 1.0,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: AnswerSeed = 0,
    stop: Stop = None,
    system: System = None,
    raw: Raw = False,
    backend: Backend = None,
    device: Device = None,
) -> None:
    """Show a checkpoint's sizes, and its memory at a width.

    Reads headers and no weights, so it is quick however large the model.

    Of a config without weights, it shows what blocks would add.

    With --trace, rows answer a prompt as in bridge generate, whose options it
    takes, and are then replayed to see what the blocks did: where each row
    looks, by layer and step; how much each block adds; how alike the answers
    are, and from when on.

    Example: bridge inspect ./smol-bridge --width 16 --length 1024

    Example: bridge inspect ./llama/config.json --heads 16 --layers 0-15

    Example: bridge inspect --trace '3 5 2 7 = 8 ?' --html trace.html
    """
    if trace is not None:
        return _trace(ctx)
    _refuse_given(ctx, TRACES, "is of a trace; add --trace PROMPT")
    from rich.console import Console

    from bridge.checkpoints.sizes import inspect as look
    from bridge.config.sizes import WIDTHS
    from bridge.errors import BridgeError
    from bridge.model import BUNDLED
    from bridge.registry import ALIASES

    dtype = ALIASES.get(dtype, dtype) if dtype else None
    if dtype is not None and dtype not in WIDTHS:
        raise BridgeError(f"dtype {dtype!r} is not known (known: {', '.join(WIDTHS)})")
    blocks = {"heads": heads, "head_dim": head_dim, "kind": kind, "layers": layers}
    summary = look(checkpoint or BUNDLED, base, **blocks)
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
            print(f"{harmless_line(name):60} {spec['dtype']:5} {spec['shape']}{packed}")


def _trace(ctx: typer.Context) -> None:
    from bridge.model import BUNDLED
    from bridge_cli.trace import Request, show_trace

    _refuse_given(ctx, SIZES, "is for sizes, which --trace does not show; drop one of the two")
    given = dict(ctx.params)
    sampling = {name: given[name] for name in ("temperature", "top_k", "top_p", "min_p", "seed")}
    same = (
        *("layer", "png", "html", "json", "width", "max_new_tokens"),
        *("system", "raw", "backend", "device", "dtype", "base"),
    )
    show_trace(
        Request(
            checkpoint=given["checkpoint"] or BUNDLED,
            prompt=given["trace"],
            sampling=sampling,
            stop=list(given["stop"] or []),
            **{name: given[name] for name in same},
        )
    )


def _refuse_given(ctx: typer.Context, names: tuple[str, ...], why: str) -> None:
    """Refuse options that would have no effect, rather than drop them in silence."""
    from bridge.errors import BridgeError

    for name in names:
        source = ctx.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            raise BridgeError(f"--{name.replace('_', '-')} {why}")


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
    if lora := config.lora:
        of_host = summary.lora_parameters / summary.host_parameters
        lines["LoRA"] = (
            f"rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.targets)} of every layer: "
            f"{count(summary.lora_parameters)} parameters ({of_host:.1%} of the host)"
        )
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
    from bridge.checkpoints.sizes import PAPER_SHARES

    return " to ".join(f"{share:.1%}" for share in PAPER_SHARES)


def _listing(lines: dict[str, str]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in lines.items():
        table.add_row(name, Text(harmless_line(value)))
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
