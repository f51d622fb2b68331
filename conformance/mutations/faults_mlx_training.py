"""Faults of training at real size on the MLX backend: what a group shares, logits in parts,
low-rank updates, tensors swapped (clauses 5.10, 6.10 and 7.14 to 7.16)."""

from mutations.fault import Edit, Fault

GRADIENT = "shared_timesteps_change_no_gradient"
FORWARD = "shared_timesteps_change_no_forward_pass"
PARTS = "logits_in_parts_make_the_same_update"
SWAP = "the_start_stands_in_for_what_was_learnt"
ADDED = "updates_are_added_to_the_hosts_maps"
DECODED = "updates_are_decoded_with"
NEXT = "next_log_probabilities_are_those_of_the_loss"


def fault(name: str, harm: str, clause: str, check: str, edit: Edit) -> Fault:
    """A fault of this backend."""
    return Fault(f"mlx: {name}", harm, clause, check, edit, package="bridge_mlx")


FAULTS = (
    fault(
        "what is shared learns from itself alone",
        "A prompt's keys and values never hear what its responses made of them.",
        "7.14",
        GRADIENT,
        Edit("cells", "wide = shared.astype(mx.float32)", "wide = mx.stop_gradient(shared)"),
    ),
    fault(
        "rows read the prompts in turn",
        "Where groups are ragged, a row answers another one's prompt.",
        "7.14",
        FORWARD,
        Edit("cells", "mx.take(wide, self.line,", "mx.take(wide, mx.sort(self.line),"),
    ),
    fault(
        "a shared cell counts once",
        "The norm ratios of short responses to long prompts are nearly those of the responses.",
        "7.14",
        FORWARD,
        Edit("cells", "np.repeat(np.bincount(line), P)", "np.ones(G * P)"),
    ),
    fault(
        "what rows have alone has no window",
        "A response reads all of a long prompt in every layer.",
        "7.14",
        FORWARD,
        Edit("cells", "if window is not None:", "if window is not None and K == S:"),
    ),
    fault(
        "positions are counted anew",
        "Positions that a batch gives are those of its columns.",
        "7.14",
        FORWARD,
        Edit("cells", "positions.ravel()[found]", "found % active.shape[1]"),
    ),
    fault(
        "the head learns from the last part",
        "Of a long batch the head sees the last few hundred targets.",
        "7.15",
        PARTS,
        Edit("losses", "{name: g + of_leaves", "{name: of_leaves"),
    ),
    fault(
        "metrics are those of the last part",
        "A loss that is logged is a small share of the loss.",
        "7.15",
        PARTS,
        Edit("losses", "metrics.get(name, 0) + x", "x"),
    ),
    fault(
        "updates are not scaled",
        "Alpha does nothing.",
        "5.10",
        ADDED,
        Edit("linear", "low * updates[0].scale", "low"),
    ),
    fault(
        "matrices have their updates unscaled",
        "A model says something else than what it was trained to.",
        "5.10",
        DECODED,
        Edit("linear", "self.scale * (up @ down)", "(up @ down)"),
    ),
    fault(
        "a swap gives what it took",
        "Once the reference was asked, the policy is its start for good.",
        "7.16",
        SWAP,
        Edit(
            "backend",
            "to_numpy(tensor) for name, tensor in own.items()",
            "taken[name] for name in own",
        ),
    ),
    fault(
        "next tokens have temperature 1",
        "The gap between sampling and training is one of temperatures.",
        "6.10",
        NEXT,
        Edit("decode", "(self.next_logits, ids, temperature)", "(self.next_logits, ids, 1.0)"),
    ),
)
