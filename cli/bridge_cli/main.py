"""The `bridge` command: its subcommands, and what its errors look like.

A mistake of the user's is one line on stderr and exit code 2, never a traceback; Ctrl-C is 130, and
a reader of our output that leaves early is nobody's mistake. Commands import what they need when
they run, so that `--help` is quick.
"""

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from bridge_cli import (
    agree,
    backends,
    bench,
    conformance,
    convert,
    demo,
    eval,
    generate,
    init,
    inspect,
    train,
)
from bridge_cli.allocator import keep_memory
from bridge_cli.text import harmless_line


class Commands(TyperGroup):
    """Runs a subcommand; what a user can cause leaves it as a message and an exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            _shorten(error)
            raise

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # here, where a broken pipe is still caught
            return result
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise  # typer's own, or its to silence
        except Exception as error:
            message = _mistake(error)
            if message is None:
                _shorten(error)
                raise
        print(f"error: {harmless_line(message)}", file=sys.stderr)
        raise typer.Exit(2)


def _shorten(error: Exception) -> None:
    """Of a usage error, which quotes what was typed, at most a line of it."""
    from bridge.errors import shorten_message

    message = getattr(error, "message", None)
    if isinstance(message, str):
        error.message = shorten_message(message)  # pyright: ignore[reportAttributeAccessIssue]


def _mistake(error: Exception) -> str | None:
    """What to tell the user; None for usage errors, which typer explains, and for our own bugs."""
    from bridge.errors import BridgeError, shorten

    if isinstance(error, BridgeError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        name = shorten(str(error.filename))
        return f"{name}: {error.strerror}" if error.filename else error.strerror
    # torch has an exception of its own for a full device
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "not enough memory; lower --width or --max-new-tokens, or choose a smaller --dtype"
    return None


app = typer.Typer(
    cls=Commands,
    help="Parallel responses to one prompt that see each other while they are generated.",
    epilog="Start with: bridge init HOST OUT, then bridge generate OUT 'your question'",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(init.init)
app.command()(generate.generate)
app.command()(demo.demo)
app.command()(convert.convert)
app.command()(inspect.inspect)
app.command()(backends.backends)
app.command()(conformance.conformance)
app.command()(agree.agree)
app.command()(bench.bench)
app.add_typer(train.app, name="train")
app.command("eval")(eval.evaluate)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"bridge {version('bridge-llm')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Parallel responses to one prompt that see each other while they are generated."""


def main() -> None:
    """Run the command line of this process, and exit with its code."""
    if sys.argv[1:2] in (["train"], ["bench"]):  # of the whole process, so whoever owns it decides
        keep_memory()
    app(prog_name="bridge")


if __name__ == "__main__":
    main()
