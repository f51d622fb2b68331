"""`bridge generate`: N interdependent answers, live, as text, or as JSON."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bridge_cli.text import harmless, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from bridge.generation import Done, Event, ResponseSet
    from bridge.vote import Vote
    from bridge_cli.view import View


def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint directory.")],
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="Each gets WIDTH answers.")
    ] = None,
    width: Annotated[int, typer.Option("-n", "--width", help="Answers a prompt.")] = 8,
    file: Annotated[
        Path | None, typer.Option(help="A file with a prompt, a .jsonl file, or - for stdin.")
    ] = None,
    lines: Annotated[bool, typer.Option("--lines", help="Each line of the file is one.")] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Of each row; else 256, or what the context leaves.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest, up to this sum.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Keep what has this fraction of the likeliest.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same answers.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text that ends a row; repeat it.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system message of the chat.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Feed prompts as they are, without a chat template.")
    ] = False,
    vote: Annotated[bool, typer.Option("--vote", help="End with the majority answer.")] = False,
    backend: Annotated[str | None, typer.Option(help="See bridge backends; else the best.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda:0; else the best.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16, float64.")] = None,
    base: Annotated[Path | None, typer.Option(help="The host of an adapter.")] = None,
    live: Annotated[bool, typer.Option(help="Watch the answers grow, on a terminal.")] = True,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Answer prompts, each with WIDTH rows that see each other.

    Example: bridge generate ./smol-bridge 'Tom has 12 apples...' --width 8 --vote

    Example: cat question.txt | bridge generate ./smol-bridge --json | jq .prompts
    """
    from rich.console import Console

    from bridge.generation import Done
    from bridge.model import load
    from bridge_cli.prompts import read_prompts
    from bridge_cli.view import View

    asked = read_prompts(prompts or [], file, lines)
    notes = Console(stderr=True)
    with notes.status("loading") if notes.is_terminal and not json else _nothing():
        model = load(checkpoint, base=base, backend=backend, device=device, dtype=dtype)
    sampling: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
    }
    template = model.tokenizer is not None and model.tokenizer.chat_template is not None
    events = model.stream(
        asked,
        width=width,
        max_new_tokens=max_new_tokens,
        stop=stop or None,
        chat=template and not raw,
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
            "checkpoint": str(checkpoint),
            "backend": model.backend,
            "device": model.device,
            "dtype": model.dtype,
            "width": width,
            **sampling,
            "prompts": sets,
            "timing": {
                "prefill_seconds": done.prefill_seconds,
                "decode_seconds": done.decode_seconds,
                "tokens_per_second": done.tokens_per_second,
            },
        }
    )


def _vote(answers: "ResponseSet") -> "Vote":
    """A row that was cut off votes only for what it has stated as its answer."""
    from bridge.vote import majority

    responses = answers.responses
    return majority([r.text for r in responses], [r.finish_reason != "length" for r in responses])


def _follow(
    events: "Iterator[Event]", view: "View", console: "Console | None", notes: "Console", live: bool
) -> "Done":
    """Run the stream to its end: on a terminal with the view, else with a count on stderr."""
    from rich.live import Live

    from bridge.generation import Done

    watched = live and console is not None and console.is_terminal
    if watched:
        assert console is not None
        shown = Live(view, console=console, refresh_per_second=12, transient=True)
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

    def __rich__(self) -> str:
        rows = self.view.rows
        done, tokens = sum(bool(row.reason) for row in rows), sum(row.tokens for row in rows)
        return f"{done} of {len(rows)} answers done, {tokens} tokens"


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _print_answers(answers: "ResponseSet", number: int, of: int, console: "Console") -> None:
    from rich.rule import Rule
    from rich.text import Text

    if of > 1:
        first = harmless(answers.prompt).strip().partition("\n")[0]
        console.print(
            Rule(Text(f"prompt {number + 1}: {first}", overflow="ellipsis"), characters="═")
        )
    for row, response in enumerate(answers.responses):
        ending = {"length": "cut off", "stop": "stopped"}.get(response.finish_reason, "done")
        title = Text(f"row {row} · {len(response.tokens)} tokens · {ending}")
        console.print(Rule(title, align="left", characters="─"))
        # soft_wrap: a pipe gets the text as it is, and a terminal breaks long lines itself.
        console.print(Text(harmless(response.text.strip())), soft_wrap=not console.is_terminal)


def _print_partial(view: "View", console: "Console") -> None:
    """What there was when the user stopped it."""
    from rich.rule import Rule
    from rich.text import Text

    for row in view.rows:
        if row.tokens:
            console.print(Rule(row.title(), align="left", characters="─"))
            console.print(Text(row.text.strip()))


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
    tokens = sum(len(r.tokens) for s in done.sets for r in s.responses)
    rows = sum(len(s.responses) for s in done.sets)
    read = sum(len(s.prompt_tokens) for s in done.sets)
    console.print()
    console.print(
        f"{model.strip('<>')}\n"
        f"prompt: {read} tokens in {done.prefill_seconds:.2f} s · "
        f"answers: {tokens} tokens in {done.decode_seconds:.2f} s, "
        f"{done.tokens_per_second:.0f} tokens/s over {rows} rows, "
        f"{done.tokens_per_second / rows:.1f} a row",
        style="dim",
        markup=False,
        soft_wrap=True,
    )
