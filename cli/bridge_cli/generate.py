"""`bridge generate`: N interdependent answers, live, as text, or as JSON.

On a terminal the answers are watched as they grow, and stay when all are done, or at Ctrl-C what
there is of them. Elsewhere stdout gets the answers alone, and with `--json` one object alone.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bridge_cli.options import (
    AnswerSeed,
    Backend,
    Base,
    Device,
    Dtype,
    MaxNewTokens,
    MinP,
    Raw,
    Stop,
    System,
    Temperature,
    TopK,
    TopP,
    Weights,
    integer,
)
from bridge_cli.text import harmless, print_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from bridge.decoding.events import Done, Event, ResponseSet
    from bridge.evaluation.voting import Vote
    from bridge_cli.view import View


def generate(
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            metavar="[CKPT]",
            help="A checkpoint directory; without one, the small bundled model for puzzles such as "
            "'3 5 2 7 = 8 ?'.",
        ),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="Each gets WIDTH answers; - reads one from stdin."),
    ] = None,
    width: Annotated[int, integer("width", "-n", "--width", help="Answers a prompt.")] = 8,
    file: Annotated[
        Path | None,
        typer.Option(help="A prompt a line: text, or JSON with prompt or messages; - is stdin."),
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
    vote: Annotated[bool, typer.Option("--vote", help="End with the majority answer.")] = False,
    backend: Backend = None,
    device: Device = None,
    dtype: Dtype = None,
    weights: Weights = None,
    base: Base = None,
    live: Annotated[
        bool,
        typer.Option(
            "--live/--no-live", " /--plain", help="On a terminal, watch the answers grow."
        ),
    ] = True,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Answer prompts, each with WIDTH rows that see each other.

    --vote counts answers that are tagged, boxed, after #### or "answer is", or a last number.

    Example: bridge generate '3 5 2 7 = 8 ?'

    Example: bridge generate ./smol-bridge 'Tom has 12 apples...' --width 8 --vote

    Example: bridge generate ./smol-bridge --file questions.txt --json | jq .prompts
    """
    from rich.console import Console

    from bridge.decoding.events import Done
    from bridge.model import BUNDLED, load
    from bridge_cli.prompts import check_words, read_prompts
    from bridge_cli.view import View

    sampling: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
    }
    where, prompts = _which(checkpoint, prompts or [])
    asked = read_prompts(prompts, file)
    notes = Console(stderr=True)
    with notes.status("loading") if notes.is_terminal and not json else _nothing():
        model = load(where, base=base, backend=backend, device=device, dtype=dtype, weights=weights)
    if where is None:
        check_words(asked, model.tokenizer)
    chat = model.has_chat_template and not raw
    _check_chat(asked, where or BUNDLED, chat, raw, system)
    events = model.stream(
        asked,
        width=width,
        max_new_tokens=max_new_tokens,
        stop=stop or None,
        chat=chat,
        system=system,
        **sampling,
    )
    console = Console(highlight=False)
    view = View([width] * len(asked))
    done: Done | None = None
    try:
        done = _follow(events, view, None if json else console, notes, live)
    except KeyboardInterrupt:
        if not json:
            _print_partial(view, console)
        raise
    votes = [_vote(s) for s in done.sets] if vote else None
    if not json:
        for number, answers in enumerate(done.sets):
            _print_answers(answers, number, len(done.sets), console)
            if votes:
                _print_vote(votes[number], console)
        return _print_rates(done, str(model), console)
    sets = [s.to_json() for s in done.sets]
    for answers, winner in zip(sets, votes or [], strict=False):
        answers["vote"] = vars(winner)
    print_json(
        {
            "checkpoint": str(where or BUNDLED),
            "backend": model.backend,
            "device": model.device,
            "dtype": model.dtype,
            "weights": model.weights,
            "width": width,
            "max_new_tokens": max_new_tokens,
            "stop": stop or [],
            "chat": chat,
            **sampling,
            "prompts": sets,
            "timing": _timing(done),
        }
    )


def _which(first: str | None, prompts: list[str]) -> tuple[Path | None, list[str]]:
    """The checkpoint, None for the bundled one, and the prompts. A single argument is a prompt
    unless it is there as a file, or could only be one."""
    if first is None or prompts or "/" in first or os.path.exists(first):
        return None if first is None else Path(first), prompts
    return None, [first]


def _check_chat(
    asked: list[Any], checkpoint: Path, chat: bool, raw: bool, system: str | None
) -> None:
    """Refuse options that would have no effect, rather than drop them in silence."""
    from bridge.errors import BridgeError
    from bridge_cli.prompts import check_system

    messages = any(not isinstance(prompt, str) for prompt in asked)
    if raw and messages:
        raise BridgeError("--raw feeds texts as they are, but a prompt is messages; drop --raw")
    check_system(system, chat, raw, checkpoint)
    if messages and system is not None:
        raise BridgeError("--system goes with texts; put a system message into the messages")


def _timing(done: "Done") -> dict[str, float]:
    """Tokens, seconds and rates, and what became of the rows that were computed; a prompt is read
    once for all of its rows (clause 4.2)."""
    responses = [r for s in done.sets for r in s.responses]
    return {
        "prompt_tokens": sum(len(s.prompt_tokens) for s in done.sets),
        "prefill_seconds": done.prefill_seconds,
        "rows": len(responses),
        "new_tokens": sum(len(r.tokens) for r in responses),
        "decode_seconds": done.decode_seconds,
        "tokens_per_second": done.tokens_per_second,
        "tokens_per_second_per_row": done.tokens_per_second / len(responses),
        "row_steps": done.stats.row_steps,
        "alive_share": done.stats.alive_share,
    }


def _vote(answers: "ResponseSet") -> "Vote":
    """A row that was cut off votes only for what it has stated as its answer."""
    from bridge.evaluation.voting import majority

    responses = answers.responses
    return majority([r.text for r in responses], [r.finish_reason != "length" for r in responses])


def _follow(
    events: "Iterator[Event]", view: "View", console: "Console | None", notes: "Console", live: bool
) -> "Done":
    """Run the stream to its end: on a terminal with the view, else with a count on stderr."""
    from rich.live import Live

    from bridge.decoding.events import Done

    # isatty as well: FORCE_COLOR makes rich take a file for a terminal.
    if live and console is not None and console.is_interactive and sys.stdout.isatty():
        shown = Live(view, console=console, refresh_per_second=8, transient=True)
    elif console is not None and notes.is_terminal:
        shown = Live(_Count(view), console=notes, refresh_per_second=4, transient=True)
    else:
        shown = _nothing()
    with shown:
        for event in events:
            if isinstance(event, Done):
                return event
            view.take(event)
    raise AssertionError("a stream ends with Done")


class _Count:
    """One line of progress."""

    def __init__(self, view: "View") -> None:
        self.view = view

    def __rich__(self) -> "Text":
        return self.view.progress()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _print_answers(answers: "ResponseSet", number: int, of: int, console: "Console") -> None:
    from rich.rule import Rule
    from rich.text import Text

    from bridge_cli.view import heading

    if of > 1:
        first = harmless(answers.prompt).strip().partition("\n")[0]
        console.print(
            Rule(Text(f"prompt {number + 1}: {first}", overflow="ellipsis"), characters="═")
        )
    for row, response in enumerate(answers.responses):
        title = heading(row, len(response.tokens), response.finish_reason)
        console.print(Rule(title, align="left", characters="─"))
        _print_text(response.text, console)


def _print_text(text: str, console: "Console") -> None:
    """An answer: whole words on a terminal's lines, and its own lines in a pipe."""
    from rich.text import Text

    console.print(Text(harmless(text.strip())), soft_wrap=not console.is_terminal)


def _print_partial(view: "View", console: "Console") -> None:
    """What there was when the user stopped it."""
    from rich.rule import Rule
    from rich.text import Text

    for row in view.rows:
        if row.tokens:
            title = row.title()
            if len(view.widths) > 1:
                title = Text.assemble(f"prompt {row.prompt + 1} · ", title)
            console.print(Rule(title, align="left", characters="─"))
            _print_text(row.text, console)


def _print_vote(vote: "Vote", console: "Console") -> None:
    from rich.rule import Rule
    from rich.text import Text

    console.print(Rule("vote", align="left", characters="─"))
    if vote.answer is None:
        return console.print("no row gave an answer")
    others = ", ".join(f"{harmless(a)} ({n})" for a, n in vote.tallies.items() if a != vote.answer)
    line = Text.assemble(
        "majority answer: ",
        (harmless(vote.answer), "bold green"),
        f" ({vote.count} of {vote.total} rows)",
        " in a tie, the earliest row's" if vote.tied else "",
        f"; others: {others}" if others else "",
    )
    console.print(line, soft_wrap=True)


def _print_rates(done: "Done", model: str, console: "Console") -> None:
    from rich.text import Text

    t = _timing(done)
    lines = (
        f"\n{model.strip('<>')}\n"
        f"prefill: {t['prompt_tokens']} tokens in {t['prefill_seconds']:.2f} s · "
        f"decoding: {t['new_tokens']} tokens in {t['decode_seconds']:.2f} s, "
        f"{t['tokens_per_second']:.0f} tokens/s over {t['rows']} rows, "
        f"{t['tokens_per_second_per_row']:.1f} a row"
    )
    console.print(Text(lines, "dim"), soft_wrap=not console.is_terminal)
