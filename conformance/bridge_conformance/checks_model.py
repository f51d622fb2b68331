"""Checks of the whole model under teacher forcing (chapters 2, 3 and 5).

Two results that the spec makes equal may each be an allowance away from the exact one, so they may
be two apart. Where only unread contents change, and no shape does, they must agree bit for bit.
"""

from dataclasses import replace

import numpy as np

from bridge.contract import BackendModel
from bridge_conformance.cases import RowsCase
from bridge_conformance.trial import Target, Trial


def start(target: Target, case: RowsCase) -> tuple[Trial, np.ndarray, float]:
    """The trial, the exact logits of the active cells, and the allowance around them."""
    trial = Trial(target, case.model)

    def run(model: BackendModel) -> np.ndarray:
        return model.logits(*case.arguments)

    return trial, *trial.allowance(run, case.active)


def logits_are_within_the_numerics_rule(target: Target, case: RowsCase) -> None:
    """Chapter 5 and clause 10.2: logits against the reference; finite everywhere (clause 2.3)."""
    trial, exact, allowed = start(target, case)
    got = trial.model.logits(*case.arguments)
    wide = np.float64 if target.dtype == "float64" else np.float32
    if got.dtype != wide:
        raise trial.failure(f"logits are {got.dtype}, not {np.dtype(wide)}", case)
    trial.same(got[case.active], exact, allowed, "logits at active cells", case)
    if not np.isfinite(got).all():
        raise trial.failure("logits at inactive cells are not finite", case)


def norm_ratios_are_within_the_numerics_rule(target: Target, case: RowsCase) -> None:
    """Clause 3.9: of every block, in order of layers, over active cells alone."""
    trial = Trial(target, case.model)

    def run(model: BackendModel, rows: RowsCase = case) -> np.ndarray:
        return model.norm_ratios(*rows.arguments)

    exact, allowed = trial.allowance(run)
    got = run(trial.model)
    if got.dtype not in (np.float32, np.float64):
        raise trial.failure(f"norm ratios are {got.dtype}, not float32 or float64", case)
    trial.same(got, exact, allowed, "norm ratios", case)
    padded = run(trial.model, case.pad(2, 3))
    trial.same(padded, exact, allowed, "norm ratios, padding added on both sides", case)
    host = {name: array for name, array in trial.tensors.items() if ".bridge." not in name}
    plain = run(trial.load(case.model.config.without_bridge(), host))
    if plain.shape != (0,):
        raise trial.failure(f"norm ratios without blocks have the shape {plain.shape}", case)


def fresh_blocks_are_the_identity(target: Target, case: RowsCase) -> None:
    """Clause 3.8: with a zero output projection, the model is its host, exactly."""
    trial = Trial(target, case.model)
    fresh = case.model.tensors(target.dtype, fresh=True)
    host = {name: array for name, array in fresh.items() if ".bridge." not in name}
    plain = trial.load(case.model.config.without_bridge(), host)
    got = trial.load(tensors=fresh).logits(*case.arguments)
    want = plain.logits(*case.arguments)
    trial.same(got[case.active], want[case.active], 0, "logits against the host's", case)


def permuting_rows_permutes_the_logits(target: Target, case: RowsCase) -> None:
    """Clause 3.8: rows are exchangeable, whatever groups lie between them."""
    trial, _, allowed = start(target, case)
    order = np.random.default_rng(case.model.seed).permutation(len(case.groups))
    moved = case.take(order)
    got, want = (trial.model.logits(*rows.arguments) for rows in (moved, case))
    where = moved.active
    trial.same(got[where], want[order][where], 2 * allowed, "permuted rows", case)


def group_numbers_are_only_names(target: Target, case: RowsCase) -> None:
    """Clause 2.2: groups are told apart by equality; their numbers and order mean nothing."""
    trial, _, allowed = start(target, case)
    renamed = replace(case, groups=7 - 3 * case.groups)
    got, want = (trial.model.logits(*rows.arguments) for rows in (renamed, case))
    where = case.active
    trial.same(got[where], want[where], 2 * allowed, "renamed groups", case)


def other_groups_have_no_influence(target: Target, case: RowsCase) -> None:
    """Clause 3.8: neither what rows of other groups say nor whether they are there."""
    trial, _, allowed = start(target, case)
    mine = case.groups == case.groups[0]
    other = (case.tokens + 1) % case.model.config.vocab_size
    changed = replace(case, tokens=np.where(mine[:, None], case.tokens, other))
    want = trial.model.logits(*case.arguments)
    where = case.active & mine[:, None]
    got = trial.model.logits(*changed.arguments)
    trial.same(got[where], want[where], 0, "other groups say something else", case)
    alone = case.take(np.flatnonzero(mine))
    got = trial.model.logits(*alone.arguments)
    trial.same(got[alone.active], want[where], 2 * allowed, "other groups taken away", case)


def inactive_cells_have_no_influence(target: Target, case: RowsCase) -> None:
    """Clauses 2.3 and 3.8: what padding holds is not read, nor how much of it there is."""
    trial, _, allowed = start(target, case)
    rng = np.random.default_rng(case.model.seed)
    garbage = rng.integers(0, case.model.config.vocab_size, size=case.tokens.shape)
    elsewhere = rng.choice([-1, 0, 7, 40, 10**6], size=case.tokens.shape)  # no table reaches all
    changed = replace(
        case,
        tokens=np.where(case.active, case.tokens, garbage),
        positions=np.where(case.active, case.positions, elsewhere),
    )
    want = trial.model.logits(*case.arguments)[case.active]
    got = trial.model.logits(*changed.arguments)[case.active]
    trial.same(got, want, 0, "garbage in inactive cells", case)
    padded = case.pad(2, 3)
    got = trial.model.logits(*padded.arguments)[padded.active]
    trial.same(got, want, 2 * allowed, "padding added on both sides", case)
    lively = np.flatnonzero(case.active.any(axis=1))
    if len(lively):
        fewer = case.take(lively)
        got = trial.model.logits(*fewer.arguments)[fewer.active]
        trial.same(got, want, 2 * allowed, "inactive rows taken away", case)


def repeating_rows_changes_no_logits(target: Target, case: RowsCase) -> None:
    """Clause 3.8: every row twice over."""
    trial, _, allowed = start(target, case)
    twice = case.take(np.tile(np.arange(len(case.groups)), 2))
    want = trial.model.logits(*case.arguments)
    got = trial.model.logits(*twice.arguments)[: len(want)]
    where = case.active
    trial.same(got[where], want[where], 2 * allowed, "each row twice", case)


def no_future_timestep_influences_an_earlier_one(target: Target, case: RowsCase) -> None:
    """Clause 3.8: neither later tokens, of any row, nor whether later cells are active."""
    trial, _, allowed = start(target, case)
    rng = np.random.default_rng(case.model.seed)
    S = case.tokens.shape[1]
    cut = int(rng.integers(0, S))
    later = np.arange(S) > cut
    other = (case.tokens + 1) % case.model.config.vocab_size
    changed = replace(case, tokens=np.where(later, other, case.tokens))
    want = trial.model.logits(*case.arguments)
    where = case.active & ~later
    got = trial.model.logits(*changed.arguments)
    trial.same(got[where], want[where], 0, f"tokens after timestep {cut} changed", case)
    ended = replace(changed, active=where)
    got = trial.model.logits(*ended.arguments)
    trial.same(got[where], want[where], 2 * allowed, f"rows ended at timestep {cut}", case)
    shorter = replace(
        case,
        tokens=case.tokens[:, : cut + 1],
        active=case.active[:, : cut + 1],
        positions=case.positions[:, : cut + 1],
    )
    got = trial.model.logits(*shorter.arguments)[shorter.active]
    trial.same(got, want[where], 2 * allowed, f"batch cut after timestep {cut}", case)
