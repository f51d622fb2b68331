"""Options that several commands share, so that each means and says the same everywhere.

Defaults stand with each command.
"""

from pathlib import Path
from typing import Annotated

import typer

MaxNewTokens = Annotated[
    int | None, typer.Option(help="Of each row; else 256, or what the context leaves.")
]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token.")]
TopK = Annotated[int | None, typer.Option(help="Keep the k likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(help="Keep the likeliest, up to this sum.")]
MinP = Annotated[float | None, typer.Option(help="Keep what has this fraction of the likeliest.")]
Stop = Annotated[list[str] | None, typer.Option(help="A text that ends a row; repeat it.")]
System = Annotated[str | None, typer.Option(help="The system message of the chat.")]
Raw = Annotated[
    bool, typer.Option("--raw", help="Feed prompts as they are, without a chat template.")
]
AnswerSeed = Annotated[int, typer.Option(help="The same seed gives the same answers.")]
Backend = Annotated[str | None, typer.Option(help="See bridge backends; else the best.")]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:0; else the best.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16, float64.")]
Base = Annotated[Path | None, typer.Option(help="The host of an adapter.")]
