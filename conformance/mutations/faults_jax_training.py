"""Faults of the JAX backend where training computes what rows share once, and logits in parts
(clauses 7.14 to 7.16), and of low-rank updates (5.10)."""

from mutations.fault import Edit, Fault

GRADIENTS = "shared_timesteps_change_no_gradient"
FORWARD = "shared_timesteps_change_no_forward_pass"


def jax(name: str, harm: str, clause: str, check: str, *edits: Edit) -> Fault:
    """Of JAX's training."""
    return Fault(f"jax: {name}", harm, clause, check, *edits, package="bridge_jax")


FAULTS = (
    jax(
        "what rows have alone reads no prompt",
        "Every response is learnt as if it had no question.",
        "7.14",
        FORWARD,
        Edit(
            "attention",
            "_attend(of_alone(q), own, before, window)",
            "_attend(of_alone(q), own, None, window)",
        ),
    ),
    jax(
        "windows end with the prompt",
        "A response reads all of its prompt, however far back.",
        "5.5",
        FORWARD,
        Edit(
            "attention",
            "mask = before.active[:, None, None] & (place - before.place[:, None, None] < window)",
            "mask = before.active[:, None, None] & (place >= before.place[:, None, None])",
        ),
    ),
    jax(
        "holes of a prompt are read",
        "Where nothing was fed, responses read what was left there.",
        "2.3",
        FORWARD,
        Edit("attention", "mask = before.active[:, None, None] & (", "mask = ("),
    ),
    jax(
        "a part of the softmax is counted by itself",
        "Prompt and response weigh as much, whatever is in them.",
        "5.4",
        FORWARD,
        Edit("attention", "total = sum(x.sum(-1, keepdims=True) for x in powers)", ""),
        Edit(
            "attention",
            "return [x / total for x in powers]",
            "return [x / x.sum(-1, keepdims=True) for x in powers]",
        ),
    ),
    jax(
        "shared cells count once in a mean",
        "The norm ratios of wide groups are those of their responses.",
        "3.9",
        FORWARD,
        Edit("block", "joined(self.shared * width,", "joined(self.shared * (width > 0),"),
    ),
    jax(
        "the last part of a loss is left out",
        "Nothing is learnt from the targets after the last whole part.",
        "7.15",
        GRADIENTS,
        Edit(
            "losses",
            "return jnp.asarray(self.real).any(-1).sum()",
            "return jnp.asarray(self.real).all(-1).sum()",
        ),
    ),
    jax(
        "a cell with several targets learns from the last one",
        "The end of a prompt learns from one response of its group.",
        "7.14",
        GRADIENTS,
        Edit("losses", "of_h.at[part.cells].add(", "of_h.at[part.cells].set("),
    ),
    jax(
        "temperature is left out of the gradient",
        "At another temperature than 1 steps are too long or too short.",
        "7.5",
        "loss_and_gradients_are_within_the_numerics_rule",
        Edit("losses", "scale = scale / temperature", "scale = scale / 1.0"),
    ),
    jax(
        "a head that is an embedding learns from one of the two",
        "Tied models learn as embeddings alone.",
        "7.3",
        GRADIENTS,
        Edit(
            "train",
            "{key: grads[key] + more for key, more in of_ends.items()}",
            "{\n        key: grads[key] + 0 * more for key, more in of_ends.items()\n    }",
        ),
    ),
    jax(
        "low-rank updates have no scale",
        "Whoever asks for another alpha gets the rank.",
        "5.10",
        "updates_are_added_to_the_hosts_maps",
        Edit("linear", "y = y + lora.scale * contract(", "y = y + contract("),
    ),
    jax(
        "decoders read the host without its updates",
        "What was learnt is never said.",
        "5.10",
        "updates_are_decoded_with",
        Edit("weights", "if module + DOWN in stacks:", "if False:"),
    ),
)
