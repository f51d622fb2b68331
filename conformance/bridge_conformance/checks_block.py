"""Checks of the block alone (chapter 3): its consequences on a given residual stream.

Two results that the spec makes equal may each be an allowance away from the exact one, so they may
be two apart. Where only blocked contents change, and no shape does, they must agree bit for bit.
"""

import numpy as np

from bridge.contract import BackendModel
from bridge_conformance.cases import BlockCase
from bridge_conformance.tolerance import DTYPES, ulp
from bridge_conformance.trial import Target, Trial

MANY = 600


def start(target: Target, case: BlockCase) -> tuple[Trial, np.ndarray, float]:
    """The trial, the residual stream, and the allowance of the block's active cells."""
    trial = Trial(target, case.rows.model)
    hidden = case.hidden(target.dtype)

    def run(model: BackendModel) -> np.ndarray:
        dtype = DTYPES[model.dtype]
        return model.block(case.layer, hidden.astype(dtype), case.rows.groups, case.rows.active)

    return trial, hidden, trial.allowance(run, case.rows.active)[1]


def block_is_within_the_numerics_rule(target: Target, case: BlockCase) -> None:
    """Clauses 3.2 to 3.6 and 10.2: the block against the reference, inactive rows unchanged."""
    trial, hidden, allowed = start(target, case)
    rows = case.rows
    exact = trial.exact.block(case.layer, hidden.astype(np.float64), rows.groups, rows.active)
    got = trial.model.block(case.layer, hidden, rows.groups, rows.active)
    trial.same(got[rows.active], exact[rows.active], allowed, "block at active cells", case)
    trial.same(got[~rows.active], hidden[~rows.active], 0, "block at inactive cells", case)


def permuting_rows_permutes_the_block(target: Target, case: BlockCase) -> None:
    """Clause 3.8: rows are exchangeable; no order among them is read."""
    trial, hidden, allowed = start(target, case)
    rows, order = case.rows, np.random.default_rng(case.seed).permutation(len(case.rows.groups))
    straight = trial.model.block(case.layer, hidden, rows.groups, rows.active)
    moved = trial.model.block(case.layer, hidden[order], rows.groups[order], rows.active[order])
    where = rows.active[order]
    trial.same(moved[where], straight[order][where], 2 * allowed, "permuted rows", case)


def blocked_rows_have_no_influence_on_the_block(target: Target, case: BlockCase) -> None:
    """Clauses 3.4 and 3.8: other groups' rows and inactive rows are not read, even if NaN."""
    trial, hidden, _ = start(target, case)
    rows = case.rows
    straight = trial.model.block(case.layer, hidden, rows.groups, rows.active)
    for group in np.unique(rows.groups):
        mine = rows.active & (rows.groups == group)[:, None]
        for other in (1 - 2 * hidden, np.full_like(hidden, np.nan)):
            changed = np.where(mine[..., None], hidden, other).astype(hidden.dtype)
            got = trial.model.block(case.layer, changed, rows.groups, rows.active)
            what = f"rows of group {group}, with {other.flat[0]} and the like in all other cells"
            trial.same(got[mine], straight[mine], 0, what, case)


def repeating_rows_changes_nothing(target: Target, case: BlockCase) -> None:
    """Clause 3.8: every row k times over, softmax weights shrink as their number grows."""
    trial, hidden, allowed = start(target, case)
    rows = case.rows
    straight = trial.model.block(case.layer, hidden, rows.groups, rows.active)
    for k in (2, 3):
        thrice = (np.concatenate([a] * k) for a in (hidden, rows.groups, rows.active))
        got = trial.model.block(case.layer, *thrice)[: len(hidden)]
        where = rows.active
        trial.same(got[where], straight[where], 2 * allowed, f"each row {k} times", case)


def attends(case: BlockCase) -> bool:
    """Whether the block is one of attention."""
    bridge = case.rows.model.config.bridge
    return bridge is not None and bridge.kind == "attention"


def width_one_adds_the_rows_own_value(target: Target, case: BlockCase) -> None:
    """Clause 3.8: alone in its group, a row gets `h + (v W_O)`, whatever its query and key."""
    trial, hidden, _ = start(target, case)
    alone = np.arange(len(hidden))
    active = case.rows.active
    norm, v_proj, o_proj = (
        trial.tensors[f"model.layers.{case.layer}.bridge.{name}.weight"].astype(np.float64)
        for name in ("norm", "v_proj", "o_proj")
    )
    h = hidden.astype(np.float64)
    bridge = trial.case.config.bridge
    assert bridge is not None
    mean_square = np.mean(h * h, axis=-1, keepdims=True)
    want = h + (h / np.sqrt(mean_square + bridge.norm_eps) * norm) @ v_proj.T @ o_proj.T

    def run(model: BackendModel) -> np.ndarray:
        return model.block(case.layer, hidden.astype(DTYPES[model.dtype]), alone, active)

    _, allowed = trial.allowance(run, active)
    trial.same(run(trial.model)[active], want[active], allowed, "h + v W_O", case)


def identical_rows_give_the_width_one_result(target: Target, case: BlockCase) -> None:
    """Clauses 3.5 and 3.8: what makes a shared prefill exact (clause 4.2), at any width."""
    trial, hidden, _ = start(target, case)
    B, S, _ = hidden.shape
    same, active = np.repeat(hidden[:1], B, axis=0), np.ones((B, S), dtype=bool)

    def run(model: BackendModel) -> np.ndarray:
        stream = same[:1].astype(DTYPES[model.dtype])
        return model.block(case.layer, stream, np.zeros(1, np.int64), active[:1])

    _, allowed = trial.allowance(run)
    alone = np.repeat(run(trial.model), B, axis=0)
    together = trial.model.block(case.layer, same, np.zeros(B, np.int64), active)
    trial.same(together, alone, 2 * allowed, "identical rows", case)
    if ulp(target.dtype) <= ulp("float32"):
        return  # one by one, so many terms add up to more rounding of float32 than is allowed for
    # So many weights of 1 have a sum that bfloat16 does not reach by adding them up.
    many, active = np.repeat(hidden[:1, :1], MANY, axis=0), np.ones((MANY, 1), dtype=bool)
    together = trial.model.block(case.layer, many, np.zeros(MANY, np.int64), active)
    alone = np.repeat(alone[:1, :1], MANY, axis=0)
    trial.same(together, alone, 2 * allowed, f"{MANY} identical rows", case)


def timesteps_do_not_mix_in_the_block(target: Target, case: BlockCase) -> None:
    """Clauses 3.3 and 3.8: the block reads the current timestep and no other."""
    trial, hidden, allowed = start(target, case)
    rows = case.rows
    together = trial.model.block(case.layer, hidden, rows.groups, rows.active)
    for s in range(hidden.shape[1]):
        apart = trial.model.block(case.layer, hidden[:, [s]], rows.groups, rows.active[:, [s]])
        where = rows.active[:, s]
        trial.same(
            apart[where, 0], together[where, s], 2 * allowed, f"timestep {s} by itself", case
        )
