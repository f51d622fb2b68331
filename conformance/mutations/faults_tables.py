"""Faults of decoders that draw whole tables on their device (clauses 4.5 to 4.7), beside those of
`faults_mlx` and `faults_jax`: MLX's has all rows write at one slot, JAX's table is one loop."""

from mutations.fault import Edit, Fault
from mutations.faults_ahead import AHEAD, BACK
from mutations.faults_coming import COMES


def mlx(name: str, harm: str, clause: str, check: str, module: str, old: str, new: str) -> Fault:
    """Of MLX's decoder, which evaluates a table of steps at once."""
    edit = Edit(module, old, new)
    return Fault(f"mlx: {name}", harm, clause, check, edit, package="bridge_mlx")


def jax(name: str, harm: str, clause: str, check: str, module: str, old: str, new: str) -> Fault:
    """Of JAX's decoder."""
    edit = Edit(module, old, new)
    return Fault(f"jax: {name}", harm, clause, check, edit, package="bridge_jax")


FAULTS = (
    mlx(
        "of the end ids one is known",
        "Models with several EOS tokens talk on after the others.",
        "4.6",
        AHEAD,
        "decode",
        "mx.any(tokens[:, None] == mx.array(sorted(ends)), axis=1)",
        "tokens == max(ends)",
    ),
    mlx(
        "what was fed ahead is not kept",
        "Every fourth token a row forgets the three before it.",
        "4.6",
        AHEAD,
        "cache",
        "x[:, :, now] = y[:, :, : self.lead]",
        "x[:, :, now] = 0 * y[:, :, : self.lead]",
    ),
    mlx(
        "only keys move as a group goes back",
        "It looks for what it said, and finds what it took back.",
        "4.7",
        BACK,
        "cache",
        "zip(pair, moved, strict=True)",
        "zip(pair[:1], moved[:1], strict=True)",
    ),
    jax(
        "a row that ended is awake again a timestep later",
        "It goes on from its last token, which nobody was to read.",
        "4.6",
        AHEAD,
        "steps",
        "return alive & ~ended &",
        "return jnp.asarray(places.alive) & ~ended &",
    ),
    jax(
        "all rows are at the step of the first",
        "A new answer is read as if it were an old one.",
        "4.5",
        COMES,
        "steps",
        "steps = places.steps + fed",
        "steps = 0 * places.steps + places.steps[0] + fed",
    ),
)
