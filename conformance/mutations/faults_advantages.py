"""Faults of advantages (clause 7.6), planted in the reference: the golden vectors catch them."""

from mutations.fault import Edit, Fault

ADVANTAGES = "golden vector 7.6-advantages"
STD = "apart.std()"


def losses(old: str, new: str) -> Edit:
    """An edit of the reference's `losses.py`."""
    return Edit("losses", old, new)


def fault(name: str, harm: str, kind: str, *edits: Edit) -> Fault:
    """One that the golden vector of this kind must catch."""
    return Fault(name, harm, "7.6", f"{ADVANTAGES}{kind}", *edits, package="bridge_ref")


FAULTS = (
    fault(
        "advantages without std",
        "Groups with large rewards outweigh all others.",
        "",
        losses("centred / apart.std() if normalise_std else unscaled", "unscaled"),
    ),
    fault(
        "advantages by the sample's std",
        "Small groups get smaller advantages.",
        "",
        losses(STD, "apart.std(ddof=1)"),
    ),
    fault(
        "advantages with an eps",
        "Advantages depend on the scale of rewards.",
        "",
        losses(STD, "(apart.std() + 1e-4)"),
    ),
    fault(
        "advantages that are only centred lose their scale",
        "Dr. GRPO without its one difference: every group counts alike.",
        "",
        losses("np.ldexp(centred * spread, exponent)", "centred"),
    ),
    fault(
        "rewards that differ by rounding are told apart",
        "0.3 and 0.1 + 0.2 are a full update in a random direction.",
        "-rounding",
        losses("spread <= EQUAL * np.abs(r).max()", "spread == 0"),
    ),
    fault(
        "equal rewards are told by float32's rounding",
        "Groups whose rewards differ in their eighth digit teach nothing.",
        "-rounding",
        losses("EQUAL = 2.0**-46", "EQUAL = 2.0**-20"),
    ),
    fault(
        "rewards closer than 1e-8 are equal",
        "Rewards of a small scale teach nothing, and nobody is told.",
        "-tiny",
        losses("spread <= EQUAL * np.abs(r).max()", "np.allclose(rewards[rows], rewards[rows][0])"),
    ),
    fault(
        "a spread is squared in its own units",
        "Tiny rewards give a division by 0, and huge ones advantages of 0.",
        "-tiny",
        losses("_, exponent = np.frexp(np.abs(rewards[rows]).max())", "exponent = np.int32(0)"),
        losses("apart = (r - r.min()) / spread", "spread, apart = 1, r - r.min()"),
    ),
    fault(
        "huge rewards leave the range",
        "A group with a reward of 1e300 and one of -1e300 has advantages of 0.",
        "-huge",
        losses("np.ldexp(rewards[rows], -exponent)", "np.ldexp(rewards[rows], max(0, -exponent))"),
        losses("apart = (r - r.min()) / spread", "spread, apart = 1, r - r.min()"),
    ),
    fault(
        "rewards in float32",
        "What a user scored in float64 is rounded before it is compared.",
        "-rounding",
        losses("rewards = np.asarray(rewards, np.float64)", "rewards = np.float32(rewards) + 0.0"),
    ),
    fault(
        "advantages are not centred",
        "Whatever a group did was right.",
        "",
        losses("centred = apart - apart.mean()", "centred = apart"),
    ),
)
