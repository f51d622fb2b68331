"""Faults of steps ahead and of going back (clauses 4.6 and 4.7): in the reference's decoder, which
says both in the plainest way, and in what Bridge plans and refuses for all backends."""

from mutations.fault import Edit, Fault

AHEAD = "steps_ahead_are_those_of_one_at_a_time"
BACK = "going_back_leaves_nothing_behind"
REFUSED = "what_may_not_follow_a_table_is_refused"


def stated(name: str, harm: str, clause: str, check: str, old: str, new: str) -> Fault:
    """Of the reference's `decode.py`."""
    edit = Edit("decode", old, new)
    return Fault(f"reference: {name}", harm, clause, check, edit, package="bridge_ref")


def planned(
    name: str, harm: str, clause: str, check: str, module: str, old: str, new: str
) -> Fault:
    """Of a module of `bridge/decoding`; the reference runs it, which draws as many as are asked."""
    edit = Edit(f"decoding.{module}", old, new)
    return Fault(name, harm, clause, check, edit, package="bridge", through="bridge_ref")


FAULTS = (
    stated(
        "rows that ended are there until somebody looks",
        "A group goes on reading a row that has finished.",
        "2.3",
        AHEAD,
        "self._feed(columns[-1], alive)",
        "self._feed(np.maximum(columns[-1], 0), alive | True)",
    ),
    stated(
        "of the end ids one is known",
        "Models with several EOS tokens talk on after the others.",
        "4.6",
        AHEAD,
        "np.isin(columns[-1], list(ends))",
        "np.isin(columns[-1], list(ends)[:1])",
    ),
    stated(
        "limits are not known ahead",
        "Rows read and write past what was kept for them.",
        "4.6",
        AHEAD,
        " & (self.rows.left > 0)",
        "",
    ),
    stated(
        "a row that ended is awake again a timestep later",
        "It goes on from its last token, which nobody was to read.",
        "4.6",
        AHEAD,
        "alive = alive & ~np.isin",
        "alive = ~np.isin",
    ),
    stated(
        "what was drawn after a row's end is shown",
        "Answers go on behind their ends.",
        "4.6",
        AHEAD,
        "np.where(alive, self._draw(sampling), -1)",
        "self._draw(sampling)",
    ),
    stated(
        "all columns are drawn by the luck of the first",
        "Rows repeat themselves for as long as nobody looks.",
        "6.2",
        AHEAD,
        "uniform = uniforms(seeds, rows.steps,",
        "uniform = uniforms(seeds, rows.steps // 2 * 2,",
    ),
    stated(
        "the first column is fed on",
        "After four tokens a row goes on from the first of them.",
        "10.1",
        AHEAD,
        "tokens = self.drawn[:, -1]",
        "tokens = np.where(self.drawn[:, -1] < 0, 0, self.drawn[:, 0])",
    ),
    stated(
        "keys and values that were taken back stay",
        "A text that was cut off at its stop is remembered.",
        "4.7",
        BACK,
        "(k[:length], v[:length])",
        "(k, v)",
    ),
    stated(
        "positions are not taken back",
        "A gap where a text was cut off.",
        "4.7",
        BACK,
        "rows.fed(-back).keep(places)",
        "rows.keep(places)",
    ),
    stated(
        "a row that ended is counted no further",
        "One that goes on after all stands before its own end.",
        "4.7",
        BACK,
        "self.rows = self.rows.fed(1)",
        "self.rows = self.rows.fed(alive.astype(np.int64))",
    ),
    stated(
        "all groups go back as far as the one that goes furthest",
        "A stop text in one answer makes others forget what they said.",
        "4.7",
        BACK,
        "rows.fed(-back)",
        "rows.fed(-np.full(len(rows), back.max(initial=0)))",
    ),
    planned(
        "rows that have ended may go on",
        "What ended timesteps ago is fed to places that others took.",
        "10.1",
        REFUSED,
        "inputs",
        "if drawn is not None and (drawn",
        "if False and (drawn",
    ),
    planned(
        "rows of a group may go back apart",
        "One of them reads what another one will not have said.",
        "4.7",
        REFUSED,
        "inputs",
        "if (steps != steps[first][group]).any():",
        "if False:",
    ),
    planned(
        "going back needs no token",
        "The last column is fed to rows that are not there any more.",
        "10.1",
        REFUSED,
        "inputs",
        "if steps.any() and fed is None:",
        "if False:",
    ),
    planned(
        "rows may go back further than was fed ahead",
        "Prompts lose their ends.",
        "4.7",
        REFUSED,
        "inputs",
        "if (bad := outside(steps, ahead)).size:",
        "if (bad := outside(steps, ahead + 1)).size:",
    ),
)
