"""`bridge agree`: the same seed gives the same tokens on every backend, shown on a real model."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bridge_cli.options import MinP, Temperature, TopK, TopP, integer, number
from bridge_cli.text import harmless, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from bridge.model import Model
    from bridge_conformance.agreement import Agreement


def agree(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint directory.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What all rows answer.")],
    backends: Annotated[
        str, typer.Option(help="Names by commas; the first is followed. Else all that work here.")
    ] = "",
    width: Annotated[int, integer("width", "-n", "--width", help="Rows.")] = 4,
    max_new_tokens: Annotated[int, integer("max_new_tokens", help="Of each row.")] = 48,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Annotated[int, integer("seed", help="Of the draws.")] = 0,
    dtype: Annotated[str, typer.Option(help="What every backend computes in.")] = "float32",
    raw: Annotated[
        bool, typer.Option("--raw", help="Feed the prompt as it is, without a chat template.")
    ] = False,
    fill_blocks: Annotated[
        float,
        number(
            "fill_blocks",
            float,
            help="Fill the blocks' output projections with random numbers of this scale: fresh "
            "ones are zero, and rows then exchange nothing. 0 leaves them as they are.",
        ),
    ] = 0.0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Draw the same tokens on several backends, and show where rounding decides.

    Every backend draws for itself at each step; the reference (numpy), which decodes slowly, draws
    from all that was said at once. Where one differs, the margin says how close the uniform was to
    the border between two tokens. Exit code 1 if rounding does not explain it, by what the
    reference itself rounds on the same tokens.

    Example: bridge agree ./smol-bridge 'What is 5 * 8?' --backends torch,jax,mlx --fill-blocks 0.5
    """
    import numpy as np
    from rich.console import Console

    from bridge.decoding.inputs import check_prompts
    from bridge.decoding.memory import check_decoding
    from bridge.decoding.requests import check_sampling
    from bridge.errors import BridgeError, shorten
    from bridge_conformance.agreement import allow_rounding, compare, replay

    sampling = check_sampling(temperature, top_k, top_p, min_p, seed)
    notes, console = Console(stderr=True), Console(highlight=False)
    models: dict[str, Model] = {}
    for name in _names(backends):
        notes.print(f"loading {shorten(name)}", style="dim", highlight=False)
        models[name] = _load(checkpoint, name, dtype, fill_blocks)
    first = next(model for name, model in models.items() if name != "numpy")
    tokenizer = first.tokenizer
    if tokenizer is None:
        raise BridgeError(f"{checkpoint}: has no tokenizer.json, so it takes no text")
    chat = tokenizer.chat_template is not None and not raw
    turn = {"role": "user", "content": prompt}
    ids = np.asarray(tokenizer.encode_chat([turn]) if chat else tokenizer.encode(prompt))
    check_prompts(first.config, [ids], [width], max_new_tokens)
    check_decoding(first.implementation, len(ids), width, max_new_tokens)
    if not fill_blocks and _fresh(checkpoint):
        notes.print("the blocks are fresh and add nothing; --fill-blocks 0.5 makes rows exchange")
    implementations = {name: model.implementation for name, model in models.items()}
    reference = implementations.pop("numpy", None)
    prompts = [ids.astype(np.int64)]
    steps = compare(
        implementations,
        prompts,
        [width],
        max_new_tokens,
        sampling,
        first.eos_ids,
    )
    result: Agreement | None = None
    with notes.status("drawing") as status:
        for step, result in enumerate(steps, 1):
            status.update(f"step {step} of {max_new_tokens}, {len(result.flips)} flips")
    assert result is not None
    if reference is not None:
        notes.print("replaying on numpy", style="dim", highlight=False)
        limits = prompts, [width], max_new_tokens
        replay("numpy", reference, first.implementation, *limits, result, sampling)
    if result.flips:
        notes.print("measuring rounding on the reference", style="dim", highlight=False)
        if reference is None:
            reference = _load(checkpoint, "numpy", dtype, fill_blocks).implementation
        allow_rounding(result, reference, prompts, [width])
    if json:
        flips = [{**asdict(flip), "explained": flip.explained} for flip in result.flips]
        print_json({**asdict(result), "flips": flips})
    else:
        _print(result, [tokenizer.decode(row) for row in result.tokens], console)
    if result.unexplained:
        raise typer.Exit(1)


def _names(given: str) -> list[str]:
    from bridge.errors import BridgeError
    from bridge.registry import backends as find

    here = [info.name for info in find() if info.installed]
    names = [name.strip() for name in given.split(",") if name.strip()] or here
    if len(set(names)) < 2:
        raise BridgeError(f"--backends: {', '.join(names)} is one alone; name two or more")
    return list(dict.fromkeys(names))


def _load(checkpoint: Path, backend: str, dtype: str, fill: float) -> "Model":
    from bridge.checkpoints.reading import open_checkpoint
    from bridge.errors import BridgeError
    from bridge.model import build
    from bridge_conformance.agreement import WithOutputs

    opened = open_checkpoint(checkpoint)
    tensors = opened.tensors
    if fill:
        if opened.config.bridge is None:
            raise BridgeError(f"{checkpoint}: has no Bridge blocks to fill; bridge init adds them")
        tensors = WithOutputs(tensors, seed=0, scale=fill)
    return build(opened, opened.config, tensors, backend, dtype=dtype)


def _fresh(checkpoint: Path) -> bool:
    """Whether there are blocks whose output projections are all zero."""
    from bridge.checkpoints.reading import open_checkpoint
    from bridge_conformance.agreement import OUTPUTS

    tensors = open_checkpoint(checkpoint).tensors
    outputs = [name for name in tensors if name.endswith(OUTPUTS)]
    return bool(outputs) and not any(tensors[name].any() for name in outputs)


def _print(result: "Agreement", texts: list[str], console: "Console") -> None:
    from rich.rule import Rule
    from rich.text import Text

    for row, text in enumerate(texts):
        title = f"row {row} · {len(result.tokens[row])} tokens"
        console.print(Rule(title, align="left", characters="─"))
        console.print(Text(harmless(text.strip())), soft_wrap=not console.is_terminal)
    console.print(Rule("agreement", align="left", characters="─"))
    same = result.draws - len(result.flips)
    console.print(
        f"{same} of {result.draws} draws are the same on {', '.join(result.backends)}",
        style="red" if result.unexplained else "green",
    )
    for flip in result.flips:
        why = "rounding decides" if flip.explained else "NOT explained by rounding"
        console.print(
            f"step {flip.step}, row {flip.row}: {result.backends[0]} drew {flip.first_drew}, "
            f"{flip.backend} {flip.drawn}; the uniform is {flip.margin:.1e} from the border, which "
            f"moved by {flip.moved:.1e} ({why}; logits {flip.logits_apart:.1e} apart, of "
            f"{flip.allowed:.1e} allowed)"
        )
