"""What a run will read, looked at before anything is written: its first prompts and largest group.

A run that begins is refused here where a prompt is past the context, or a group of rows that all
reach `max_new_tokens` would have to be cut (clause 7.3): later it would cost what was sampled by
then. Prompts beyond the first are seen when their turn comes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bridge.decoding.generation import row_length
from bridge.decoding.memory import check_decoding, check_training
from bridge.decoding.stops import read_stops
from bridge.model import Model
from bridge.tasks import Task
from bridge.tasks.asking import take_problems
from bridge.training.batches import Group, check_fits
from bridge.training.rollouts import split_size
from bridge.training.schedule import problem_number
from bridge.training.settings import Settings, SFTSettings
from bridge.training.sft import Correct, deal, read_samples

FIRST = 64  # prompts that are looked at


@dataclass(frozen=True)
class Ahead:
    """What was seen."""

    prompts: list[list[int]]  # ids of the first, or of all in a file
    size: int | None  # problems of the data; None: endless
    largest: Group  # of a file; else of the longest prompt, and as long as rows may get
    max_new_tokens: int  # as set, or what the longest prompt leaves
    data: list[Correct] | None  # of a file


def look_ahead(settings: Settings, model: Model, task: Task | None) -> Ahead:
    """Of the data of `settings`. Raises BridgeError for what a run would be refused for."""
    read_stops(settings.stop, model.tokenizer)
    data, groups, width, asked = None, [], settings.width, {}
    if isinstance(settings, SFTSettings) and settings.data is not None:
        data = read_samples(Path(settings.data), model, settings)
        groups = deal(data, settings, 0)
        prompts, size = [correct.prompt for correct in data], len(data)
    else:
        assert task is not None
        size = split_size(task, "train")
        count = min(settings.problems, FIRST if size is None else min(size, FIRST))
        numbers = [problem_number(size, settings.seed, i) for i in range(count)]
        asked = _encode(settings, model, task, "train", numbers)
        prompts = list(asked.values())
        if isinstance(settings, SFTSettings):
            width = min(width, settings.samples)
    if settings.eval_every and task is not None:
        most = split_size(task, "validation")
        count = min(settings.eval_problems, FIRST if most is None else min(most, FIRST))
        asked |= _encode(settings, model, task, "validation", range(count))
    lengths = {name: len(prompt) for name, prompt in asked.items()}
    length = row_length(settings.max_new_tokens, lengths, model.config.max_position_embeddings)
    if data is None:
        longest = max(prompts, key=len)
        advantages = np.where(np.arange(width) % 2, 1.0, -1.0)
        rows = [[longest[-1]] * length] * width
        groups = [Group(longest, rows, advantages, "the longest group")]
    largest = max(groups, key=lambda group: group.cells)
    check_fits(largest, settings.micro_batch_tokens)
    config, device, dtype = model.config, model.device, model.dtype
    check_training(config, device, dtype, largest.rows, largest.length)
    if lengths:
        rows, count = settings.width, settings.problems
        if isinstance(settings, SFTSettings):  # a batch at a time is sampled
            rows, count = settings.samples, max(1, settings.max_rows // settings.samples)
        asked_for = ([max(lengths.values())] * count, [rows] * count, length, settings.max_rows)
        check_decoding(config, device, dtype, *asked_for)
    return Ahead(prompts, size, largest, length, data)


def _encode(
    settings: Settings, model: Model, task: Task, split: str, numbers: Sequence[int]
) -> dict[str, list[int]]:
    """Ids of the prompts of problems, by what to call them."""
    chat = model.has_chat_template and not settings.raw
    found = {}
    for problem, number in zip(take_problems(task, split, numbers), numbers, strict=True):
        name = f"task {task.name}: the prompt of problem {number} of {split}"
        found[name] = model.encode(problem.prompt, chat=chat, system=settings.system, name=name)
    return found
