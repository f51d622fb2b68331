"""SFT warm-up: the blocks learn to use what other rows hold, from groups of correct responses.

As the paper does it: 8 responses a problem from the model, correct ones kept, problems with fewer
than two dropped, several correct responses of a problem put into one group; the new parameters
alone are trained. What the paper leaves open: a problem's rows are dealt anew each epoch into as
few groups of at most `width` as hold them, of about equal width, and a row left alone sits out.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from bridge.decoding.prompts import check_range, read_prompt
from bridge.errors import BridgeError
from bridge.files.growing_jsonl import MEND, GrowingJsonl
from bridge.files.jsonl import read_objects, read_own
from bridge.model import Model
from bridge.numbers.rewards import reaches
from bridge.tasks.user_code import take_problems
from bridge.text.chat import are_messages
from bridge.training.batches import Group, check_fits, pack
from bridge.training.loop import Run
from bridge.training.rollouts import Rollout, roll_out, split_size
from bridge.training.schedule import (
    GROUPS,
    ROWS,
    SAMPLES,
    learning_rate,
    permutation,
    problem_number,
    stream_seed,
)
from bridge.training.settings import SFTSettings


@dataclass(frozen=True)
class Correct:
    """The correct responses to one problem, as token ids with the ones that end them."""

    prompt: list[int]
    responses: list[list[int]]
    name: str  # for messages
    troubles: tuple[str, ...] = ()  # what went wrong with the rewards of its samples


class WarmUp:
    """The steps of SFT: each one update on `groups` groups, every epoch in an order of its own."""

    def __init__(self, run: Run, settings: SFTSettings, data: list[Correct] | None = None) -> None:
        """Samples first, or goes on with it. `data`: what is in the settings' file, where it was
        read already. Raises BridgeError where nothing is correct."""
        self.run, self.settings = run, settings
        path = make_samples(run, settings) if settings.data is None else Path(settings.data)
        self.data = read_samples(path, run.model, settings) if data is None else data
        self.dealt: tuple[int, list[Group]] = (0, deal(self.data, settings, 0))
        for group in self.dealt[1]:
            check_fits(group, settings.micro_batch_tokens)
        self.per_epoch = -(-len(self.dealt[1]) // settings.groups)

    @property
    def steps(self) -> int:
        """Of all epochs."""
        return self.settings.epochs * self.per_epoch

    def position(self, step: int) -> int:
        """Groups learnt from before a step."""
        epoch, within = divmod(step, self.per_epoch)
        return epoch * len(self.dealt[1]) + within * self.settings.groups

    def step(self, step: int) -> dict[str, Any]:
        """One update; its figures."""
        settings, run = self.settings, self.run
        epoch, within = divmod(step, self.per_epoch)
        if self.dealt[0] != epoch:
            self.dealt = (epoch, deal(self.data, settings, epoch))
        groups = self.dealt[1]
        order = permutation(len(groups), settings.seed, GROUPS, epoch)
        start = within * settings.groups
        chosen = [groups[i] for i in order[start : start + settings.groups]]
        lr = learning_rate(
            step, self.steps, settings.lr, settings.schedule, settings.warmup, settings.lr_end
        )
        norms = run.norms(step, chosen)
        run.phases("update")
        metrics = run.update(step, pack(chosen, settings.micro_batch_tokens), lr)
        seconds = run.phases.take()
        rows = sum(group.rows for group in chosen)
        rate = metrics["tokens"] / seconds["seconds_update"]
        return {
            "epoch": epoch,
            **metrics,
            **norms,
            "lr": lr,
            "groups": len(chosen),
            "rows": rows,
            "train_tokens_per_second": rate,
            **seconds,
        }


def deal(data: Sequence[Correct], settings: SFTSettings, epoch: int) -> list[Group]:
    """The groups of an epoch: a pure function of seed and epoch, as many in each."""
    groups = []
    for number, correct in enumerate(data):
        rows = correct.responses
        order = permutation(len(rows), settings.seed, ROWS, epoch * len(data) + number)
        parts = -(-len(rows) // settings.width)
        for part in range(parts):
            chosen = [rows[i] for i in order[part::parts]]
            if len(chosen) > 1:
                groups.append(Group(correct.prompt, chosen, name=correct.name))
    return groups


class Sampled(TypedDict):
    """What is read of a line that was sampled, to go on with its file."""

    responses: list[str]


def sampled_at_once(settings: SFTSettings) -> int:
    """Problems of a batch of sampling: several times as many as are decoded at once, since as the
    last rows of a batch end, places stay empty."""
    return 4 * max(1, settings.max_rows // settings.samples)


def make_samples(run: Run, settings: SFTSettings) -> Path:
    """Sample what the run's file lacks yet; gives the file. The problems are those that the train
    split begins with, in the order of the run's seed.

    A line a problem, and a whole batch of problems at a time: a run that was stopped goes on with
    the next batch and samples none again. Raises BridgeError for a damaged line, and for a full
    disk, losing nothing that is there."""
    path, model, task, scorer = run.directory.samples, run.model, run.task, run.scorer
    assert task is not None and scorer is not None
    size = split_size(task, "train")
    total = settings.problems if size is None else min(size, settings.problems)
    batch = sampled_at_once(settings)
    threshold = getattr(task, "threshold", 1.0)
    done = [(line.end, len(line.to(Sampled)["responses"])) for line in read_own(path, MEND)]
    if len(done) < total:
        del done[len(done) // batch * batch :]  # a batch is sampled as a whole
    correct = sum(count for _, count in done)
    told = False
    with closing(GrowingJsonl(path, done[-1][0] if done else 0)) as lines:
        for first in range(len(done), total, batch):
            run.watch.sampled(first, total, correct)
            places = range(first, min(first + batch, total))
            numbers = [problem_number(size, settings.seed, place) for place in places]
            seed = stream_seed(settings.seed, SAMPLES, first)
            with run.interrupt.dropping():
                problems = take_problems(task, "train", numbers)
                rollouts = roll_out(model, scorer, problems, settings, seed, width=settings.samples)
            kept = [_line(rollout, threshold) for rollout in rollouts]
            troubles = [trouble for rollout in rollouts for trouble in rollout.troubles]
            if troubles and not told:
                run.watch.note(f"a reward failed and counts as 0: {troubles[0]}")
                told = True
            correct += sum(len(line["responses"]) for line in kept)
            lines.append(kept)
            lines.sync()
    run.watch.sampled(total, total, correct)
    return path


def _line(rollout: Rollout, threshold: float) -> dict[str, Any]:
    """What the file says of a problem: its correct responses, and the rewards of all."""
    scored = zip(rollout.responses, reaches(rollout.rewards, threshold), strict=True)
    right = [response for response, correct in scored if correct]
    return {
        "problem": rollout.problem.number,
        "prompt": rollout.problem.prompt,
        "responses": [response.text for response in right],
        "prompt_tokens": rollout.prompt,
        "tokens": [response.tokens for response in right],
        "rewards": rollout.rewards.tolist(),
        "troubles": rollout.troubles,
    }


def read_samples(path: Path, model: Model, settings: SFTSettings) -> list[Correct]:
    """The problems of a file, sampled or the user's, that have two correct responses or more; with
    `distinct`, two that differ.

    A line needs `prompt` and `responses`; beyond them the token ids and the troubles are read, if
    any. Raises BridgeError, naming file and line, for one that lacks what it needs, and where no
    problem is left.
    """
    found: list[Correct] = []
    problems = rows = 0
    troubles: Counter[str] = Counter()
    for where, value in read_objects(path):
        correct = _read(value, model, settings, where)
        problems, rows = problems + 1, rows + len(correct.responses)
        troubles.update(correct.troubles)
        responses = correct.responses
        if settings.distinct:
            responses = [r for i, r in enumerate(responses) if r not in responses[:i]]
        if len(responses) >= 2:
            found.append(Correct(correct.prompt, responses, correct.name))
    if not found:
        differ = " that differ" if settings.distinct else ""
        mend = (
            "choose easier problems, more samples, a larger max_new_tokens, or another checkpoint"
        )
        if troubles:
            mend = (
                f"{troubles.total()} rewards failed and count as 0, most often: "
                f"{troubles.most_common(1)[0][0]}; mend the task, and choose another out; or {mend}"
            )
        raise BridgeError(
            f"{path}: no problem of {problems} has two correct responses{differ} ({rows} correct "
            f"in all), so there is nothing to learn from; {mend}"
        )
    return found


def _read(value: dict[str, Any], model: Model, settings: SFTSettings, where: str) -> Correct:
    if "prompt" not in value:
        raise BridgeError(f"{where}: must be an object with prompt and responses")
    responses = value.get("responses")
    if not isinstance(responses, list) or not all(isinstance(r, str) for r in responses):
        raise BridgeError(f"{where}: responses must be a list of texts")
    prompt, tokens = value.get("prompt_tokens"), value.get("tokens")
    if prompt is None or tokens is None:
        prompt, tokens = _encode(value["prompt"], responses, model, settings, where)
    if not _ids(prompt, model) or not isinstance(tokens, list):
        raise BridgeError(f"{where}: prompt_tokens and tokens must hold ids of this model")
    if len(tokens) != len(responses):
        raise BridgeError(f"{where}: tokens must hold one list for each of responses")
    if not all(_ids(response, model) for response in tokens):
        raise BridgeError(f"{where}: tokens must hold ids of this model, at least one a response")
    context = model.config.max_position_embeddings
    if len(prompt) + max(map(len, tokens), default=0) > context:
        raise BridgeError(f"{where}: goes past the context of {context} tokens; leave it out")
    troubles = value.get("troubles")
    said = troubles if isinstance(troubles, list) else []
    return Correct(prompt, tokens, where, tuple(t for t in said if isinstance(t, str)))


def _encode(
    prompt: Any, responses: Sequence[str], model: Model, settings: SFTSettings, where: str
) -> tuple[list[int], list[list[int]]]:
    """Ids of a prompt as generation reads it, and of responses as if said after it, to EOS."""
    if not isinstance(prompt, str) and not are_messages(prompt):
        raise BridgeError(f"{where}: prompt must be a text or a list of messages")
    chat = model.has_chat_template and not settings.raw
    ids = model.encode(prompt, chat=chat, system=settings.system, name=where)
    tokenizer = model.tokenizer
    assert tokenizer is not None
    named = tokenizer.eos_token_id
    eos = named if named in model.eos_ids else model.eos_ids[0]
    fed = read_prompt(prompt, chat, settings.system, where)
    words = next((text for text in responses if text[:1].strip()), "")
    lead = tokenizer.lead(fed, words) if isinstance(fed, list) else ""
    tokens = []
    for number, text in enumerate(responses):
        name = f"{where}: response {number}"
        said = tokenizer.encode_after(ids, lead + text if text[:1].strip() else text, name)
        tokens.append([*said, eos])
        check_range(np.asarray(tokens[-1]), f"{name} (by tokenizer.json)", model.config.vocab_size)
    return ids, tokens


def _ids(value: Any, model: Model) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(type(i) is int and 0 <= i < model.config.vocab_size for i in value)
