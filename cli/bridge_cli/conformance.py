"""`bridge conformance`: hold a backend to the spec, and print its report card.

Exit code 0: it conforms to the level asked for. 1: it does not. 2: the command was used wrongly.
130: Ctrl-C, with what was found so far.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bridge_cli.options import integer
from bridge_cli.text import harmless, print_json

if TYPE_CHECKING:
    from bridge_conformance.checks import Check
    from bridge_conformance.results import Report
    from bridge_conformance.runner import Progress

FORMS = (".json", ".html")


def conformance(
    backend: Annotated[str | None, typer.Option(help="See bridge backends.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu; else its best.")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="One of them, repeatable; else all of the spec.")
    ] = None,
    profile: Annotated[
        str, typer.Option(help="quick (a minute), ci (minutes) or thorough (explores).")
    ] = "quick",
    seed: Annotated[int, integer("seed", help="The same seed runs the same cases.")] = 0,
    level: Annotated[
        str | None, typer.Option(help="L1 to L6; each includes those before. Else L6.")
    ] = None,
    check: Annotated[
        list[str] | None, typer.Option(help="Run this check alone; repeatable.")
    ] = None,
    case: Annotated[str | None, typer.Option(help="Of --check: this case alone.")] = None,
    report: Annotated[
        list[Path] | None, typer.Option(help="Write a report: .json or .html; repeatable.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a report that exists.")] = False,
    workers: Annotated[
        int | None, integer("workers", help="Processes; else 2 on a CPU, and 1 elsewhere.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the checks.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Hold a backend to the spec: property tests by clause, levels L1 to L6.

    Example: bridge conformance --backend torch --report torch.html

    Example: bridge conformance --backend mine --dtype float32 --level L2
    """
    from bridge.errors import BridgeError

    try:
        import hypothesis  # noqa: F401
    except ModuleNotFoundError:
        raise BridgeError(
            "conformance needs hypothesis; try: pip install 'bridge-llm[conformance]'"
        ) from None
    from bridge.registry import find_backend
    from bridge_conformance.runner import choose, find_profile, run

    number = (level or "L6").upper().removeprefix("L")
    if number not in "123456" or len(number) != 1:
        raise BridgeError(f"--level {level} is not known (known: L1 to L6)")
    if check and level is not None:
        raise BridgeError(
            "--level goes without --check: checks run alone have no verdict on levels"
        )
    find_profile(profile)
    chosen = choose(check, int(number))
    if list_:
        if backend is not None:
            find_backend(backend)
        return _list(chosen, json)
    if backend is None:
        raise BridgeError("--backend is missing; bridge backends lists what is here")
    if case is not None and (len(set(check or [])) != 1 or len(set(dtype or [])) != 1):
        raise BridgeError("--case goes with one --check and one --dtype")
    for path in report or []:
        _refuse(path, force)
    with _progress(quiet=json) as show:
        found = run(
            backend,
            device=device,
            dtypes=dtype,
            profile=profile,
            seed=seed,
            level=int(number),
            checks=check,
            case=case,
            workers=1 if case is not None and workers is None else workers,
            progress=show,
        )
    if json:
        print_json(found.to_json())
    else:
        _print(found)
    for path in report or []:
        _write(path, found)
    if not found.complete:
        raise typer.Exit(130)
    if not found.ok:
        raise typer.Exit(1)


def _list(checks: "list[Check]", json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    if json:
        return print_json(
            [
                {"check": c.name, "level": f"L{c.level}", "clause": c.clause, "is": c.property}
                for c in checks
            ]
        )
    table = Table("level", "clause", "check", box=None, pad_edge=False)
    for check in checks:
        table.add_row(f"L{check.level}", check.clause, check.name)
    Console(soft_wrap=True).print(table)


def _refuse(path: Path, force: bool) -> None:
    """Stop before any work where a report could not be written."""
    from tempfile import NamedTemporaryFile

    from bridge.errors import BridgeError
    from bridge.files.atomic import refuse_existing

    if path.suffix not in FORMS:
        raise BridgeError(f"{path}: a report ends in {' or '.join(FORMS)}")
    if path.is_file() and not path.is_symlink():
        if not force:
            raise BridgeError(f"{path}: exists already; --force replaces it")
    else:
        refuse_existing(path)
    try:  # permissions do not tell: a root user has them where nothing can be made
        with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.partial-"):
            pass
    except OSError as error:
        raise BridgeError(
            f"{path}: cannot be written ({error.strerror}); choose another place"
        ) from None


def _write(path: Path, report: "Report") -> None:
    import json

    from bridge.files.atomic import new_file
    from bridge_conformance.html import page

    text = page(report)
    if path.suffix == ".json":
        text = json.dumps(report.to_json(), indent=2, ensure_ascii=False) + "\n"
    with new_file(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def _print(report: "Report") -> None:
    from rich.console import Console

    from bridge_conformance.card import card

    console = Console(highlight=False)
    for part in card(report, harmless):
        console.print(part, soft_wrap=not console.is_terminal)


@contextmanager
def _progress(quiet: bool) -> "Iterator[Callable[[Progress], None]]":
    """A bar on a terminal's stderr; elsewhere a line at every tenth of the way."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed

    console = Console(file=sys.stderr)
    if quiet:
        yield lambda progress: None
    elif not sys.stderr.isatty():
        yield _lines()
    else:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            Elapsed(),
            TextColumn("[red]{task.fields[failed]}"),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("drawing cases", total=None, failed="")

            def show(p: "Progress") -> None:
                failed = f"{p.failed} failed" if p.failed else ""
                bar.update(
                    task, description=p.doing, completed=p.done, total=p.total, failed=failed
                )

            yield show


def _lines() -> "Callable[[Progress], None]":
    tenths = -1

    def show(p: "Progress") -> None:
        nonlocal tenths
        now = 10 * p.done // max(p.total, 1)
        if now != tenths:
            tenths = now
            failed = f", {p.failed} checks failed" if p.failed else ""
            print(f"{p.doing}: {p.done} of {p.total} cases{failed}", file=sys.stderr, flush=True)

    return show
