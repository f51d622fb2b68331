"""Checks of cached decoding (chapter 4) and of sampling on top of it (chapter 6).

Each drives a `Decoder` with forced tokens and rows that end at different times, and compares its
logits with teacher forcing, or its draws with the reference's rule on those same logits.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, cast

import numpy as np

from bridge.contract import BackendModel, Decoder, Sampling
from bridge.errors import BridgeError
from bridge.philox import uniforms
from bridge_conformance.cases import DecodeCase, teacher_forced
from bridge_conformance.trial import Target, Trial
from bridge_ref.generate import generate
from bridge_ref.ops import log_softmax
from bridge_ref.sampling import sample

SAMPLINGS = (
    Sampling(temperature=0.0),
    Sampling(temperature=1.0, seed=1),
    Sampling(temperature=0.7, top_k=3, seed=2),
    Sampling(temperature=1.3, top_p=0.8, seed=3),
    Sampling(temperature=1.0, min_p=0.2, seed=2**63 + 4),
    Sampling(temperature=2.0, top_k=6, top_p=0.9, min_p=0.05, seed=5),
)


def start(target: Target, case: DecodeCase, left: int = 0) -> tuple[Trial, np.ndarray, float]:
    """The trial, the backend's teacher-forced logits `[steps, R, V]`, and their allowance."""
    trial = Trial(target, case.model)
    rows, first = case.teacher_forced(left)
    timestep = first + np.arange(case.steps)[:, None]
    every = np.arange(len(first))

    def run(model: BackendModel) -> np.ndarray:
        return model.logits(*rows.arguments)[every, timestep]

    _, allowed = trial.allowance(run, case.alive)
    return trial, run(trial.model), allowed


def prefill(model: BackendModel, case: DecodeCase, **options) -> Decoder:
    """A decoder at step 0."""
    return model.prefill(case.prompts, case.widths, case.steps, **options)


def decode(decoder: Decoder, case: DecodeCase) -> Iterator[tuple[int, np.ndarray]]:
    """Drive a decoder with the case's tokens and endings: yields each step and its live rows."""
    for step in range(case.steps):
        live = np.flatnonzero(case.alive[step])
        yield step, live
        if step + 1 < case.steps:
            decoder.advance(case.forced[step, live], case.alive[step + 1, live])


def cached_decoding_equals_teacher_forcing(target: Target, case: DecodeCase) -> None:
    """Clauses 4.1 and 4.3: at every timestep, of every row, with ragged endings."""
    for left in (0, 2):
        trial, want, allowed = start(target, case, left)
        decoder = prefill(trial.model, case)
        for step, live in decode(decoder, case):
            what = f"logits of rows {live.tolist()} at step {step}, {left} columns of left padding"
            trial.same(decoder.logits(), want[step, live], 2 * allowed, what, case)


def next_log_probabilities_are_those_of_the_loss(target: Target, case: DecodeCase) -> None:
    """Clause 6.10: of one token a row at each step; not of another number of them, of no token, or
    at temperature 0."""
    trial, _, _ = start(target, case)  # leaves out what proves nothing
    (rows, first), temperature = case.teacher_forced(), 0.7 + case.seed % 3
    cells = np.arange(len(first)), first + np.arange(case.steps)[:, None]

    def run(model: BackendModel) -> tuple[np.ndarray, np.ndarray]:
        scaled = model.logits(*rows.arguments)[cells].astype(np.float64) / temperature
        logp = log_softmax(scaled)[0]
        return scaled, np.take_along_axis(logp, case.forced[:, :, None], axis=-1)[:, :, 0]

    (scaled, exact), (_, own), *nudged = map(run, (trial.exact, trial.rounded, *trial.nudged))
    # A log-probability is a difference of logits and a logarithm: near 1 at least.
    largest = max(1.0, float(np.abs(scaled[case.alive]).max()))
    allowed = trial.allowed(
        exact[case.alive], own[case.alive], [lp[case.alive] for _, lp in nudged], largest
    )
    decoder = prefill(trial.model, case)
    for step, live in decode(decoder, case):
        got = decoder.logprobs(case.forced[step, live], temperature)
        if got.dtype not in (np.float32, np.float64):
            raise trial.failure(f"log-probabilities are {got.dtype}, not wide", case)
        what = f"log-probabilities of next tokens at step {step}"
        trial.same(got, exact[step, live], allowed, what, case)
    left = np.flatnonzero(case.alive[-1])
    tokens, vocabulary = case.forced[-1, left], case.model.config.vocab_size
    for what, asked, at in (
        ("a token too many", np.append(tokens, 0), 1.0),
        ("an id past the vocabulary", tokens + vocabulary, 1.0),
        ("a negative id", -1 - tokens, 1.0),
        ("a temperature of 0", tokens, 0.0),
    ):
        must_refuse(trial, case, f"logprobs of {what}", partial(decoder.logprobs, asked, at))


def a_prompt_is_prefilled_once_for_its_group(target: Target, case: DecodeCase) -> None:
    """Clause 4.2: at step 0 rows of a group agree, and are what the prompt alone gives."""
    trial, want, allowed = start(target, case)
    got = prefill(trial.model, case).logits()
    trial.same(got, want[0], 2 * allowed, "logits after the prefill", case)
    for number, prompt in enumerate(case.prompts):
        alone = trial.model.prefill([prompt], [1], case.steps).logits()
        rows = got[case.row_prompt == number]
        same = np.repeat(alone, len(rows), axis=0)
        trial.same(rows, same, 2 * allowed, f"prompt {number} at width 1", case)


def what_is_out_of_bounds_is_refused(target: Target, case: DecodeCase) -> None:
    """Clauses 4.4 and 10.1: no empty prompt, no width of 0, nothing past the context; no timestep
    of other rows, of no token, of nothing drawn or of none reserved, and no block that is not."""
    trial = Trial(target, case.model)
    model, config, last = trial.model, case.model.config, case.prompts[-1]
    left = config.max_position_embeddings - len(last)
    for what, prompt, width, new in (
        ("an empty prompt", last[:0], 1, 1),
        ("a width of 0", last, 0, 1),
        ("a text past the context", last, 1, left + 1),
    ):
        prompts, widths = [*case.prompts, prompt], [*case.widths, width]
        must_refuse(trial, case, what, partial(model.prefill, prompts, widths, new))
    tokens, every = case.forced[0], np.ones(len(case.row_prompt), bool)
    outside = np.where(np.arange(len(tokens)) == 0, config.vocab_size, tokens)
    several, one = prefill(model, case), model.prefill(case.prompts, case.widths, 1)
    for what, decoder, fed, keep in (
        ("advance() of nothing drawn", several, None, None),
        ("a token too few", several, tokens[1:], None),
        ("a token too many", several, np.append(tokens, 0), None),
        ("a keep too short", several, tokens, every[1:]),
        ("an id past the vocabulary", several, outside, None),
        ("a negative id", several, -1 - tokens, None),
        ("a timestep that was not reserved", one, tokens, None),
    ):
        before = decoder.logits()
        must_refuse(trial, case, what, partial(decoder.advance, fed, keep))
        trial.same(decoder.logits(), before, 0, f"logits after {what} was refused", case)
    cells = np.zeros((1, 1, config.hidden_size)), np.zeros(1, np.int64), np.ones((1, 1), bool)
    none = partial(model.block, config.num_hidden_layers, *cells)
    must_refuse(trial, case, "the block of a layer that is not", none)


def must_refuse(trial: Trial, case: Any, what: str, call: Callable[[], Any]) -> None:
    """What a call must not do, since what it is given is wrong."""
    with suppress(BridgeError):
        call()
        raise trial.failure(f"{what} is taken", case)


def ended_rows_leave_other_groups_unchanged(target: Target, case: DecodeCase) -> None:
    """Clause 4.3: dropping rows of other groups, all at once, does not move the first group."""
    case = replace(case, ragged=False)
    trial, _, allowed = start(target, case)
    whole, dropped = prefill(trial.model, case), prefill(trial.model, case)
    mine = case.row_prompt == 0
    rows = np.arange(len(mine))
    for step in range(case.steps):
        got, want = dropped.logits(), whole.logits()[mine]
        trial.same(got[: mine.sum()], want, 2 * allowed, f"first group at step {step}", case)
        if step + 1 < case.steps:
            whole.advance(case.forced[step])
            dropped.advance(case.forced[step, rows], mine[rows])
            rows = rows[mine[rows]]
    dropped.advance(case.forced[-1, rows], np.zeros(len(rows), dtype=bool))
    if dropped.logits().shape != (0, case.model.config.vocab_size):
        raise trial.failure(f"all rows ended, yet logits are {dropped.logits().shape}", case)


def what_was_sampled_is_what_is_fed(target: Target, case: DecodeCase) -> None:
    """Clause 10.1: `advance()` without tokens feeds the last draw; `sample` does not advance."""
    trial = Trial(target, case.model)
    drawn, forced = prefill(trial.model, case), prefill(trial.model, case)
    for step in range(case.steps):
        before = drawn.logits()
        tokens = drawn.sample(SAMPLINGS[1])
        trial.same(drawn.logits(), before, 0, f"logits after a draw at step {step}", case)
        trial.same(before, forced.logits(), 0, f"step {step}, drawn or forced", case)
        if step + 1 < case.steps:
            fed = tokens.copy()
            spoil(tokens)
            drawn.advance()
            forced.advance(fed)


def spoil(array: np.ndarray) -> None:
    """Overwrite what a backend handed out, if it may be written to: it is the caller's."""
    if array.flags.writeable:
        array[...] = 0


def sampled_tokens_follow_the_rule(target: Target, case: DecodeCase) -> None:
    """Chapter 6: draws equal the reference's rule on the decoder's own logits, row by row.

    A row keeps its number in its group when others end, and its prompt keeps the number given. Once
    more with tokens in pairs whose logits are equal: random ones hardly ever are.
    """
    trial = Trial(target, case.model)
    draws_follow_the_rule(trial, trial.model, case)
    draws_follow_the_rule(trial, trial.load(tensors=in_pairs(trial.tensors)), case)


def in_pairs(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a model that gives tokens 2i and 2i + 1 the same logit."""
    return {
        name: array[np.arange(len(array)) // 2 * 2]
        if name in ("model.embed_tokens.weight", "lm_head.weight")
        else array
        for name, array in tensors.items()
    }


def draws_follow_the_rule(trial: Trial, model: BackendModel, case: DecodeCase) -> None:
    """Every draw of a decoder that is fed the case's tokens, under all of `SAMPLINGS`."""
    numbers = [11 + 3 * i for i in range(len(case.prompts))]
    decoder = prefill(model, case, prompt_ids=numbers)
    for step, live in decode(decoder, case):
        logits = decoder.logits()
        rows, prompts = case.row_number[live], np.asarray(numbers)[case.row_prompt[live]]
        for sampling in SAMPLINGS:
            got = decoder.sample(sampling)
            if got.dtype != np.int64 or got.shape != live.shape:
                raise trial.failure(f"sample gives {got.dtype} {got.shape}", case)
            u = uniforms(sampling.seed, step, rows, prompts)
            accepted = acceptable_tokens(logits, u, sampling)
            wrong = ~(accepted == got).any(axis=0)
            if wrong.any():
                raise trial.failure(
                    f"{sampling} at step {step}: rows {live.tolist()} drew {got.tolist()}, "
                    f"not {accepted[0].tolist()}",
                    case,
                )


def generated_rows_follow_the_rule(target: Target, case: DecodeCase) -> None:
    """Clauses 2.3, 4.1, 4.3 and 6.7: whole generation, on its own draws, to EOS or the limit.

    Every token is what the rule draws from the decoder's logits, which are those of teacher forcing
    on what the rows said in the end.
    """
    rng = np.random.default_rng([case.seed, 4])
    V = case.model.config.vocab_size
    eos = rng.choice(V, size=V // 4, replace=False).tolist()
    sampling = SAMPLINGS[case.seed % len(SAMPLINGS)]
    trial = Trial(target, case.model)
    generation(trial, case.prompts, case.widths, case.steps, sampling, eos, case)


def generation(
    trial: Trial,
    prompts: Sequence[np.ndarray],
    widths: Sequence[int],
    steps: int,
    sampling: Sampling,
    eos: Collection[int],
    case: Any,
) -> np.ndarray:
    """What the rows say, `[steps, R]`, once it is seen to follow the rule; 0 after a row's end."""
    spoken = Spoken(trial.model)
    generate(cast(BackendModel, spoken), prompts, widths, steps, sampling, eos)
    prompt_of = np.repeat(np.arange(len(widths)), widths)
    number = np.concatenate([np.arange(width) for width in widths])
    said = np.zeros((len(spoken.steps), len(prompt_of)), dtype=np.int64)
    alive = np.zeros(said.shape, dtype=bool)
    live = np.arange(len(prompt_of))
    for step, (logits, tokens) in enumerate(spoken.steps):
        u = uniforms(sampling.seed, step, number[live], prompt_of[live])
        if not (acceptable_tokens(logits, u, sampling) == tokens).any(axis=0).all():
            message = f"{sampling} at step {step}: rows {live.tolist()} drew {tokens.tolist()}"
            raise trial.failure(message, case)
        said[step, live], alive[step, live] = tokens, True
        live = live[~np.isin(tokens, list(eos))]
    *arguments, first = teacher_forced(prompts, prompt_of, said, alive)
    timestep, every = first + np.arange(len(said))[:, None], np.arange(len(first))

    def run(model: BackendModel) -> np.ndarray:
        return model.logits(*arguments)[every, timestep]

    _, allowed = trial.allowance(run, alive)
    got = np.concatenate([logits for logits, _ in spoken.steps])
    trial.same(got, run(trial.model)[alive], 2 * allowed, "logits while generating", case)
    return said


class Spoken:
    """A model whose decoder notes its logits, and the tokens drawn from them, at every step."""

    def __init__(self, model: BackendModel) -> None:
        self.model = model
        self.steps: list[tuple[np.ndarray, np.ndarray]] = []

    def prefill(self, *arguments: Any) -> "Spoken":
        """As `BackendModel.prefill`; the decoder is this object."""
        self.decoder = self.model.prefill(*arguments)
        return self

    def sample(self, sampling: Sampling) -> np.ndarray:
        """As `Decoder.sample`."""
        tokens = self.decoder.sample(sampling)
        self.steps.append((self.decoder.logits(), tokens))
        return tokens

    def advance(self, tokens: np.ndarray, keep: np.ndarray) -> None:
        """As `Decoder.advance`."""
        self.decoder.advance(tokens, keep)


def acceptable_tokens(
    logits: np.ndarray, u: np.ndarray, sampling: Sampling, filters: bool = True
) -> np.ndarray:
    """What the rule gives `[n, R]`: first as it is, then with its thresholds moved by a rounding.

    Sums of V float32 weights differ from backend to backend in their last places; only a draw that
    falls within that of a threshold may go either way. `filters` False: those of top-p and min-p
    are not moved.
    """
    rounding = np.float32(4 * logits.shape[-1] * np.finfo(np.float32).eps)
    still, moves = (np.float32(0),), (np.float32(0), -rounding, rounding)
    top_p, min_p = sampling.top_p, sampling.min_p
    of_top_p, of_min_p = (
        moves if filters and option is not None else still for option in (top_p, min_p)
    )
    least = float(np.finfo(np.float32).tiny)  # the likeliest token is never cut
    return np.stack(
        [
            sample(
                logits,
                u + move_u,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=None if top_p is None else max(float(top_p + move_p), least),
                min_p=None if min_p is None else min(float(min_p * (1 + move_m)), 1.0),
            )
            for move_u, move_p, move_m in product(moves, of_top_p, of_min_p)
        ]
    )
