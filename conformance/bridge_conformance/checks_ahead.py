"""Checks of steps ahead and of going back (clauses 4.6 and 4.7), as groups come and leave.

Rows say what they draw, so a run is judged when it is over: all that was said in the end is
teacher-forced by the reference, and every draw and all logits on the way are held to that. A
decoder that gives one column at a time has nothing to go back from, and passes.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np

from bridge.contract import Sampling
from bridge.philox import uniforms
from bridge_conformance.cases_coming import ComingCase
from bridge_conformance.checks_coming import (
    Coming,
    exact_logits,
    one_timestep_on,
    samplings,
)
from bridge_conformance.checks_decode import acceptable_tokens, must_refuse, spoil
from bridge_conformance.trial import Target, Trial
from bridge_ref.sampling import sample

AHEAD = 4  # columns asked for; what is compiled for so many serves all checks
SCALES = (1.0, 0.5, 0.25, 0.125, 0.0625)  # of what logits may be off, where a draw is judged


@dataclass(frozen=True)
class Cell:
    """A row, at its own step."""

    row: int
    step: int


class Saying(Coming):
    """A decoder that draws ahead, and what its rows say. With `back`, groups go back by numbers of
    their own, and go on with other tokens than they drew."""

    def __init__(self, trial: Trial, case: ComingCase, back: bool) -> None:
        super().__init__(trial.model, case)
        self.trial, self.back, self.samplings = trial, back, samplings(case)
        rng, V = np.random.default_rng([case.seed, 5]), case.model.config.vocab_size
        self.rng, self.ends = rng, rng.choice(V, size=V // 4, replace=False).tolist()
        self.said = np.zeros(case.alive.shape, np.int64)
        self.drawn: dict[Cell, int] = {}
        self.logits: dict[Cell, np.ndarray] = {}
        # Rows that had ended and went on, and those that went on after another of their group had.
        self.revived = self.left_alone = 0
        for rows in self.go():
            self._look(rows)
            self._table(rows)

    def _look(self, rows: np.ndarray) -> None:
        """Note logits, of rows that stand where nothing is drawn yet."""
        for row, step, logits in zip(rows, self.steps[rows], self.decoder.logits(), strict=True):
            self.logits[Cell(row, step)] = logits

    def _table(self, rows: np.ndarray) -> None:
        """Draw ahead, go back or not, and feed what comes next."""
        given = self.decoder.sample_ahead([self.samplings[row] for row in rows], AHEAD, self.ends)
        table = given.copy()
        spoil(given)
        self._must_end_rightly(table, rows)
        k = table.shape[1]
        groups = self.case.text.row_prompt[rows]
        backs = self.rng.integers(0, k, size=groups.max() + 1)[groups] if self.back else 0 * groups
        now = self.steps[rows]
        at = k - 1 - backs  # the column that each row goes on from
        for n, row in enumerate(rows):
            for j in range(at[n] + 1):
                if table[n, j] >= 0:
                    self.drawn[Cell(row, now[n] + j)] = int(table[n, j])
                    self.said[now[n] + j, row] = table[n, j]
        tokens = table[np.arange(len(rows)), at]
        keep = (tokens >= 0) & (now + at + 1 < self.case.limits[rows])
        self.left_alone += int((keep & np.isin(groups, groups[tokens < 0])).sum())
        if not self.back:
            self.advance(None, keep & ~np.isin(tokens, self.ends), k - 1)
            return
        # Another token than was drawn, for all but the first; those that drew an end id go on too.
        other = self.case.text.forced[np.minimum(now + at, len(self.said) - 1), rows]
        tokens = np.where(np.arange(len(rows)) == 0, tokens, other)
        self.said[(now + at)[keep], rows[keep]] = tokens[keep]
        self.revived += int((keep & (backs > 0) & (table[:, -1] < 0)).sum())
        self.advance(tokens, keep, k - 1, backs)

    def _must_end_rightly(self, table: np.ndarray, rows: np.ndarray) -> None:
        """`[R, k]`: -1 after an end id or the last token that a row may have, and nowhere else."""
        trial, case = self.trial, self.case
        if table.dtype != np.int64 or table.ndim != 2 or not 1 <= table.shape[1] <= AHEAD:
            what = f"sample_ahead of {AHEAD} gives {table.dtype} {table.shape}"
            raise trial.failure(what, case)
        step = self.steps[rows][:, None] + np.arange(table.shape[1])
        last = np.isin(table, self.ends) | (step + 1 >= case.limits[rows][:, None])
        ended = np.cumsum(last, axis=1) - last > 0
        if table.shape[0] != len(rows) or ((table < 0) != ended).any():
            limits = case.limits[rows] - self.steps[rows]
            raise trial.failure(
                f"ends {sorted(self.ends)}, tokens left {limits.tolist()}: rows "
                f"{rows.tolist()} drew {table.tolist()}",
                case,
            )

    def judge(self) -> None:
        """Hold what was drawn and seen to the reference on what was said."""
        trial, case, text = self.trial, self.case, self.case.text
        alive = np.arange(len(self.said))[:, None] < self._said_by_row()
        exact, allowed = exact_logits(trial, text.prompts, text.row_prompt, self.said, alive)
        for cell, logits in self.logits.items():
            what = f"logits of row {cell.row} at its step {cell.step}"
            trial.same(logits, exact[cell.step, cell.row], allowed, what, case)
        for cell, token in self.drawn.items():
            row, step = cell.row, cell.step
            prompt = case.prompt_ids[text.row_prompt[row]]
            u = uniforms(self.samplings[row].seed, step, [text.row_number[row]], prompt)
            logits = exact[[step], row].astype(np.float32)
            if not may_draw(token, logits, u, self.samplings[row], allowed):
                message = f"{self.samplings[row]}: row {row} drew {token} at its step {step}"
                raise trial.failure(message, case)

    def _said_by_row(self) -> np.ndarray:
        """At how many of its own steps each row was, `[R]`: it has logits there, and draws."""
        steps = np.zeros(len(self.steps), np.int64)
        for cell in (*self.drawn, *self.logits):
            steps[cell.row] = max(steps[cell.row], cell.step + 1)
        return steps


def may_draw(
    token: int, logits: np.ndarray, u: np.ndarray, sampling: Sampling, allowed: float
) -> bool:
    """Whether the rule gives a token from logits `[1, V]`, or from others that are no further from
    them than is allowed: with all from the token on raised against those before, or all up to it
    against those after, or it alone."""
    if (acceptable_tokens(logits, u, sampling) == token).any():
        return True
    ids = np.arange(logits.shape[-1])
    for raised in (ids >= token, ids <= token, ids == token):
        for scale in SCALES:
            move = np.float32(scale * allowed)
            moved = logits + np.where(raised, move, -move)
            drawn = sample(
                moved,
                u,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
            )
            if drawn[0] == token:
                return True
    return False


def steps_ahead_are_those_of_one_at_a_time(target: Target, case: ComingCase) -> None:
    """Clauses 4.6 and 6.9: what rows draw ahead, until they end, is what they would draw one at a
    time: no row that ended is there for its group, or has an influence on what is drawn."""
    Saying(Trial(target, case.model), case, back=False).judge()


def going_back_leaves_nothing_behind(target: Target, case: ComingCase) -> None:
    """Clause 4.7: groups go back by different numbers, or not at all, and on with other tokens, in
    rows that had ended too: all is as if what was taken back had never been fed."""
    Saying(Trial(target, case.model), case, back=True).judge()


def what_may_not_follow_a_table_is_refused(target: Target, case: ComingCase) -> None:
    """Clauses 4.7 and 10.1: none goes back further than was fed ahead, apart from its group, or to
    no token, and no row that has ended goes on; and nothing is changed by asking."""
    trial, every = Trial(target, case.model), samplings(case)
    coming = Coming(trial.model, case)
    rows = next(coming.go())
    decoder, tokens = coming.decoder, case.text.forced[0, rows]
    table = decoder.sample_ahead([every[row] for row in rows], AHEAD, ())
    all_back = np.full(len(rows), table.shape[1] - 1)
    refused: list[tuple[str, np.ndarray | None, np.ndarray]] = [
        ("going back further than was fed", tokens, all_back + 1),
        ("going back by less than nothing", tokens, -1 - 0 * all_back),
    ]
    if table.shape[1] > 1:
        apart = all_back - (np.arange(len(rows)) == 0)
        refused.append(("going back to no token", None, all_back))
        if case.text.widths[0] > 1:
            refused.append(("a group that goes back by two numbers", tokens, apart))
    for what, fed, back in refused:
        must_refuse(trial, case, what, partial(decoder.advance, fed, None, back))
    decoder.advance(tokens, None, all_back)
    one_timestep_on(trial, case, rows, decoder, "logits after all was taken back")
    _what_has_ended_must_not_go_on(trial, case)


def _what_has_ended_must_not_go_on(trial: Trial, case: ComingCase) -> None:
    """Unless it goes back to where it ended."""
    coming, every = Coming(trial.model, case), samplings(case)
    rows = next(coming.go())
    decoder, tokens = coming.decoder, case.text.forced[0, rows]
    ends = decoder.sample([every[row] for row in rows])[:1].tolist()  # the first row's first
    table = decoder.sample_ahead([every[row] for row in rows], AHEAD, ends)
    if table[0, -1] < 0:
        what = "a row that has ended and goes on"
        must_refuse(trial, case, what, partial(decoder.advance, tokens))
    decoder.advance(tokens, None, np.full(len(rows), table.shape[1] - 1))
    what = "logits after a row that had ended went back to its end, and on"
    one_timestep_on(trial, case, rows, decoder, what)
