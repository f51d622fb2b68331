"""`bridge eval`: how good groups are at a task, by width, with error bars, and against a baseline.

With `--out` every response is kept as it is found, and a run that was stopped goes on from there.
"""

import json as jsonlib
import sys
from collections.abc import Callable, Iterator
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
    number,
    read_task_options,
)
from bridge_cli.text import harmless_line, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from bridge.checkpoints.reading import Checkpoint
    from bridge.evaluation.batches import Progress
    from bridge.evaluation.summary import Evaluation, Report
    from bridge_cli.eval_view import Asked


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint directory.")],
    task: Annotated[
        str,
        typer.Option(
            help="reasoning-gym:NAME, a .jsonl file, or module:function; see docs/training.md."
        ),
    ],
    task_options: Annotated[
        list[str] | None,
        typer.Option(
            "--task-options",
            "--task-option",
            metavar="KEY=VALUE",
            help="Of the task; repeat it.",
        ),
    ] = None,
    reward_seconds: Annotated[
        float, number("reward_seconds", float, help="Time limit of a reward.")
    ] = 10.0,
    width: Annotated[
        str, typer.Option("-n", "--width", help="Rows of a group; several by commas.")
    ] = "1,2,4,8,16",
    baseline: Annotated[
        Path | None, typer.Option(help="A checkpoint to compare with, on the same problems.")
    ] = None,
    problems: Annotated[
        int | None, integer("problems", help="The first of the split; else 200, or all.")
    ] = None,
    groups: Annotated[
        int,
        integer("eval.groups", help="Groups a problem and width; more narrow the intervals."),
    ] = 1,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = 1.0,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: AnswerSeed = 0,
    stop: Stop = None,
    system: System = None,
    raw: Raw = False,
    max_rows: Annotated[int, integer("max_rows", help="Rows decoded at once.")] = 256,
    backend: Backend = None,
    device: Device = None,
    dtype: Dtype = None,
    weights: Weights = None,
    base: Base = None,
    out: Annotated[
        Path | None, typer.Option(help="Keep responses, figures and plots here, and go on later.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure a checkpoint at a task: each problem answered by groups of each width.

    Intervals hold 95 %, over problems; differences are paired by problem.
    Rows of a group see each other, so each width is decoded for itself. The
    rows of a model without attention blocks do not: it is decoded at the
    largest width alone, and the narrower ones are estimated from its rows.

    Example: bridge eval ./trained --task reasoning-gym:countdown --width 1,4,8 --out ./figures

    Example: bridge eval ./trained --baseline ./rlvr-only --task problems.jsonl --groups 4 --json
    """
    from rich.console import Console

    from bridge.checkpoints.reading import open_checkpoint
    from bridge.evaluation.batches import Decoding
    from bridge.evaluation.evaluate import evaluate as run
    from bridge.evaluation.summary import report, rows_are_independent, widths_decoded
    from bridge.tasks import find_task
    from bridge_cli.eval_view import Asked, show, stopped

    widths = _widths(width)
    if out is not None:
        _check_out(out)
    asked = Asked(groups)
    if baseline is not None:
        theirs = open_checkpoint(baseline, headers_only=True)  # its turn comes late
        asked.widths["baseline"] = widths_decoded(widths, rows_are_independent(theirs.config))
    found_task = find_task(task, **read_task_options(task_options or []))

    where = (backend, device, dtype, weights)

    def evaluated(path: Path, base: Path | None, name: str) -> "Evaluation":
        model, fingerprint, chat = _load(path, base, where, raw, system, out)
        asked.widths[name] = widths_decoded(widths, rows_are_independent(model.config))
        with _bar(name, asked, quiet=json) as progress:
            return run(
                model,
                found_task,
                widths=widths,
                problems=problems,
                groups=groups,
                split=split,
                decoding=Decoding(
                    temperature,
                    top_k,
                    top_p,
                    min_p,
                    seed,
                    max_new_tokens,
                    tuple(stop or ()),
                    chat,
                    system,
                ),
                max_rows=max_rows,
                reward_seconds=reward_seconds,
                name=fingerprint,
                directory=None if out is None else out / name,
                progress=progress,
            )

    try:
        ours = evaluated(checkpoint, base, "model")
        theirs = None if baseline is None else evaluated(baseline, None, "baseline")
    except KeyboardInterrupt:
        print(stopped(out, asked), file=sys.stderr)
        raise
    found = report(ours, theirs)
    said = {"checkpoint": str(checkpoint), "against": None if baseline is None else str(baseline)}
    said |= found.to_json()
    if out is not None:
        _write(out, said, found, Console(stderr=True, highlight=False))
    if json:
        return print_json(said)
    show(found)
    if out is not None:
        print(f"Responses, figures and plots are in {harmless_line(str(out))}")


def _widths(text: str) -> tuple[int, ...]:
    from bridge.errors import BridgeError, show
    from bridge.numbers.ranges import take

    try:
        widths = tuple(sorted({int(part) for part in text.split(",") if part.strip()}))
    except ValueError:
        widths = ()
    if not widths or min(widths) < 1:
        raise BridgeError(f"--width must be numbers from 1 on by commas, not {show(text)}")
    return tuple(take("width", width) for width in widths)


def _check_out(out: Path) -> None:
    """Refuse a directory of something else before any work."""
    from bridge.errors import BridgeError

    if not out.exists():
        if not out.absolute().parent.is_dir():
            raise BridgeError(f"{out.parent}: no such directory to write {out.name!r} in")
    elif not out.is_dir():
        raise BridgeError(f"{out}: is not a directory; choose another name")
    elif any(out.iterdir()) and not (out / "model" / "settings.json").is_file():
        raise BridgeError(f"{out}: holds something other than an evaluation; choose another name")


def _load(
    path: Path,
    base: Path | None,
    where: tuple[str | None, ...],
    raw: bool,
    system: str | None,
    out: Path | None,
) -> tuple[Any, str, bool]:
    """The model, what tells its weights from others where they are kept, and whether it chats.
    `where`: backend, device, dtype and weights, as for `bridge.load`."""
    from bridge.checkpoints.reading import open_checkpoint
    from bridge.model import build
    from bridge_cli.prompts import check_system

    opened = open_checkpoint(path, base)
    model = build(opened, opened.config, opened.tensors, *where)
    chat = model.has_chat_template and not raw
    check_system(system, chat, raw, path)
    if out is not None:
        out.mkdir(exist_ok=True)
    return model, "" if out is None else _fingerprint(opened), chat


def _fingerprint(opened: "Checkpoint") -> str:
    """A hash of the config, the updates' settings and every tensor."""
    from hashlib import sha256

    from bridge.checkpoints.tensors import content_hash
    from bridge.config import tensor_shapes

    weights = content_hash(opened.tensors, tensor_shapes(opened.config))
    config = jsonlib.dumps(opened.raw_config, sort_keys=True)
    config += "" if opened.config.lora is None else str(opened.config.lora)
    return sha256((weights + config).encode()).hexdigest()


@contextmanager
def _bar(name: str, asked: "Asked", quiet: bool) -> Iterator["Callable[[Progress], None]"]:
    """A bar on stderr: problems at the present width, their rate, and the accuracy so far."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[said]}"),
        TimeElapsedColumn(),
    )
    quiet = quiet or not sys.stderr.isatty()
    with Bar(*columns, console=Console(file=sys.stderr), transient=True, disable=quiet) as bar:
        task = bar.add_task(name, total=None, said="")
        began: dict[int, tuple[int, float]] = {}  # where each width's count started, and when

        def update(p: "Progress") -> None:
            asked.each = p.of
            done, seconds = began.setdefault(p.width, (p.done, p.seconds))
            rate = (p.done - done) / (p.seconds - seconds) if p.seconds > seconds else 0.0
            said = [f"accuracy {p.accuracy:.1%}"] if p.accuracy is not None else []
            said += [f"{rate:.2g} groups/s"] if rate else []
            said += [f"{p.running} rows running"] if p.running else []
            bar.update(
                task,
                description=f"{name}, width {p.width}",
                completed=p.done,
                total=p.of,
                said=" · ".join(said),
            )

        yield update


def _write(out: Path, said: dict[str, Any], found: "Report", notes: "Console") -> None:
    """evaluation.json, and the plots where matplotlib is there."""
    from importlib.util import find_spec

    from bridge.evaluation.plots import plot_accuracy, plot_gpass
    from bridge.files.atomic import new_file

    with new_file(out / "evaluation.json") as file:
        file.write(jsonlib.dumps(said, indent=2).encode() + b"\n")
    if find_spec("matplotlib") is None:
        what = "no plots: pip install 'bridge-llm[plots]' makes them"
        return notes.print(what, style="dim", markup=False)
    models = {Path(said["checkpoint"]).resolve().name: found.figures}
    if said["against"] is not None:
        name = Path(said["against"]).resolve().name
        models[name if name not in models else f"{name} (baseline)"] = found.baseline_figures
    title = f"{said['task']}, {said['problems']} problems; bands hold 95 %"
    plot_accuracy(out / "accuracy.png", models, title)
    plot_gpass(out / "gpass.png", models, title)
