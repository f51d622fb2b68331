"""Faults of decoders that draw whole tables on their device (clauses 4.5 to 4.7): MLX's, which has
all rows write at one slot, and JAX's, whose table is one compiled loop."""

from mutations.fault import Edit, Fault
from mutations.faults_ahead import AHEAD, BACK
from mutations.faults_coming import COMES, HELD


def mlx(name: str, harm: str, clause: str, check: str, module: str, old: str, new: str) -> Fault:
    """Of MLX's decoder, which evaluates a table of steps at once."""
    edit = Edit(module, old, new)
    return Fault(f"mlx: {name}", harm, clause, check, edit, package="bridge_mlx")


def jax(name: str, harm: str, clause: str, check: str, module: str, old: str, new: str) -> Fault:
    """Of JAX's decoder."""
    edit = Edit(module, old, new)
    return Fault(f"jax: {name}", harm, clause, check, edit, package="bridge_jax")


MLX = (
    mlx(
        "rows that ended are there until somebody looks",
        "A group goes on reading a row that has finished.",
        "2.3",
        AHEAD,
        "decode",
        "active = None if alive is None else cache.computed(alive)[:, None]",
        "active = None",
    ),
    mlx(
        "a row that ended is awake again a timestep later",
        "It goes on from its last token, which nobody was to read.",
        "4.6",
        AHEAD,
        "decode",
        "alive = ~ended if alive is None else alive & ~ended",
        "alive = ~ended",
    ),
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
        "limits are known a timestep late",
        "A row says one token more than it may.",
        "4.6",
        AHEAD,
        "decode",
        "rows.left < step)",
        "rows.left < step - 1)",
    ),
    mlx(
        "all columns are drawn by the luck of the first",
        "Rows repeat themselves for as long as nobody looks.",
        "6.2",
        AHEAD,
        "decode",
        "table[line + step]",
        "table[line]",
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
        "all groups go back as far as the one that goes least",
        "A text that was cut off at its stop is remembered.",
        "4.7",
        BACK,
        "cache",
        "self.rows = self.rows.fed(-timesteps)",
        "self.rows = self.rows.fed(-common)",
    ),
    mlx(
        "groups that go back further than others do not move",
        "They read what they took back in place of what they said before.",
        "4.7",
        BACK,
        "cache",
        "x[places, :, later : self.clock] = y",
        "pass",
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
    mlx(
        "slots from before a row came are read",
        "New answers begin with as many zeros as others have said tokens.",
        "4.5",
        COMES,
        "cache",
        "_from(own[self._row_at], t0, end),",
        "None,",
    ),
    mlx(
        "prompts do not move to the end of longer places",
        "A long prompt that comes puts zeros behind those that are there.",
        "4.5",
        COMES,
        "cache",
        "[(0, 0), (0, 0), (more, 0), (0, 0)]",
        "[(0, 0), (0, 0), (0, more), (0, 0)]",
    ),
    mlx(
        "positions are counted from whoever came first",
        "A new answer is read as if it were an old one.",
        "2.4",
        COMES,
        "cache",
        "return self.rows.positions[self._row_at]",
        "return (self.rows.lengths[self.rows.group] + self.clock + self.lead)[self._row_at]",
    ),
)

JAX = (
    jax(
        "rows that ended are there until somebody looks",
        "A group goes on reading a row that has finished.",
        "2.3",
        AHEAD,
        "steps",
        "table, tokens, alive, places, fed, config)",
        "table, tokens, jnp.asarray(places.alive), places, fed, config)",
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
        "limits are known a timestep late",
        "A row says one token more than it may.",
        "4.6",
        AHEAD,
        "steps",
        "(jnp.asarray(places.left) > fed)",
        "(jnp.asarray(places.left) >= fed)",
    ),
    jax(
        "all columns but the first are drawn by one luck",
        "Rows repeat themselves for as long as nobody looks.",
        "6.2",
        AHEAD,
        "steps",
        "draws.table[draws.line + 1 + fed]",
        "draws.table[draws.line + 1]",
    ),
    jax(
        "steps are not taken back",
        "A text that was cut off at its stop is remembered.",
        "4.7",
        BACK,
        "decode",
        "rows.fed(-back).keep(stay)",
        "rows.keep(stay)",
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
    jax(
        "places that are used again are not cleared",
        "One answer that broke down breaks all that come after it.",
        "4.5",
        HELD,
        "decode",
        "        if before:\n            coming =",
        "        if False:\n            coming =",
    ),
)

FAULTS = (*MLX, *JAX)
