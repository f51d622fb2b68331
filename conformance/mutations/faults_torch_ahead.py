"""Faults of torch's loop on the device (clause 4.6), which runs on a CPU for them."""

from mutations.fault import Edit, Fault

AHEAD = "steps_ahead_are_those_of_one_at_a_time"


def ahead(old: str, new: str) -> Edit:
    """An edit of `ahead.py`."""
    return Edit("ahead", old, new)


FAULTS = (
    Fault(
        "ahead: rows that ended are read",
        "Until the host looks, a group goes on listening to answers that are over.",
        "4.6",
        AHEAD,
        ahead("layout.grid, attend, now.alive)", "layout.grid, attend)"),
    ),
    Fault(
        "ahead: end ids are not looked for",
        "A row says more after its end.",
        "4.6",
        AHEAD,
        ahead(".logical_and_(~ended)", ""),
    ),
    Fault(
        "ahead: limits are one too far",
        "A row says one token more than it was asked for, and is in the way of its group with it.",
        "4.6",
        AHEAD,
        ahead("now.steps < layout.limits", "now.steps <= layout.limits"),
    ),
    Fault(
        "ahead: all columns have the first one's luck",
        "The same seed gives another text the further rows run ahead.",
        "6.2",
        AHEAD,
        ahead("now.uniforms.index_select(0, now.column)", "now.uniforms"),
    ),
    Fault(
        "ahead: rows stand still",
        "Each token of a table takes the place of the one before.",
        "4.6",
        AHEAD,
        ahead("now.steps.add_(1)", "now.steps.add_(0)"),
    ),
    Fault(
        "ahead: places without a token are read",
        "Rows of one table that are not equally long are read with zeros between.",
        "4.6",
        AHEAD,
        ahead("hidden = (back < 0) | (back", "hidden = (back"),
    ),
    Fault(
        "ahead: windows do not move on",
        "Rows ahead read what the window has left behind.",
        "5.5",
        AHEAD,
        ahead("reach.clamp(max=window)", "reach"),
    ),
    Fault(
        "ahead: all rows draw by the first one's settings",
        "A request is answered at another's temperature.",
        "6.9",
        AHEAD,
        ahead(
            "sample_rows(now.logits, uniform, draws)",
            "sample_rows(now.logits, uniform, [(draws[0][0], None)])",
        ),
    ),
)
