"""Faults of the MLX backend where groups come to others, run ahead and go back (clauses 4.5 to 4.7
and 6.9).

Its rows write at one slot, whenever they came; a row that came later begins at a later one.
"""

from mutations.fault import Edit, Fault

COME = "groups_that_come_are_answered_as_if_alone"
HELD = "what_others_held_does_not_reach_a_group"
AHEAD = "steps_ahead_are_those_of_one_at_a_time"
BACK = "going_back_leaves_nothing_behind"
OWN = "rows_draw_by_settings_of_their_own"


def cache(old: str, new: str) -> Edit:
    """An edit of `cache.py`."""
    return Edit("cache", old, new)


def decode(old: str, new: str) -> Edit:
    """An edit of `decode.py`."""
    return Edit("decode", old, new)


def fault(name: str, harm: str, clause: str, check: str, *edits: Edit) -> Fault:
    """A fault of this backend."""
    return Fault(f"mlx: {name}", harm, clause, check, *edits, package="bridge_mlx")


FAULTS = (
    fault(
        "rows that come read what was before them",
        "A new row remembers timesteps at which it was not there.",
        "4.5",
        COME,
        cache("_from(own[self._row_at], t0, end)", "None"),
    ),
    fault(
        "rows that come stand where the others do",
        "A new answer begins with a gap, as long as the others have got.",
        "4.5",
        COME,
        cache(
            "return self.rows.positions[self._row_at]",
            "return (self.rows.positions - self.rows.steps + self.clock + self.lead)[self._row_at]",
        ),
    ),
    fault(
        "prompts of several lengths begin alike",
        "Beside a longer prompt, the end of a shorter one is not where rows look for it.",
        "4.5",
        COME,
        cache("(more, 0)", "(0, more)"),
    ),
    fault(
        "windows are the first row's",
        "A row that came later reads of its prompt as little as those that have long left theirs.",
        "4.5",
        COME,
        cache("np.clip(P + rows.steps + 1", "np.clip(P + rows.steps[0] + 1"),
    ),
    fault(
        "settings are given out of order",
        "Rows draw by the temperature of another request.",
        "6.9",
        OWN,
        Edit("sampling", "mx.concatenate(parts)[order]", "mx.concatenate(parts)"),
    ),
    fault(
        "who ended ahead is still read",
        "A row that ended is read by its group until the host looks.",
        "4.6",
        AHEAD,
        decode("active = None if alive is None else", "active = None if True else"),
    ),
    fault(
        "only the last end counts",
        "A row that ended ahead is there again, one token later.",
        "4.6",
        AHEAD,
        decode("alive = ~ended if alive is None else alive & ~ended", "alive = ~ended"),
    ),
    fault(
        "the last token that a row may have is fed ahead",
        "A row that has said all that it may is there for the others.",
        "4.6",
        AHEAD,
        decode("rows.left < step)", "rows.left < 0)"),
    ),
    fault(
        "what was fed ahead is not kept",
        "Rows forget what they said before the host looked.",
        "4.6",
        AHEAD,
        cache("x[:, :, now] = y[:, :, : self.lead]", "pass"),
    ),
    fault(
        "what is fed ahead is not read",
        "Until the host looks, rows do not know what they have said since.",
        "4.6",
        AHEAD,
        cache("(self.ahead, reads.ahead, None),", ""),
    ),
    fault(
        "all draws ahead are of one step",
        "A row has the same luck until the host looks.",
        "4.6",
        AHEAD,
        decode("table[line + step]", "table[line]"),
    ),
    fault(
        "what is taken back is overwritten and no more",
        "Rows that go back read on past what they took back.",
        "4.7",
        BACK,
        cache("        self.clock -= common\n", ""),
    ),
    fault(
        "groups that go back further stay where they lie",
        "What they took back remains, and what they go on with comes after it.",
        "4.7",
        BACK,
        cache("x[places, :, later : self.clock] = y", "pass"),
    ),
    fault(
        "all groups go back as far",
        "A group that heard no stop text loses its last words.",
        "4.7",
        BACK,
        cache("self.rows = self.rows.fed(-timesteps)", "self.rows = self.rows.fed(-common)"),
    ),
    fault(
        "places without a row are read",
        "A row reads one of its group twice, where another group is wider.",
        "4.5",
        COME,
        Edit(
            "block",
            "if grid.width == 1 or (active is None and grid.filled is None):",
            "if grid.width == 1 or active is None:",
        ),
    ),
    fault(
        "who has left is read in place of others",
        "Rows read the first places, whoever lies there.",
        "4.3",
        COME,
        Edit("block", "places[to_grid], to_rows", "to_grid, to_rows"),
    ),
)
