"""A model at a task, width by width: prompts in, every response scored, nothing done twice.

Checks all that can be checked before the first token, then goes on from what the directory holds.
It knows tasks and models; how batches are cut is in `batches.py`, and what the numbers come to is
in `summary.py`.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.decoding.memory import check_decoding, check_kept
from bridge.decoding.requests import check_sampling, row_length
from bridge.decoding.stops import read_stops
from bridge.errors import BridgeError
from bridge.evaluation.batches import GROUP_SHIFT, PART, Decoding, Plan, Progress, Run
from bridge.evaluation.records import Journal
from bridge.evaluation.summary import Evaluation, rows_are_independent, widths_decoded
from bridge.model import Model
from bridge.numbers.machine import check_memory
from bridge.numbers.ranges import take
from bridge.tasks.user_code import take_problems, take_size

if TYPE_CHECKING:
    from bridge.tasks import Problem, Scores, Task

PROBLEMS = 200  # where nobody says how many
ROW = 100  # bytes that a response and what is said of it take, at least


def evaluate(
    model: Model,
    task: "Task",
    *,
    widths: Sequence[int] = (1, 2, 4, 8, 16),
    problems: int | None = None,
    groups: int = 1,
    split: str = "test",
    decoding: Decoding | None = None,
    max_rows: int = 256,
    reward_seconds: float = 10.0,
    name: str = "",
    directory: Path | None = None,
    scorer: "Scores | None" = None,
    progress: Callable[[Progress], None] | None = None,
) -> Evaluation:
    """Answer the first `problems` problems of a split with `groups` groups at each width.

    `problems` None: 200, or all where there are fewer. A model whose rows are independent is
    decoded at the largest width alone; the narrower ones are estimated from the same rows.
    `directory`: what is found is kept there, and what was found there with the same settings is
    not done again; widths, problems and groups may grow. `name`: of the weights, one of those
    settings. `max_rows`: rows decoded at once, which changes rounding and nothing else.
    `scorer`: None is a `bridge.tasks.Scorer` of the task, `reward_seconds` the time that it gives
    a response.
    Raises BridgeError before anything is computed, for a prompt that does not fit too.
    """
    widths = tuple(sorted({take("width", width) for width in widths}))
    if not widths:
        raise BridgeError("width must be 1 or above, one or more of them")
    groups, max_rows = take("eval.groups", groups), take("max_rows", max_rows)
    take("reward_seconds", reward_seconds)
    decoded = widths_decoded(widths, rows_are_independent(model.config))
    plan = _plan(model, task, split, problems, groups, decoding or Decoding(), max_rows, decoded)
    settings = {
        "task": task.name,
        "split": split,
        "threshold": plan.threshold,
        "model": name,
        "backend": model.backend,
        "device": model.device,
        "dtype": model.dtype,
        **({} if model.weights is None else {"weights": model.weights}),
        **vars(plan.decoding),
        "stop": list(plan.decoding.stop),
    }
    with Journal(directory, settings) as journal, _scoring(task, scorer, reward_seconds) as scores:
        _check_asked(journal, plan, split)
        run = Run(model, task, plan, journal, scores, progress)
        for width in decoded:
            run.find(width)
    return Evaluation(
        settings=settings,
        widths=widths,
        problems=tuple(p.number for p in plan.problems),
        groups=groups,
        threshold=plan.threshold,
        independent=rows_are_independent(model.config),
        asked=tuple(_digest(p.prompt, p.answer) for p in plan.problems),
        found=journal.groups,
    )


def _plan(
    model: Model,
    task: "Task",
    split: str,
    asked: int | None,
    groups: int,
    decoding: Decoding,
    max_rows: int,
    widths: Sequence[int],
) -> Plan:
    d = decoding
    check_sampling(d.temperature, d.top_k, d.top_p, d.min_p, d.seed)
    read_stops(d.stop, model.tokenizer)
    count = _count(task, split, asked)
    check_memory(
        ROW * count * groups * sum(widths),
        f"{count} problems by {groups} groups by widths of {sum(widths)} rows in all",
        "lower problems, groups or width",
    )
    problems = take_problems(task, split, range(count))
    prompts = [
        model.encode(p.prompt, chat=d.chat, system=d.system, name=_called(p, split))
        for p in problems
    ]
    # The limit of a row must not depend on how prompts are batched.
    lengths = {_called(p, split): len(ids) for p, ids in zip(problems, prompts, strict=True)}
    limit = row_length(d.max_new_tokens, lengths, model.config.max_position_embeddings)
    longest = max(lengths.values())
    for width in widths:
        together = min(count * groups, max(1, max_rows // width))
        check_kept(PART * together * width, limit)
        check_decoding(model.implementation, longest, width, limit, together)
    return Plan(
        problems,
        prompts,
        [_digest(ids, p.answer) for ids, p in zip(prompts, problems, strict=True)],
        groups,
        replace(d, max_new_tokens=limit),
        max_rows,
        float(getattr(task, "threshold", 1.0)),
    )


def _count(task: "Task", split: str, asked: int | None) -> int:
    """How many problems: as asked, if the split has them."""
    size = take_size(task, split)
    most = 1 << GROUP_SHIFT if size is None else min(size, 1 << GROUP_SHIFT)
    count: int = min(PROBLEMS, most) if asked is None else take("problems", asked)
    if not 1 <= count <= most:
        raise BridgeError(f"problems must be in 1..{most}, as split {split!r} has, not {count}")
    return count


def _called(problem: "Problem", split: str) -> str:
    return f"problem {problem.number} of {split}"


def _digest(prompt: Any, answer: str | None) -> str:
    return sha256(json.dumps([prompt, answer]).encode()).hexdigest()[:16]


def _check_asked(journal: Journal, plan: Plan, split: str) -> None:
    """Refuse to go on where the task, the tokenizer or the template has changed since."""
    now = {p.number: (p, digest) for p, digest in zip(plan.problems, plan.digests, strict=True)}
    for group in journal.groups.values():
        problem, digest = now.get(group.problem, (None, ""))
        if problem is not None and digest != group.digest:
            raise BridgeError(
                f"{journal.path}: {_called(problem, split)} was another one then; the task or the "
                "tokenizer has changed, so evaluate into another directory"
            )


def _scoring(task: "Task", scorer: "Scores | None", reward_seconds: float) -> Any:
    """The scorer given, which stays its owner's, or one of our own, which ends with us."""
    if scorer is not None:
        return nullcontext(scorer)
    from bridge.tasks import Scorer

    return Scorer(task, time_limit=reward_seconds)
