"""Faults of sampling where its options end (chapter 6): near 0, at 1, at a sum, at the whole
vocabulary."""

from mutations.fault import Edit, Fault

ENDS = "samplings_hold_at_their_ends"
PACKAGES = ("bridge_torch", "bridge_jax", "bridge_mlx")
# What each fault changes in `sampling.py` of torch, JAX and MLX.
EDITS: dict[tuple[str, str, str], tuple[tuple[tuple[str, str], ...], ...]] = {
    (
        "temperatures below a thousandth are a thousandth",
        "What is asked to be all but greedy is not.",
        "6.3",
    ): (
        (("sampling.temperature, torch.finfo(z.dtype).tiny", "sampling.temperature, 1e-3"),),
        (("z / temperature)", "z / jnp.maximum(temperature, 1e-3))"),),
        (("sampling.temperature, float(np.finfo(np.float32).tiny)", "sampling.temperature, 1e-3"),),
    ),
    (
        "temperatures near 0 are 0",
        "Of equal tokens only the first is ever drawn.",
        "6.8",
    ): (
        (("if sampling.temperature == 0:", "if sampling.temperature < 1e-5:"),),
        (("greedy = settings.temperature == 0", "greedy = settings.temperature < 1e-5"),),
        (("if sampling.temperature == 0:", "if sampling.temperature < 1e-5:"),),
    ),
    (
        "top-p keeps what begins at the sum",
        "A nucleus of exactly top-p has one token too many.",
        "6.5",
    ): (
        (("(before < top_p)", "(before <= top_p)"),),
        (("w, 0)) < share", "w, 0)) <= share"),),
        (("mx.sum(before < top_p", "mx.sum(before <= top_p"),),
    ),
    (
        "min-p of 1 is greedy",
        "Of equal tokens only the first is ever drawn.",
        "6.6",
    ): (
        (
            (
                "if sampling.temperature == 0:",
                "if sampling.temperature == 0 or sampling.min_p == 1:",
            ),
        ),
        (
            (
                "greedy = settings.temperature == 0",
                "greedy = (settings.temperature == 0) | (settings.min_p >= 1)",
            ),
        ),
        (
            (
                "if sampling.temperature == 0:",
                "if sampling.temperature == 0 or sampling.min_p == 1:",
            ),
        ),
    ),
    (
        "min-p cuts what meets it",
        "A min-p of 1 leaves no token at all.",
        "6.6",
    ): (
        (("w < sampling.min_p", "w <= sampling.min_p"),),
        (("w >= min_p", "w > min_p"),),
        (("w < sampling.min_p", "w <= sampling.min_p"),),
    ),
    (
        "top-k of the vocabulary leaves one out",
        "The least likely token can never be drawn.",
        "6.4",
    ): (
        (
            (" and sampling.top_k < z.shape[-1]:", ":"),
            ("z.topk(sampling.top_k, s", "z.topk(min(sampling.top_k, z.shape[-1] - 1), s"),
        ),
        (
            (
                "below, V = _bits(jnp.abs(z)), z.shape[-1]",
                "below, V = _bits(jnp.abs(z)), z.shape[-1]\n"
                "    top_k = top_k - (top_k == jnp.isfinite(z[0]).sum())",
            ),
        ),
        (
            (" and sampling.top_k < w.shape[-1]:", ":"),
            ("mx.topk(z, sampling.top_k,", "mx.topk(z, min(sampling.top_k, z.shape[-1] - 1),"),
        ),
    ),
    (
        "top-k of 1 is greedy",
        "Of equal tokens only the first is ever drawn.",
        "6.4",
    ): (
        (
            (
                "if sampling.temperature == 0:",
                "if sampling.temperature == 0 or sampling.top_k == 1:",
            ),
        ),
        (
            (
                "greedy = settings.temperature == 0",
                "greedy = (settings.temperature == 0) | (settings.top_k == 1)",
            ),
        ),
        (
            (
                "if sampling.temperature == 0:",
                "if sampling.temperature == 0 or sampling.top_k == 1:",
            ),
        ),
    ),
    (
        "what float32 rounds to 0 is temperature 0",
        "Of equal tokens only the first is ever drawn.",
        "6.8",
    ): (
        (("if sampling.temperature == 0:", "if np.float32(sampling.temperature) == 0:"),),
        (("    if temperature:\n", "    if False:\n"),),
        (("if sampling.temperature == 0:", "if np.float32(sampling.temperature) == 0:"),),
    ),
}


def _named(package: str, name: str) -> str:
    short = package.removeprefix("bridge_")
    return name if short == "torch" else f"{short}: {name}"


FAULTS = tuple(
    Fault(
        _named(package, name),
        harm,
        clause,
        ENDS,
        *(Edit("sampling", old, new) for old, new in edits),
        package=package,
    )
    for (name, harm, clause), of_each in EDITS.items()
    for package, edits in zip(PACKAGES, of_each, strict=True)
)
