"""Faults of where the MLX backend's rows lie: at places, of which some are idle, and at one slot,
whenever they came (clauses 4.5 to 4.7 and 6.9). Those of what it draws ahead: `faults_tables.py`.
"""

from mutations.fault import Edit, Fault
from mutations.faults_ahead import AHEAD, BACK
from mutations.faults_coming import COMES, DRAWN


def cache(old: str, new: str) -> Edit:
    """An edit of `cache.py`."""
    return Edit("cache", old, new)


def fault(name: str, harm: str, clause: str, check: str, *edits: Edit) -> Fault:
    """A fault of this backend."""
    return Fault(f"mlx: {name}", harm, clause, check, *edits, package="bridge_mlx")


FAULTS = (
    fault(
        "windows are the first row's",
        "A row that came later reads of its prompt as little as those that have long left theirs.",
        "4.5",
        COMES,
        cache("np.clip(P + rows.steps + 1", "np.clip(P + rows.steps[0] + 1"),
    ),
    fault(
        "settings are given out of order",
        "Rows draw by the temperature of another request.",
        "6.9",
        DRAWN,
        Edit("sampling", "mx.concatenate(parts)[order]", "mx.concatenate(parts)"),
    ),
    fault(
        "what is fed ahead is not read",
        "Until the host looks, rows do not know what they have said since.",
        "4.6",
        AHEAD,
        cache("(self.ahead, reads.ahead, None),", ""),
    ),
    fault(
        "what is taken back is overwritten and no more",
        "Rows that go back read on past what they took back.",
        "4.7",
        BACK,
        cache("        self.clock -= common\n", ""),
    ),
    fault(
        "places without a row are read",
        "A row reads one of its group twice, where another group is wider.",
        "4.5",
        COMES,
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
        COMES,
        Edit("block", "places[to_grid], to_rows", "to_grid, to_rows"),
    ),
)
