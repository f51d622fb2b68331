"""Continuous batching by group, over any backend: requests in, events out, a step at a time.

Requests wait in a line. A whole group is let in as soon as its rows fit, those of the head first;
rows that end leave, and groups never split. What a request gets does not depend on what else is
running. It knows queues, rows and stops; the backend knows tensors, and its decoder may draw some
tokens of each row before anyone looks. One thread at a time may use an engine.
"""

import time
from collections import deque
from collections.abc import Sequence

import numpy as np

from bridge.contract import BackendModel, Decoder, Sampling
from bridge.decoding.budget import Budget, Load
from bridge.decoding.events import Answered, Started, Step
from bridge.decoding.inputs import check_prompts
from bridge.decoding.requests import Request
from bridge.decoding.running import Running
from bridge.decoding.stats import Stats
from bridge.text.tokenizer import Tokenizer

AHEAD = 8  # tokens that a decoder may draw of each row before they are looked at
MEND = "lower width or max_new_tokens, or shorten the prompt"


class Engine:
    """The requests of one model."""

    def __init__(
        self,
        model: BackendModel,
        tokenizer: Tokenizer | None = None,
        budget: Budget | None = None,
        ahead: int = AHEAD,
    ) -> None:
        """`budget`: what is decoded at once; None: 256 rows, in memory as it is now. `ahead`: how
        many tokens of a row are drawn at most before its stops are looked for; the tokens of each
        request are the same for any."""
        self.model, self.tokenizer, self.ahead = model, tokenizer, ahead
        self.budget = Budget(model) if budget is None else budget
        self.stats = Stats()
        self.queue: deque[Running] = deque()
        self.running: list[Running] = []  # in the order of the decoder's rows
        self._decoder: Decoder | None = None
        self._cancelled: set[int] = set()  # tickets, since the last step
        self._tickets = 0

    def submit(self, request: Request) -> int:
        """Put a request at the end of the line. Gives its ticket, by which events name it: 0 for
        the first, and so on. Raises BridgeError for what clause 4.4 refuses, and for a group that
        could not be decoded even alone."""
        prompts = [np.asarray(request.tokens, np.int64)]
        check_prompts(self.model.config, prompts, [request.width], request.max_new_tokens)
        if self.idle:
            self.budget.measure()
        group = Running(self._tickets, request, self.tokenizer)
        self.budget.check(_load([group]), MEND)
        self._tickets += 1
        self.queue.append(group)
        return group.ticket

    def cancel(self, ticket: int) -> bool:
        """Take a request back, whether it waits or runs. Whether there was something to take back:
        the next step then tells of it, with what its rows have said, and drops its rows."""
        known = any(group.ticket == ticket for group in (*self.queue, *self.running))
        if known:
            self._cancelled.add(ticket)
        return known

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.queue and not self.running

    @property
    def rows(self) -> int:
        """Of all groups that run, those that have not ended."""
        return sum(len(group.left) for group in self.running)

    def step(self) -> list[Step]:
        """Let in what fits, and take one or more tokens of each row that runs. What happened, in
        order: a row's events in the order of its tokens, and after its last rows a request's
        Answered. Raises BridgeError, and goes on without it, for a request that memory has no room
        for any more, though nothing else runs."""
        events = self._leave_line()
        while coming := self._coming():
            events.append(self._admit(coming))
        if self.running:
            events += self._decode()
        return events

    def _leave_line(self) -> list[Step]:
        """Requests that were taken back while they waited."""
        events: list[Step] = []
        for group in [group for group in self.queue if group.ticket in self._cancelled]:
            self.queue.remove(group)
            self._cancelled.remove(group.ticket)
            events += [*group.cancel(), Answered(group.ticket, group.answers())]
        return events

    def _coming(self) -> list[Running]:
        """The groups to let in next, which are read together; taken out of the line."""
        coming: list[Running] = []
        if self.queue and not self.running:
            self.budget.measure()
        while self.queue and self._fits(coming, self.queue[0]):
            coming.append(self.queue.popleft())
        if self.queue and not coming and not self.running:
            self.budget.check(_load([self.queue.popleft()]), MEND)
        return coming

    def _fits(self, coming: Sequence[Running], head: Running) -> bool:
        """Whether the head of the line can be let in beside those that run, and be read together
        with those that come."""
        if coming:
            last = coming[-1]
            beside = head.ticket == last.ticket + 1  # so that one Started tells of them
            if not beside or head.request.max_new_tokens != last.request.max_new_tokens:
                return False
        others = [*self.running, *coming]
        rows = sum(len(group.left) for group in others)
        if others and rows + len(head.left) > self.budget.rows:
            return False
        return self.budget.fits(_load([*others, head]), len(coming) + 1)

    def _admit(self, coming: list[Running]) -> Started:
        """Read the prompts of groups, which run from now on."""
        start = time.perf_counter()
        requests = [group.request for group in coming]
        prompts = [np.asarray(request.tokens, np.int64) for request in requests]
        widths, ids = [r.width for r in requests], [r.prompt_id for r in requests]
        limit = requests[0].max_new_tokens
        if self._decoder is None:
            self._decoder = self.model.prefill(prompts, widths, limit, prompt_ids=ids)
        else:
            self._decoder.admit(prompts, widths, limit, prompt_ids=ids)
        self.running += coming
        seconds = time.perf_counter() - start
        self.stats.prompts += len(coming)
        self.stats.prefill_seconds += seconds
        return Started([len(prompt) for prompt in prompts], seconds, coming[0].ticket)

    def _decode(self) -> list[Step]:
        """Draw, see which rows end, and feed the others."""
        assert self._decoder is not None
        start = time.perf_counter()
        ends = frozenset.intersection(*(group.request.ends for group in self.running))
        drawn = self._decoder.sample_ahead(self._sampling(), self.ahead, ends)
        R, k = drawn.shape
        tokens, keep, back = np.zeros(R, np.int64), np.zeros(R, bool), np.zeros(R, np.int64)
        events: list[Step] = []
        first, said, ended = 0, 0, 0
        for group in self.running:
            own = slice(first, first + len(group.left))
            first = own.stop
            if group.ticket in self._cancelled:
                events += group.cancel()
            else:
                taken = group.take(drawn[own], ends)
                tokens[own], keep[own], back[own] = taken.tokens, taken.keep, taken.back
                said, ended = said + taken.said, ended + int((~taken.keep).sum())
                events += taken.events
            if not group.left:
                events.append(Answered(group.ticket, group.answers()))
        self.running = [group for group in self.running if group.left]
        self._cancelled.clear()
        if self.running:
            self._decoder.advance(tokens, keep, back if back[keep].any() else None)
        else:
            self._decoder = None
        self._count(R, k, int(keep.sum()), said, ended)
        self.stats.decode_seconds += time.perf_counter() - start
        return events

    def _sampling(self) -> Sampling | list[Sampling]:
        """One for all rows where it is the same, else one a row."""
        settings = {group.request.sampling for group in self.running}
        if len(settings) == 1:
            return settings.pop()
        return [group.request.sampling for group in self.running for _ in group.left]

    def _count(self, rows: int, columns: int, kept: int, said: int, ended: int) -> None:
        """Add up a step: what was fed ahead, and then in `advance`. A row's last token is not
        fed."""
        stats, timesteps = self.stats, columns - 1 + (kept > 0)
        stats.tokens += said
        stats.timesteps += timesteps
        stats.row_steps += rows * (columns - 1) + kept
        stats.alive += said - ended
        stats.places += self.budget.rows * timesteps


def _load(groups: Sequence[Running]) -> Load:
    """The rows that are left of groups."""
    requests = [group.request for group in groups]
    return Load(
        tuple(len(request.tokens) for request in requests),
        tuple(len(group.left) for group in groups),
        max(request.max_new_tokens for request in requests),
    )
