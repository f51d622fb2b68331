"""Finding the groups of an evaluation: decoded part by part, scored and written batch by batch.

A draw is a function of seed, problem, number of the group and row (clause 6.2), so that the same
rows meet the same uniforms at every width and in a baseline. Parts and batches are cut by place
alone, not by what is left to do, and a part is decoded as a whole, by an engine that has room for
so many rows whatever is free: the same rows are always computed together, and so are rounded alike.
An evaluation that was interrupted ends with the same bytes as one that was not.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bridge.decoding.events import Answered, Finished, ResponseSet
from bridge.decoding.memory import room_for
from bridge.errors import show
from bridge.evaluation.records import Group, Journal, Row
from bridge.model import Model
from bridge.numbers.rewards import reaches
from bridge.tasks.user_code import calling

if TYPE_CHECKING:
    from bridge.tasks import Problem, Scores, Task

GROUP_SHIFT = 20  # a prompt's number in the counter is problem + (group << 20)
PART = 8  # batches that one engine decodes: as its last rows end, places stay empty

Place = tuple[int, int]  # of a group: its number, and the place of its problem


@dataclass(frozen=True)
class Decoding:
    """How responses are drawn: the options of `Model.stream`, the same for all prompts."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0
    max_new_tokens: int | None = None  # None: 256, or what the context leaves
    stop: tuple[str, ...] = ()
    chat: bool = False
    system: str | None = None


@dataclass(frozen=True)
class Plan:
    """What is asked, all of it checked."""

    problems: "Sequence[Problem]"
    prompts: Sequence[list[int]]  # ids, one list a problem
    digests: Sequence[str]
    groups: int
    decoding: Decoding
    max_rows: int
    threshold: float  # a score from which on a response is correct

    def size(self, width: int) -> int:
        """Groups of a batch, as many as are decoded at once."""
        return max(1, self.max_rows // width)

    def parts(self, width: int) -> list[list[list[Place]]]:
        """All groups, by part and batch: first one of every problem."""
        places = [(g, i) for g in range(self.groups) for i in range(len(self.problems))]
        size = self.size(width)
        batches = [places[at : at + size] for at in range(0, len(places), size)]
        return [batches[at : at + PART] for at in range(0, len(batches), PART)]


@dataclass(frozen=True)
class Progress:
    """How far a width is; what was found earlier counts as done."""

    width: int
    done: int  # groups
    of: int
    accuracy: float | None  # the mean over the rows of those
    running: int  # rows of the present part that have not ended
    tokens: int  # drawn since the start, at all widths
    seconds: float  # since the start


class Run:
    """One go at a plan."""

    def __init__(
        self,
        model: Model,
        task: "Task",
        plan: Plan,
        journal: Journal,
        scores: "Scores",
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.model, self.task, self.plan = model, task, plan
        self.journal, self.scores, self.progress = journal, scores, progress
        self.tokens, self.running, self.start = 0, 0, time.perf_counter()

    def find(self, width: int) -> None:
        """Every group of a width that is not in the journal yet, and with it then."""
        parts = self.plan.parts(width)
        self.done = self.rows = self.correct = 0
        self.of = sum(len(batch) for part in parts for batch in part)
        for part in parts:
            for batch in part:
                self._count(self._known(width, batch))
        self._tell(width, 0)
        for part in parts:
            if any(len(self._known(width, batch)) < len(batch) for batch in part):
                self._find(width, part)

    def _find(self, width: int, part: Sequence[Sequence[Place]]) -> None:
        """The groups of a part, which is decoded as a whole even if some of it is known."""
        answers = self._decode(width, [place for batch in part for place in batch])
        for batch in part:
            sets = [next(answers) for _ in batch]
            known = {group.key for group in self._known(width, batch)}
            if len(known) < len(batch):
                found = self._score(width, batch, sets)
                new = [group for group in found if group.key not in known]
                self.journal.append(new)
                self._count(new)
                self._tell(width, self.running)

    def _known(self, width: int, batch: Sequence[Place]) -> list[Group]:
        keys = [(width, self.plan.problems[i].number, g) for g, i in batch]
        return [self.journal.groups[key] for key in keys if key in self.journal.groups]

    def _decode(self, width: int, places: Sequence[Place]) -> Iterator[ResponseSet]:
        """The answers of groups in the order of their places, whatever the order they end in."""
        plan, d = self.plan, self.plan.decoding
        assert d.max_new_tokens is not None
        requests = self.model.requests(
            [plan.prompts[i] for _, i in places],
            width=width,
            max_new_tokens=d.max_new_tokens,
            temperature=d.temperature,
            top_k=d.top_k,
            top_p=d.top_p,
            min_p=d.min_p,
            seed=d.seed,
            stop=d.stop,
            prompt_ids=[plan.problems[i].number + (g << GROUP_SHIFT) for g, i in places],
        )
        size, longest = plan.size(width), max(map(len, plan.prompts))
        room = room_for(self.model.implementation, longest, width, d.max_new_tokens, size)
        engine = self.model.engine(max_rows=width * size, cache_bytes=room)
        for request in requests:
            engine.submit(request)
        waiting: dict[int, ResponseSet] = {}
        self.running, due, before = width * len(places), 0, self.tokens
        while not engine.idle:
            events = engine.step()
            self.tokens = before + engine.stats.tokens
            for event in events:
                if isinstance(event, Finished):
                    self.running -= 1
                    self._tell(width, self.running)
                elif isinstance(event, Answered):
                    waiting[event.prompt] = event.answers
            while due in waiting:
                yield waiting.pop(due)
                due += 1

    def _score(
        self, width: int, batch: Sequence[Place], sets: Sequence[ResponseSet]
    ) -> list[Group]:
        plan = self.plan
        asked = [plan.problems[i] for _, i in batch]
        pairs = [
            (problem, response.text)
            for problem, answers in zip(asked, sets, strict=True)
            for response in answers.responses
        ]
        scores = iter(self.scores.score(pairs))
        found = []
        for (number, i), problem, answers in zip(batch, asked, sets, strict=True):
            rows = []
            for response in answers.responses:
                score = next(scores)
                rows.append(
                    Row(
                        text=response.text,
                        tokens=len(response.tokens),
                        finish_reason=response.finish_reason,
                        answer=self._answer(problem, response.text),
                        score=float(score.value),
                        trouble=score.problem,
                    )
                )
            found.append(Group(width, problem.number, number, plan.digests[i], tuple(rows)))
        return found

    def _answer(self, problem: "Problem", response: str) -> str | None:
        """What a response votes for, from a task that may be the user's own."""
        with calling(self.task, f"read_answer of a response to problem {problem.number}"):
            answer = self.task.read_answer(response)
            if answer is not None and not isinstance(answer, str):
                raise TypeError(f"it gave {show(answer)}, which is neither a text nor None")
            return answer

    def _count(self, groups: Sequence[Group]) -> None:
        self.done += len(groups)
        scores = [row.score for group in groups for row in group.rows]
        self.rows += len(scores)
        self.correct += int(reaches(scores, self.plan.threshold).sum())

    def _tell(self, width: int, running: int) -> None:
        if self.progress is not None:
            accuracy = self.correct / self.rows if self.rows else None
            seconds = time.perf_counter() - self.start
            self.progress(
                Progress(width, self.done, self.of, accuracy, running, self.tokens, seconds)
            )
