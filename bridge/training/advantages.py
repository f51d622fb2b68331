"""Advantages from rewards (clause 7.6), in float64. It knows rewards and groups alone."""

import numpy as np
from jaxtyping import Float, Int

from bridge.errors import BridgeError
from bridge.tasks.rewards import equal, scaled


def group_advantages(
    rewards: Float[np.ndarray, " B"], groups: Int[np.ndarray, " B"], normalise_std: bool = True
) -> Float[np.ndarray, " B"]:
    """`A = (r - mean r) / std r` over each group, std of the population, nothing added to it.

    A group whose rewards are equal up to rounding gets exactly 0. `normalise_std=False` leaves the
    division out (Dr. GRPO). Rewards and their spread may be of any size. Raises BridgeError for a
    reward that is not finite.
    """
    rewards = np.asarray(rewards, np.float64)
    for row in np.flatnonzero(~np.isfinite(rewards)):
        raise BridgeError(
            f"reward {rewards[row]} of row {row} is not finite; mend the reward (clause 7.6)"
        )
    advantages = np.zeros_like(rewards)
    for group in np.unique(groups):
        rows = groups == group
        if equal(rewards[rows]):
            continue
        r, exponent = scaled(rewards[rows])
        spread = r.max() - r.min()
        apart = (r - r.min()) / spread  # in [0, 1]: squares of a tiny spread would vanish
        centred = apart - apart.mean()
        with np.errstate(over="ignore"):  # of rewards near its end
            unscaled = np.ldexp(centred * spread, exponent)
        advantages[rows] = centred / apart.std() if normalise_std else unscaled
    return advantages
