"""`bridge backends`: what can run models here."""

from dataclasses import asdict
from typing import Annotated

import typer

from bridge_cli.text import print_json


def backends(
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List what can run models here, best first.

    Example: bridge backends --json
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from bridge.registry import backends as find

    found = find()
    if json:
        return print_json([asdict(info) for info in found])
    table = Table("backend", "device", "dtypes, default first", box=None, pad_edge=False)
    for info in found:
        if not info.installed:
            table.add_row(info.name, "none", Text(info.problem or "does not work"))
        for device in info.devices:
            table.add_row(info.name, device, ", ".join(info.dtypes[device]))
    Console(soft_wrap=True).print(table)
