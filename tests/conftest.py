"""Hypothesis profiles: `ci`, bounded and the same on every run, and `thorough`, which explores.

HYPOTHESIS_PROFILE or pytest's own --hypothesis-profile chooses; the latter wins.
"""

import os

from hypothesis import HealthCheck, settings

# Drawing a model takes many small choices, which the health checks take for a slow strategy.
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "ci", max_examples=20, derandomize=True, deadline=None, suppress_health_check=QUIET
)
settings.register_profile("thorough", max_examples=300, deadline=None, suppress_health_check=QUIET)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
