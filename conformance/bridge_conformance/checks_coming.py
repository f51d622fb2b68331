"""Checks of a decoder that groups come to and leave (clauses 4.5 and 6.9), and of what it refuses.

A decoder is driven once through all waves of a case, with forced tokens. Its logits are held to the
reference's teacher forcing, in which no row knows of a wave. Axes: R rows of all waves, V
vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from bridge.contract import BackendModel, Decoder, Sampling
from bridge.philox import uniforms
from bridge_conformance.cases import teacher_forced
from bridge_conformance.cases_coming import ComingCase
from bridge_conformance.checks_decode import SAMPLINGS, acceptable_tokens, must_refuse
from bridge_conformance.trial import Target, Trial

SEEDS = (7, 2**63 + 4, 2**64 - 1)


class Coming:
    """A decoder that waves come to when they are due. `rows`: those left, by their numbers among
    all of the case; `steps`: how many own timesteps each of all rows was fed."""

    def __init__(
        self, model: BackendModel, case: ComingCase, prompts: Sequence[np.ndarray] | None = None
    ) -> None:
        """`prompts`: other ones than the case's."""
        self.model, self.case = model, case
        self.prompts = case.text.prompts if prompts is None else prompts
        self.decoder: Decoder
        self.came, self.since = 0, 0  # waves; timesteps since the last one
        self.rows = np.zeros(0, np.int64)
        self.steps = np.zeros(len(case.wave_of), np.int64)

    def go(self) -> Iterator[np.ndarray]:
        """Waves come; then the rows that are left, for whoever drives to `advance`; until none is
        left and none is to come."""
        waves = self.case.waves
        while True:
            while self.came < len(waves) and (
                not len(self.rows) or self.since >= waves[self.came].after
            ):
                self._admit()
            if not len(self.rows):
                return
            yield self.rows

    def _admit(self) -> None:
        """The first wave starts the decoder, and the others come to it, as a draw is forgotten."""
        case, text = self.case, self.case.text
        rows = np.flatnonzero(case.wave_of == self.came)
        which = np.unique(text.row_prompt[rows])
        prompts, widths = [self.prompts[p] for p in which], [text.widths[p] for p in which]
        limit, ids = int(case.limits[rows[0]]), case.prompt_ids[which].tolist()
        if self.came:
            self.decoder.sample(Sampling())
            self.decoder.admit(prompts, widths, limit, prompt_ids=ids)
        else:
            self.decoder = self.model.prefill(prompts, widths, limit, prompt_ids=ids)
        self.rows = np.concatenate([self.rows, rows])
        self.came, self.since = self.came + 1, 0

    def advance(
        self,
        tokens: np.ndarray | None,
        keep: np.ndarray,
        ahead: int = 0,
        back: np.ndarray | None = None,
    ) -> None:
        """As `Decoder.advance`, after `ahead` timesteps that were fed already."""
        self.decoder.advance(tokens, keep, back)
        self.steps[self.rows] += 1 + ahead - (0 if back is None else back)
        self.rows, self.since = self.rows[keep], self.since + 1 + ahead


@dataclass(frozen=True)
class Seen:
    """What a decoder gave at one timestep."""

    rows: np.ndarray  # [n], which rows were left
    steps: np.ndarray  # [n], at which of their own steps
    logits: np.ndarray  # [n, V]
    tokens: np.ndarray  # [n], what they drew by their own settings


def samplings(case: ComingCase) -> list[Sampling]:
    """How each row draws: settings and seeds, alike for some and not for others."""
    rng = np.random.default_rng([case.seed, 4])
    which, seeds = (rng.integers(len(of), size=len(case.wave_of)) for of in (SAMPLINGS, SEEDS))
    return [replace(SAMPLINGS[i], seed=SEEDS[j]) for i, j in zip(which, seeds, strict=True)]


def drive(trial: Trial, case: ComingCase) -> list[Seen]:
    """A decoder through all waves, fed what the case says, with rows that end when it says."""

    def run() -> list[Seen]:
        coming, every, seen = Coming(trial.model, case), samplings(case), []
        for rows in coming.go():
            steps, decoder = coming.steps[rows], coming.decoder
            logits = decoder.logits()
            tokens = decoder.sample([every[row] for row in rows])
            seen.append(Seen(rows, steps, logits, tokens))
            coming.advance(case.text.forced[steps, rows], steps + 1 < case.ends[rows])
        V = case.model.config.vocab_size
        if (left := coming.decoder.logits()).shape != (0, V):
            raise trial.failure(f"all rows ended, yet logits are {left.shape}", case)
        return seen

    return trial.memory.once(("coming", id(case)), run)


def exact_logits(
    trial: Trial,
    prompts: Sequence[np.ndarray],
    row_prompt: np.ndarray,
    said: np.ndarray,
    alive: np.ndarray,
) -> tuple[np.ndarray, float]:
    """The reference's, of rows that said `said [steps, R]` while they were `alive [steps, R]`, by
    teacher forcing: `[steps, R, V]`, where alive; and how far a decoder may be from them."""
    *arguments, first = teacher_forced(prompts, row_prompt, said, alive)
    timestep, every = first + np.arange(len(said))[:, None], np.arange(len(first))

    def run(model: BackendModel) -> np.ndarray:
        return model.logits(*arguments)[every, timestep]

    cells, allowed = trial.allowance(run, alive)
    exact = np.zeros((*alive.shape, cells.shape[-1]))
    exact[alive] = cells
    return exact, 2 * allowed


def groups_that_come_are_answered_as_if_alone(target: Target, case: ComingCase) -> None:
    """Clauses 4.2, 4.3 and 4.5: groups that come in waves to rows under way, or to none, while
    others leave: logits are those of teacher forcing at every step of every row."""
    trial = Trial(target, case.model)
    text = case.text
    exact, allowed = exact_logits(trial, text.prompts, text.row_prompt, text.forced, case.alive)
    for timestep, seen in enumerate(drive(trial, case)):
        what = (
            f"logits at timestep {timestep} of rows {seen.rows.tolist()}, "
            f"at their steps {seen.steps.tolist()}"
        )
        trial.same(seen.logits, exact[seen.steps, seen.rows], allowed, what, case)


def rows_draw_by_settings_of_their_own(target: Target, case: ComingCase) -> None:
    """Clauses 6.2 and 6.9: each row draws by its own settings, seed, step and numbers, whatever
    the rows beside it draw by."""
    trial, every, text = Trial(target, case.model), samplings(case), case.text
    for seen in drive(trial, case):
        for n, (row, step) in enumerate(zip(seen.rows, seen.steps, strict=True)):
            prompt = case.prompt_ids[text.row_prompt[row]]
            u = uniforms(every[row].seed, step, [text.row_number[row]], prompt)
            accepted = acceptable_tokens(seen.logits[[n]], u, every[row])
            if not (accepted == seen.tokens[n]).any():
                raise trial.failure(
                    f"{every[row]}: row {row} drew {seen.tokens[n]} at its step {step}, not "
                    f"{accepted[0, 0]}, beside rows {seen.rows.tolist()}",
                    case,
                )


def what_others_held_does_not_reach_a_group(target: Target, case: ComingCase) -> None:
    """Clauses 3.4 and 4.5: groups that hold NaN reach no others, whether beside them or later in
    their places; to others it is all the same, bit for bit."""
    trial = Trial(target, case.model)
    # The last token has NaN where it is embedded; only every other prompt's rows ever see it.
    poison = case.model.config.vocab_size - 1
    name = "model.embed_tokens.weight"
    tensors = {**trial.tensors, name: trial.tensors[name].copy()}
    tensors[name][poison] = np.nan
    model = trial.load(tensors=tensors)
    for held in (0, 1):
        runs = [_beside(model, case, held, token) for token in (poison, 0)]
        for (rows, got), (_, want) in zip(*runs, strict=True):
            what = f"logits of rows {rows.tolist()}, every other prompt's being NaN or not"
            # Of a tied embedding, the last logit of every row is NaN.
            trial.same(got[:, :poison], want[:, :poison], 0, what, case)


def _beside(
    model: BackendModel, case: ComingCase, held: int, token: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows and logits of every other prompt at every timestep, where prompts `held`, `held` + 2 and
    so on are of one token alone, and are fed it."""
    text, last = case.text, case.model.config.vocab_size - 1
    prompts = [prompt % last for prompt in text.prompts]
    prompts[held::2] = [np.full(len(prompt), token) for prompt in prompts[held::2]]
    theirs = text.row_prompt % 2 == held
    fed = np.where(theirs, token, text.forced % last)
    coming, seen = Coming(model, case, prompts), []
    for rows in coming.go():
        steps, rest = coming.steps[rows], ~theirs[rows]
        seen.append((rows[rest], coming.decoder.logits()[rest]))
        coming.advance(fed[steps, rows], steps + 1 < case.ends[rows])
    return seen


def what_may_not_come_is_refused(target: Target, case: ComingCase) -> None:
    """Clauses 4.4 and 10.1: nothing is admitted that a prefill would refuse, nobody goes back from
    a single draw, and a draw from before a group came is none; and nothing is changed by asking."""
    trial, config = Trial(target, case.model), case.model.config
    coming = Coming(trial.model, case)
    rows = next(coming.go())
    decoder, one = coming.decoder, np.ones(len(rows), np.int64)
    last, none = case.text.prompts[-1], np.zeros(0, np.int64)
    context = config.max_position_embeddings - len(last)
    before, tokens = decoder.logits(), case.text.forced[0, rows]
    refused: Sequence[tuple[str, Callable[[], Any]]] = (
        ("an empty prompt that comes", partial(decoder.admit, [last, none], [1, 1], 1)),
        ("a width of 0 that comes", partial(decoder.admit, [last], [0], 1)),
        ("a text past the context that comes", partial(decoder.admit, [last], [1], context + 1)),
        ("a setting too many", partial(decoder.sample, [Sampling()] * (len(rows) + 1))),
        ("going back where nothing was drawn", partial(decoder.advance, tokens, None, one)),
        ("a back too short", partial(decoder.advance, tokens, None, one[1:] * 0)),
    )
    for what, call in refused:
        must_refuse(trial, case, what, call)
        trial.same(decoder.logits(), before, 0, f"logits after {what} was refused", case)
    decoder.sample(Sampling())
    decoder.admit([last], [1], 2)
    must_refuse(trial, case, "advance() of what was drawn before a group came", decoder.advance)
    decoder.admit([last], [1], 1)
    keep, tokens = np.arange(len(rows) + 2) < len(rows), np.append(tokens, [0, 0])
    past = partial(decoder.advance, tokens)
    must_refuse(trial, case, "a timestep past what the group that came may have", past)
    decoder.advance(tokens, keep)
    what = "logits after groups came, and left unread"
    one_timestep_on(trial, case, rows, decoder, what)


def one_timestep_on(
    trial: Trial, case: ComingCase, rows: np.ndarray, decoder: Decoder, what: str
) -> None:
    """Hold logits to those after each prompt and the first token that its rows are fed."""
    text, alive = case.text, np.ones((2, len(case.wave_of)), bool)
    exact, allowed = exact_logits(trial, text.prompts, text.row_prompt, text.forced[:2], alive)
    trial.same(decoder.logits(), exact[1, rows], allowed, what, case)


def free_bytes_are_a_number_or_none(target: Target, case: ComingCase) -> None:
    """Clause 10.1: what a device can still give, or None where the machine's memory counts."""
    trial = Trial(target, case.model)
    free = trial.model.free_bytes()
    if free is not None and not (isinstance(free, int) and 0 < free < 2**50):
        raise trial.failure(f"free_bytes gives {free!r}", case)
