"""`bridge inspect --trace`: a group answers a prompt, and what its rows read of each other shows.

Any backend answers; the reference replays. All that can be refused is refused before a model is
loaded, and files are written whole or not at all.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge_cli.text import harmless, print_json

if TYPE_CHECKING:
    from bridge.contract import Sampling
    from bridge.model import Model
    from bridge.tracing.trace import Trace


@dataclass(frozen=True)
class Request:
    """What is asked: as the options of `bridge inspect` say."""

    checkpoint: Path
    prompt: str
    layer: int | None
    png: Path | None
    html: Path | None
    json: bool
    width: int
    max_new_tokens: int | None
    sampling: dict[str, Any]
    stop: list[str]
    system: str | None
    raw: bool
    backend: str | None
    device: str | None
    dtype: str | None
    base: Path | None


def show_trace(asked: Request) -> None:
    """Answer, replay, and show; raises BridgeError for what cannot be."""
    from rich.console import Console

    from bridge.decoding.requests import check_sampling
    from bridge.model import load
    from bridge.tracing.trace import trace
    from bridge_cli.progress import late_bar
    from bridge_cli.prompts import read_prompts

    sampling = check_sampling(**asked.sampling)
    [prompt] = read_prompts([asked.prompt], None)
    _refuse(asked)
    path, base = asked.checkpoint, asked.base
    model = load(path, base=base, backend=asked.backend, device=asked.device, dtype=asked.dtype)
    with late_bar("answering", asked.json) as update:
        answers, chat = _answer(model, prompt, asked, update)
    ran = {"backend": model.backend, "device": model.device, "dtype": model.dtype}
    exact = "float64" if model.dtype == "float64" else "float32"
    if (model.backend, model.dtype) == ("numpy", exact):
        reference = model
    else:
        del model  # its memory is the reference's
        reference = load(path, base=base, backend="numpy", dtype=exact)
    with late_bar("replaying", asked.json) as update:
        found = trace(reference, answers, sampling, update)
    _write(found, asked, sampling)
    if asked.json:
        return print_json(
            {
                "checkpoint": str(asked.checkpoint),
                **ran,
                "replayed_in": reference.dtype,
                "chat": chat,
                **asked.sampling,
                "stop": asked.stop,
                **found.to_json(),
            }
        )
    from bridge_cli.trace_view import View

    # A file or a pipe has no width of its own.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 80)
    View(console, found, asked.layer).show()


def _refuse(asked: Request) -> None:
    """What a look at the config and at the names of files is enough to refuse."""
    from bridge.checkpoints.reading import open_checkpoint
    from bridge.errors import BridgeError
    from bridge.files.atomic import refuse_existing

    for path in (asked.png, asked.html):
        if path is not None:
            refuse_existing(path)
    if asked.png is not None:
        from bridge.tracing.export import need_matplotlib

        need_matplotlib()
    bridge = open_checkpoint(asked.checkpoint, asked.base, headers_only=True).config.bridge
    if bridge is None or not bridge.layers:
        raise BridgeError(
            f"{asked.checkpoint}: has no Bridge blocks, so there is nothing to trace; "
            "bridge init adds them"
        )
    if asked.layer is not None and bridge.kind != "attention":
        raise BridgeError(f"--layer: blocks of kind {bridge.kind} have no attention; drop it")
    if asked.layer is not None and asked.layer not in bridge.layers:
        known = ", ".join(map(str, bridge.layers))
        raise BridgeError(f"--layer {asked.layer}: has no Bridge block; layers with one: {known}")


def _answer(
    model: "Model", prompt: str, asked: Request, update: Callable[[int, int], None]
) -> tuple[Any, bool]:
    """The group's answers, and whether the prompt went through a chat template."""
    from bridge.decoding.events import Done, Token
    from bridge.model import BUNDLED
    from bridge_cli.prompts import check_system, check_words

    if asked.checkpoint == BUNDLED:
        check_words([prompt], model.tokenizer)
    chat = model.has_chat_template and not asked.raw
    check_system(asked.system, chat, asked.raw, asked.checkpoint)
    events = model.stream(
        [prompt],
        width=asked.width,
        max_new_tokens=asked.max_new_tokens,
        stop=asked.stop or None,
        chat=chat,
        system=asked.system,
        **asked.sampling,
    )
    most = asked.width * (asked.max_new_tokens or 256)
    tokens = 0
    for event in events:
        if isinstance(event, Token):
            tokens += 1
            update(min(tokens, most), most)
        elif isinstance(event, Done):
            return event.sets[0], chat
    raise AssertionError("a stream ends with Done")


def _write(found: "Trace", asked: Request, sampling: "Sampling") -> None:
    from bridge.files.atomic import new_file
    from bridge.tracing.export import page, picture

    if asked.png is not None:
        drawn = picture(found, asked.layer)
        with new_file(asked.png) as file:
            file.write(drawn)
    if asked.html is not None:
        text = page(found, str(asked.checkpoint), sampling, harmless, asked.layer)
        with new_file(asked.html) as file:
            file.write(text.encode())
