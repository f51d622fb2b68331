"""A model's whole life as a case: what is done to it, one thing after the other.

`Life` is a state machine of Hypothesis that draws such programs: decoders are started, advanced and
left, two at once, between updates, saved states and restored ones. It knows what may be done when,
and nothing of any backend: `checks_life` does the same to a backend and to the reference.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from bridge.contract import Batch
from bridge_conformance.cases import ModelCase, RowsCase

NEW = 8  # tokens that a decoder of a life may give
RATES = (0.05, None)  # learning rates of updates; None is the optimizer's


class Request(NamedTuple):
    """What a decoder is started with: the lengths of its prompts, and rows for each."""

    lengths: tuple[int, ...]
    widths: tuple[int, ...]


# Of the first two only the prompts' tokens differ.
REQUESTS = (Request((3, 7), (2, 1)), Request((3, 7), (2, 1)), Request((9, 2, 5), (1, 6, 2)))


class Do(NamedTuple):
    """One thing done: `what` is a name of DOABLE.

    `prefill`: decoder `number` is started on request `detail[0]`; `advance`: it is fed, without the
    rows `detail` of those left; `step`: an update at `RATES[number]`, after which decoders are not
    used; `restore`: of the state that was saved as number `number`, likewise; `read`: logits by
    teacher forcing; `score`: log-probabilities; `save`: the trainer's state; `export`: all tensors.
    """

    what: str
    number: int = 0
    detail: tuple[int, ...] = ()


DOABLE = ("prefill", "advance", "step", "restore", "read", "score", "save", "export")


@dataclass(frozen=True)
class LifeCase:
    """A model, the batch that it learns from, and what is done to it."""

    rows: RowsCase
    trainable: tuple[str, ...]
    program: tuple[Do, ...]
    seed: int

    @property
    def model(self) -> ModelCase:
        """The model at its birth."""
        return self.rows.model

    @cached_property
    def batch(self) -> Batch:
        """Targets at every other active cell, and at the first."""
        rng = np.random.default_rng([self.seed, 1])
        mask = self.rows.active & (rng.random(self.rows.active.shape) < 0.5)
        mask[tuple(np.argwhere(self.rows.active)[0])] = True
        targets = rng.integers(0, self.model.config.vocab_size, size=mask.shape)
        return Batch(
            tokens=self.rows.tokens,
            groups=self.rows.groups,
            active=self.rows.active,
            targets=np.where(mask, targets, -100),
            target_mask=mask,
            positions=self.rows.positions,
        )

    def prompts(self, request: int) -> list[np.ndarray]:
        """The prompts of a request: int64 each."""
        rng = np.random.default_rng([self.seed, 2, request])
        V = self.model.config.vocab_size
        return [rng.integers(0, V, size=n) for n in REQUESTS[request].lengths]

    def fed(self, at: int, rows: int) -> np.ndarray:
        """What is fed to `rows` rows by the `at`-th thing done: `[rows]` int64."""
        rng = np.random.default_rng([self.seed, 3, at])
        return rng.integers(0, self.model.config.vocab_size, size=rows)


@dataclass
class Running:
    """A decoder as far as a program needs to know it."""

    left: int  # rows
    more: int = NEW - 1  # timesteps


class Doing:
    """What may be done next, given what was."""

    def __init__(self) -> None:
        self.decoders: dict[int, Running] = {}
        self.saved = 0

    def may(self, do: Do) -> bool:
        """Whether a program may go on with it."""
        running = self.decoders.get(do.number)
        rows = list(do.detail)
        if do.what == "prefill":
            return do.number in (0, 1) and rows in ([i] for i in range(len(REQUESTS)))
        if do.what == "advance":
            if running is None or not running.more or not running.left:
                return False
            return rows == sorted(set(rows)) and all(0 <= row < running.left for row in rows)
        if do.what == "step":
            return do.number in range(len(RATES)) and not rows
        if do.what == "restore":
            return do.number in range(self.saved) and not rows
        return do.what in DOABLE and do.number == 0 and not rows

    def note(self, do: Do) -> None:
        """That it was done."""
        if do.what == "prefill":
            self.decoders[do.number] = Running(sum(REQUESTS[do.detail[0]].widths))
        elif do.what == "advance":
            running = self.decoders[do.number]
            running.left, running.more = running.left - len(do.detail), running.more - 1
        elif do.what in ("step", "restore"):
            self.decoders.clear()
        elif do.what == "save":
            self.saved += 1


class Life(RuleBasedStateMachine):
    """Draws programs. `births`: of the case without its program; `submit` gets the whole."""

    births: ClassVar[Any]
    submit: ClassVar[Callable[[LifeCase], None]]

    def __init__(self) -> None:
        super().__init__()
        self.doing, self.program = Doing(), []
        self.case: LifeCase | None = None

    def do(self, what: str, number: int = 0, detail: tuple[int, ...] = ()) -> None:
        """Note one thing more."""
        done = Do(what, number, detail)
        assert self.doing.may(done)
        self.doing.note(done)
        self.program.append(done)

    @initialize(data=st.data())
    def born(self, data: Any) -> None:
        self.case = data.draw(self.births)

    @rule(number=st.integers(0, 1), request=st.integers(0, len(REQUESTS) - 1))
    def prefill(self, number: int, request: int) -> None:
        self.do("prefill", number, (request,))

    @precondition(lambda self: any(d.more and d.left for d in self.doing.decoders.values()))
    @rule(data=st.data())
    def advance(self, data: Any) -> None:
        able = [n for n, d in sorted(self.doing.decoders.items()) if d.more and d.left]
        number = data.draw(st.sampled_from(able))
        rows = st.integers(0, self.doing.decoders[number].left - 1)
        leave = data.draw(st.one_of(st.just(set()), st.sets(rows, max_size=3)))
        self.do("advance", number, tuple(sorted(leave)))

    @rule(rate=st.integers(0, len(RATES) - 1))
    def step(self, rate: int) -> None:
        self.do("step", rate)

    @rule(what=st.sampled_from(("read", "score", "save", "export")))
    def look(self, what: str) -> None:
        self.do(what)

    @precondition(lambda self: self.doing.saved)
    @rule(data=st.data())
    def restore(self, data: Any) -> None:
        self.do("restore", data.draw(st.integers(0, self.doing.saved - 1)))

    def teardown(self) -> None:
        """Hand the program over, unless Hypothesis broke off while it was drawn."""
        if self.case is None or sys.exc_info()[0] is not None:
            return
        born = self.case
        type(self).submit(LifeCase(born.rows, born.trainable, tuple(self.program), born.seed))
