"""`bridge demo`: what sharing does, on one screen, with the model that comes with the package.

A held-out puzzle is answered by rows that see each other and by rows that do not; then a few
hundred are, and both accuracies are shown with their intervals. Nothing else differs: the weights,
the sampling and the number of rows are the same.
"""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from bridge_cli.options import AnswerSeed, Backend, integer
from bridge_cli.text import print_json

if TYPE_CHECKING:
    import numpy as np
    from rich.table import Table
    from rich.text import Text

    from bridge.evaluation.intervals import Interval
    from bridge.model import Model
    from bridge.tasks.problem import Problem
    from bridge.tasks.search import OperatorSearch

TASK_SEED = 1  # of the run that trained the model: its puzzles of the split "test" were held out
FIRST = 1000  # the experiment tests on those from 0


def demo(
    width: Annotated[int, integer("width", "-n", "--width", help="Rows a puzzle.")] = 8,
    problems: Annotated[
        int, integer("demo.problems", help="Puzzles to take the accuracy over.")
    ] = 300,
    show: Annotated[
        int | None,
        integer(
            "demo.show",
            help="Which of them to show, from 0.",
            show_default="the first in which a row comes upon a solution",
        ),
    ] = None,
    seed: AnswerSeed = 0,
    backend: Backend = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Solve puzzles with rows that see each other, and with rows that do not.

    The bundled model was trained to search: a row writes out two trials, says whether each came out
    right, and answers. Rows that see each other's trials know more than any of them alone.

    Example: bridge demo --width 16
    """
    from rich.console import Console

    from bridge.errors import BridgeError
    from bridge.evaluation.intervals import bootstrap, paired
    from bridge.model import load
    from bridge.tasks.search import OperatorSearch

    if show is not None and show >= problems:
        raise BridgeError(f"show must be in 0..{problems - 1}, one of the puzzles, not {show}")
    task = OperatorSearch(seed=TASK_SEED)
    puzzles = [task.problem("test", FIRST + number) for number in range(problems)]
    notes = Console(stderr=True)
    with notes.status(f"{width} rows for each of {problems} puzzles, twice"):
        model = load(backend=backend)
        together = answer(model, puzzles, width, seed, share=True)
        alone = answer(model, puzzles, width, seed, share=False)
    if show is None:
        found = (n for n, said in enumerate(together) if any("yes" in text for text in said))
        show = next(found, 0)
    scores = {
        "together": _scores(task, puzzles, together),
        "alone": _scores(task, puzzles, alone),
    }
    each = {name: score.mean(1)[None] for name, score in scores.items()}
    accuracy = {name: bootstrap(value)[0] for name, value in each.items()}
    gain = paired(each["together"], each["alone"])[0]
    if json:
        shown = {"prompt": puzzles[show].prompt, "together": together[show], "alone": alone[show]}
        figures = {name: asdict(value) for name, value in accuracy.items()}
        asked = {"width": width, "problems": problems, "seed": seed, "backend": model.backend}
        return print_json({**asked, "shown": shown, "accuracy": figures, "gain": asdict(gain)})
    console = Console(highlight=False)
    console.print(f"puzzle   {_explain(task, puzzles[show])}")
    console.print(_side_by_side(task, puzzles[show], together[show], alone[show]))
    console.print(_table(scores, accuracy, gain, problems, width))


def answer(
    model: "Model", puzzles: "list[Problem]", width: int, seed: int, share: bool
) -> list[list[str]]:
    """`width` responses to each puzzle: of one group, or each of a group of its own."""
    prompts = [str(puzzle.prompt) for puzzle in puzzles]
    if share:
        sets = model.generate(prompts, width=width, seed=seed)
        return [[response.text for response in answers.responses] for answers in sets]
    apart = model.generate([p for p in prompts for _ in range(width)], width=1, seed=seed)
    said = [answers.responses[0].text for answers in apart]
    return [said[i : i + width] for i in range(0, len(said), width)]


def _scores(
    task: "OperatorSearch", puzzles: "list[Problem]", said: list[list[str]]
) -> "np.ndarray":
    """Whether each response is right, `[puzzles, rows]`."""
    import numpy as np

    return np.array(
        [[task.score(p, text) for text in row] for p, row in zip(puzzles, said, strict=True)]
    )


def _explain(task: "OperatorSearch", puzzle: "Problem") -> str:
    a, b, c, d = puzzle.metadata["numbers"]
    target = puzzle.metadata["target"]
    return f"(({a} o {b}) o {c}) o {d} = {target} modulo {task.modulus}; each o is + - or *"


def _side_by_side(
    task: "OperatorSearch", puzzle: "Problem", together: list[str], alone: list[str]
) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("row", justify="right")
    table.add_column("seeing each other: trials, answer", no_wrap=True)
    table.add_column("each alone", no_wrap=True)
    for row, texts in enumerate(zip(together, alone, strict=True)):
        table.add_row(str(row), *(_response(task, puzzle, text) for text in texts))
    return table


def _response(task: "OperatorSearch", puzzle: "Problem", text: str) -> "Text":
    """Each trial as its operators, what they come to and the verdict; then the answer."""
    from rich.text import Text

    right = task.score(puzzle, text) == 1
    trials, _, said = text.rpartition("!")
    words, line, n = trials.split(), Text(), task.numbers - 1
    for start in range(0, len(words), 2 * n + 1):
        trial = words[start : start + 2 * n + 1]
        line.append(f"{''.join(trial[:n])} = {trial[-2]:>2} " if len(trial) > 2 * n else "? ")
        line.append(f"{trial[-1]:<4}", {"yes": "bold green", "no": "dim"}.get(trial[-1], ""))
    style = "bold green" if right else "red"
    return line.append(f"! {''.join(said.split())} {'✓' if right else '✗'}", style)


def _table(
    scores: "dict[str, np.ndarray]",
    accuracy: "dict[str, Interval]",
    gain: "Interval",
    problems: int,
    width: int,
) -> "Table":
    from rich.table import Table

    title = f"\n{problems} held-out puzzles, {width} rows each"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for heading in ("rows right (95 % interval)", "some right", "all right"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, label in (("together", "seeing each other"), ("alone", "each alone")):
        some, every = scores[name].max(1).mean(), scores[name].min(1).mean()
        table.add_row(label, _share(accuracy[name]), f"{some:.1%}", f"{every:.1%}")
    table.add_row("difference", _share(gain), "", "", style="bold")
    return table


def _share(interval: "Interval") -> str:
    return f"{interval.mean:.1%} ({interval.low:.1%} to {interval.high:.1%})"
