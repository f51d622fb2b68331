"""Advantages from rewards (clause 7.6), in float64. It knows rewards and groups alone."""

import numpy as np
from jaxtyping import Float, Int


def group_advantages(
    rewards: Float[np.ndarray, " B"], groups: Int[np.ndarray, " B"], normalise_std: bool = True
) -> Float[np.ndarray, " B"]:
    """`A = (r - mean r) / std r` over each group, std of the population, nothing added to it.

    A group of equal rewards gets exactly 0. `normalise_std=False` leaves the division out
    (Dr. GRPO).
    """
    rewards = np.asarray(rewards, np.float64)
    advantages = np.zeros_like(rewards)
    for group in np.unique(groups):
        rows = groups == group
        r = rewards[rows]
        if r.min() == r.max():
            continue
        centred = r - r.mean()
        advantages[rows] = centred / r.std() if normalise_std else centred
    return advantages
