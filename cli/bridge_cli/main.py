"""The `bridge` command: its subcommands, and what its errors look like.

An error of the user's is one line on stderr and exit code 2, never a traceback; Ctrl-C is 130.
Commands import what they need when they run, so that `--help` is quick.
"""

import os
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import click
import typer

from bridge_cli import backends, generate, init, inspect

app = typer.Typer(
    help="Parallel responses to one prompt that see each other while they are generated.",
    epilog="Start with: bridge init HOST OUT, then bridge generate OUT 'your question'",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(init.init)
app.command()(generate.generate)
app.command()(inspect.inspect)
app.command()(backends.backends)


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


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command line, and exit with its code."""
    try:
        code = app(arguments, prog_name="bridge", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except BrokenPipeError:
        # Whoever read our output has left; Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        from bridge.errors import BridgeError

        if not isinstance(error, BridgeError):
            raise
        print(f"error: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)


if __name__ == "__main__":
    main()
