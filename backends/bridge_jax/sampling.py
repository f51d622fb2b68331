"""Drawing next tokens on the device (chapter 6), by the rule that the reference states.

Uniforms come in (`bridge.decoding.uniforms`), and all stays where the logits are. Temperature and
filters are data: changing them compiles nothing. Nothing is sorted: a filter keeps what is at or
above some value, which is found by halving the range of float32's bit patterns. Axes: R rows, V
vocabulary, padded with -inf.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from bridge.contract import Sampling
from bridge_jax.compiled import compiled

Array = jax.Array

LANES = 128  # V is a multiple of it
ONE = int(np.float32(1).view(np.int32))
MOST = 2**31 - 1
INFINITY = int(np.float32(np.inf).view(np.int32))


class Settings(NamedTuple):
    """How each row draws, of which numbers that filter nothing stand for None."""

    temperature: Float[Any, " R"]
    top_k: Int[Any, " R"]
    top_p: Float[Any, " R"]
    min_p: Float[Any, " R"]

    @classmethod
    def of(cls, sampling: Sampling | Sequence[Sampling], rows: int) -> "Settings":
        """On the host: of so many rows that draw alike, or of each its own (clause 6.9)."""
        each = [sampling] * rows if isinstance(sampling, Sampling) else sampling
        numbers = {one: _numbers(one) for one in dict.fromkeys(each)}
        columns = np.array([numbers[one] for one in each], np.float64).reshape(-1, 4).T
        with np.errstate(over="ignore"):  # what is beyond float32 is as good as infinite
            return cls(*(c.astype(t) for c, t in zip(columns, "fiff", strict=True)))


def _numbers(sampling: Sampling) -> tuple[float, int, float, float]:
    # Only 0 is 0 (clause 6.8): what float32 rounds or flushes to it is the least above.
    temperature = float(sampling.temperature)
    if temperature:
        temperature = max(temperature, float(jnp.finfo(jnp.float32).tiny))
    top_k = MOST if sampling.top_k is None else min(sampling.top_k, MOST)
    top_p = 1.0 if sampling.top_p is None else sampling.top_p
    min_p = 0.0 if sampling.min_p is None else sampling.min_p
    return temperature, top_k, top_p, min_p


@compiled()
def sample(
    logits: Float[Array, "R V"], table: Float[Array, "steps R"], line: int, settings: Settings
) -> Int[Array, " R"]:
    """One token a row: int32."""
    return draw(logits, table[line], settings)


def draw(
    logits: Float[Array, "R V"], uniform: Float[Array, " R"], settings: Settings
) -> Int[Array, " R"]:
    """One token a row, by its uniform and settings: int32."""
    greedy = settings.temperature == 0
    # Clause 6.8; argmax takes the first of equals.
    likeliest = jnp.argmax(logits, -1).astype(jnp.int32)

    def by_luck() -> Array:
        return inverse(weights(logits, settings), uniform).astype(jnp.int32)

    return jnp.where(greedy, likeliest, jax.lax.cond(greedy.all(), lambda: likeliest, by_luck))


def weights(logits: Float[Array, "R V"], settings: Settings) -> Float[Array, "R V"]:
    """Unnormalised weights of the kept tokens, 0 elsewhere (clauses 6.3 to 6.6)."""
    temperature, top_k, top_p, min_p = (x[:, None] for x in settings)
    z = logits - logits.max(-1, keepdims=True)
    w = jnp.exp(z / temperature)  # of a greedy row it is not read
    # Below the largest logit by how much: not negative, so its bits are in its order.
    below, V = _bits(jnp.abs(z)), z.shape[-1]
    kth = smallest(
        lambda bits: (below <= bits).sum(-1, keepdims=True) >= top_k, INFINITY, top_k < V
    )
    w = jnp.where(below <= kth, w, 0)
    share = top_p * _sum(w)
    floor = smallest(lambda bits: _sum(jnp.where(_bits(w) > bits, w, 0)) < share, ONE, top_p < 1)
    # Where nothing is filtered all stay.
    w = jnp.where((_bits(w) >= floor) | (top_p >= 1), w, 0)
    return jnp.where(w >= min_p, w, 0)  # the largest weight is 1


def smallest(
    holds: Callable[[Array], Array], end: int, wanted: Bool[Array, "R one"]
) -> Int[Array, "R one"]:
    """By row, the smallest bits in 0..end where `holds`, which must hold at `end` and from its
    first place on; `end` itself unless `wanted`. Nothing is computed where no row wants it."""
    low = jnp.full(wanted.shape, -1, jnp.int32)

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        inside = holds(middle)
        return jnp.where(inside, low, middle), jnp.where(inside, middle, high)

    halvings = jnp.where(wanted.any(), (end + 1).bit_length(), 0)
    high = jax.lax.fori_loop(0, halvings, halve, (low, jnp.full_like(low, end)))[1]
    return jnp.where(wanted, high, end)


def inverse(w: Float[Array, "R V"], uniform: Float[Array, " R"]) -> Int[Array, " R"]:
    """Clause 6.7: the lowest id whose cumulative weight is above `uniform` times the total. First
    the run of `LANES` ids is found in which it lies, then the id in it."""
    R, V = w.shape
    runs = w.reshape(R, V // LANES, LANES)
    of_run = runs.sum(-1)
    up_to = jnp.cumsum(of_run, -1)
    total = up_to[:, -1:]
    # The product may round up to the total, above which no token would be left.
    threshold = jnp.minimum(uniform[:, None] * total, jnp.nextafter(total, jnp.zeros_like(total)))
    run = _first(up_to > threshold, of_run > 0)[:, None]
    before = jnp.take_along_axis(jnp.pad(up_to, ((0, 0), (1, 0))), run, 1)
    ours = jnp.take_along_axis(runs, run[..., None], 1)[:, 0]
    return run[:, 0] * LANES + _first(before + jnp.cumsum(ours, -1) > threshold, ours > 0)


def _first(above: Bool[Array, "R n"], weighs: Bool[Array, "R n"]) -> Int[Array, " R"]:
    """The first place that is above and has weight; where there is none, the last with weight."""
    above = above & weighs
    last = above.shape[-1] - 1 - jnp.argmax(weighs[:, ::-1], -1)
    return jnp.where(above.any(-1), jnp.argmax(above, -1), jnp.where(weighs.any(-1), last, 0))


def _bits(x: Float[Array, "R V"]) -> Int[Array, "R V"]:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _sum(w: Float[Array, "R V"]) -> Float[Array, "R one"]:
    """Over the vocabulary, many lanes at once."""
    return w.reshape(len(w), -1, LANES).sum(1).sum(-1, keepdims=True)
