"""`bridge train sft` and `bridge train grpo`: a run from its settings, live, to a checkpoint.

The options are the fields of the settings (bridge/training/settings.py), so a flag, a key of the
TOML file and a field are one thing. On a terminal the running figures are watched; elsewhere each
step is a line on stderr. stdout gets what came of it, with `--json` as one object alone.
"""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer
from typer.core import TyperGroup

from bridge_cli.options import number, read_task_options
from bridge_cli.text import count, harmless_line, print_json, size

if TYPE_CHECKING:
    from bridge.training import Result
    from bridge.training.plan import Plan
    from bridge.training.settings import Settings

HELP = {
    "sft": """Warm up fresh blocks on groups of correct responses, sampled from the model itself.

    Samples responses to a task's problems, keeps the correct ones, drops problems with fewer than
    two, and trains the blocks on groups of what is left. SOURCE is a checkpoint or a TOML file of
    settings; a flag overrides the file. A run that was stopped, by Ctrl-C or a power cut, goes on
    with the same command.

    Example: bridge train sft ./smol-bridge --task reasoning-gym:chain_sum --out ./warm

    Example: bridge train sft ./smol-bridge --data correct.jsonl --out ./warm --lr 5e-4

    Example: bridge train sft warm.toml --dry-run
    """,
    "grpo": """Learn from rewards, by groups whose rows see each other.

    Each step samples WIDTH responses to each of PROBLEMS problems, scores them, and moves the
    weights towards what scored above its group. SOURCE is a checkpoint or a TOML file of settings;
    a flag overrides the file. A run that was stopped goes on with the same command.

    The learning rate wants care: 1e-5 suits models of about a hundred million parameters, 1e-6
    billions, and 1e-4 tiny ones. Watch entropy: where it falls to 0, lower the rate.

    Example: bridge train grpo ./warm/final --task reasoning-gym:chain_sum --out ./run --steps 200

    Example: bridge train grpo run.toml --lr 2e-6 --log tensorboard

    Example: bridge train grpo --resume --out ./run
    """,
}


def train(kind: str, source: Path | None, options: dict[str, Any]) -> None:
    """Run, or plan, what the options say."""
    from bridge.training import train as run
    from bridge.training.plan import plan
    from bridge_cli.train_view import watching

    flags = {name: options.pop(name) for name in ("resume", "dry_run", "json")}
    settings = gather(kind, source, options, flags["resume"])
    if flags["dry_run"]:
        found = plan(settings)
        return print_json(found.to_json()) if flags["json"] else _print_plan(found)
    with watching(flags["json"]) as watch:
        result = run(settings, resume=flags["resume"], watch=watch)
    if flags["json"]:
        return print_json(result.to_json())
    _print_result(result)


def gather(kind: str, source: Path | None, options: dict[str, Any], resume: bool) -> "Settings":
    """Settings from a TOML file, or of a run to resume, and flags over them."""
    from bridge.errors import BridgeError
    from bridge.files.toml import read_toml
    from bridge.training.directory import CONFIG
    from bridge.training.settings import FILTERED, REFUSED, read_settings

    given: dict[str, Any] = {}
    for name in REFUSED:
        if options.pop(name) is not None:
            raise BridgeError(
                f"--{name.replace('_', '-')} is refused in training: it {FILTERED} out"
            )
    flags = {name: value for name, value in options.items() if value is not None and value != []}
    if pairs := flags.pop("task_options", []):
        flags["task_options"] = read_task_options(pairs)
    where = "settings"
    if source is not None and source.suffix == ".toml":
        given, where = read_toml(source), str(source)
    elif resume and source is None and "out" in flags:
        path = Path(flags["out"]) / CONFIG
        if not path.is_file():
            raise BridgeError(f"{path.parent}: holds no run to resume (no {CONFIG}); name another")
        given, where = read_toml(path), str(path)
    elif source is not None:
        given = {"checkpoint": str(source)}
    if not given:
        raise BridgeError("SOURCE is missing: a checkpoint, or a TOML file of settings")
    return read_settings(kind, {**given, **flags}, where)


def command(kind: str) -> Callable[..., None]:
    """The function of a subcommand, with an option for each field of the kind's settings."""
    from bridge.training.settings import KINDS, REFUSED

    types = get_type_hints(KINDS[kind])
    parameters: dict[str, tuple[Any, Any, Any]] = {
        "source": (
            Path | None,
            typer.Argument(metavar="SOURCE", help="A checkpoint directory, or settings in TOML."),
            None,
        )
    }
    for f in fields(KINDS[kind]):
        if f.name != "checkpoint":
            parameters[f.name] = (*_option(f, types[f.name]), None)
    for name in REFUSED:
        parameters[name] = (str | None, typer.Option(hidden=True), None)
    flags = {
        "resume": "OUT must hold a run to go on with; with no SOURCE its settings are taken.",
        "dry_run": "Show sizes, memory and a time estimate, and write nothing.",
        "json": "Print one JSON object.",
    }
    for name, text in flags.items():
        option = typer.Option(f"--{name.replace('_', '-')}", help=text, rich_help_panel="Run")
        parameters[name] = (bool, option, False)

    def run(**options: Any) -> None:
        train(kind, options.pop("source"), options)

    hints = {name: Annotated[hint, option] for name, (hint, option, _) in parameters.items()}
    keyword = inspect.Parameter.KEYWORD_ONLY
    signature = inspect.Signature(
        [
            inspect.Parameter(name, keyword, default=default, annotation=hints[name])
            for name, (_, _, default) in parameters.items()
        ]
    )
    run.__doc__, run.__annotations__ = HELP[kind], hints
    run.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    return run


def _option(f: "Field[Any]", hint: Any) -> tuple[Any, Any]:
    """What typer is to know of a field: its type, None if the flag is not given, and its option."""
    from bridge.training.settings import range_of

    default = None if f.default is MISSING else f.default
    shown = ""
    if default not in (None, "", (), False):  # typer would show None, which stands for it here
        listed = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
        shown = f" Default: {'on' if default is True else listed}."
    option: dict[str, Any] = {
        "help": f.metadata["help"] + shown,
        "rich_help_panel": f.metadata["panel"],
    }
    name = f"--{f.name.replace('_', '-')}"
    plain = get_args(hint)[0] if type(None) in get_args(hint) else hint
    if f.name == "task_options":
        return list[str] | None, typer.Option(name, metavar="KEY=VALUE", **option)
    if f.name == "betas":
        return tuple[float, float] | None, number("betas", float, name, **option)
    if plain is bool:
        return bool | None, typer.Option(f"{name}/--no-{name[2:]}", **option)
    if plain not in (int, float, str):
        return list[str] | None, typer.Option(name, **option)
    if plain is str:
        return str | None, typer.Option(name, **option)
    return plain | None, number(range_of(f), plain, name, **option)


def _print_result(result: "Result") -> None:
    """What came of the run, in two or three lines."""
    out = harmless_line(result.final)
    went = "" if result.resumed_from is None else f", the first {result.resumed_from} before"
    print(f"{out}: {result.kind}, {result.steps} steps{went}")
    if result.best is not None:
        print(
            f"best: step {result.best['step']}, accuracy {result.best['accuracy']:.1%} on "
            f"{result.best['problems']} validation problems"
        )
    print(f"Try: bridge generate {out} 'your question'")


def _print_plan(plan: "Plan") -> None:
    """The plan as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _plan_lines(plan).items():
        table.add_row(name, harmless_line(value))
    Console(highlight=False, soft_wrap=False).print(table)


def _plan_lines(plan: "Plan") -> dict[str, str]:
    rows, timesteps, cells = plan.micro_batch
    problems = "endless" if plan.train_problems is None else plan.train_problems
    updates = "1 update" if plan.updates == 1 else f"{plan.updates} updates"
    memory, peak = plan.memory, plan.measured_peak
    seconds = plan.seconds
    steps = f"{plan.steps}" if plan.kind == "grpo" else f"at most {plan.steps}"
    parts = ", ".join(
        f"{name} {_duration(seconds[name])}"
        for name in ("rollout", "logprobs", "update")
        if seconds[name]
    )
    lines = {
        "model": plan.model,
        "trained": f"{count(plan.trained_parameters)} of {count(plan.parameters)} parameters",
        "task": f"{plan.task}, {problems} problems to train on",
        "steps": f"{steps}, each of {plan.groups} groups, {plan.rows} rows, and {updates} of up to "
        f"{plan.micro_batches} micro-batches",
        "micro-batch": f"up to {rows} rows of {timesteps} timesteps, {count(cells)} computed cells",
        "memory": f"about {size(sum(memory.values()))}: "
        + ", ".join(f"{name} {size(value)}" for name, value in memory.items()),
    }
    if plan.lower_first:
        name, _, value = plan.lower_first.partition(" = ")
        lines["for less"] = f"set {name} to {value}" if value else f"lower {name}"
    if peak is not None:
        lines["measured"] = f"{size(peak)} at most in this process, with one micro-step done"
    if seconds["sampling"]:
        lines["sampling"] = f"at most {_duration(seconds['sampling'])}, once"
    lines["a step"] = f"at most {_duration(seconds['step'])}: {parts}"
    if seconds["evaluation"]:
        lines["evaluation"] = f"at most {_duration(seconds['evaluation'])} each"
    lines["all"] = f"at most {_duration(seconds['total'])}, rewards and saving aside"
    lines["writes"] = plan.out
    return lines


def _duration(seconds: float) -> str:
    """90 as 1:30 min."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min"


class Kinds(TyperGroup):
    """The subcommands, each made when it is asked for: their options are read from the settings,
    and importing those would slow down every other command."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(HELP)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in HELP and cmd_name not in self.commands:
            made = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
            made.command(cmd_name, context_settings=ctx.parent.command.context_settings)(
                command(cmd_name)
            )
            self.commands[cmd_name] = typer.main.get_command(made)
        return super().get_command(ctx, cmd_name)


app = typer.Typer(cls=Kinds, no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Train a model: sft warms up fresh blocks, grpo learns from rewards."""
