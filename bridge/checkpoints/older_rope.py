"""Rope settings in the older spelling beside the newer one, for the form `mlx` (clause 9.10).

mlx-lm reads `rope_parameters`, which transformers 5 writes, in few of its models: the others would
silently rotate as if there were no settings; nor does it know what transformers takes for a missing
`original_max_position_embeddings`. What is added says of itself that it was, so that it goes away
again with the form: it repeats the type as `type`, and has `rope_theta` inside if, and only if, the
one outside was added too.
"""

from collections.abc import Mapping
from typing import Any

from bridge.config import DEFAULTS
from bridge.rope import LENGTH

THETA = 10000.0  # where nothing gives it (clause 5.7)


def with_older_rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A raw config that has `rope_theta` and `rope_scaling`, if it had `rope_parameters` alone."""
    newer = raw.get("rope_parameters")
    if not isinstance(newer, Mapping) or "rope_scaling" in raw:
        return dict(raw)
    older = _older(raw, newer)
    if "rope_theta" in raw:
        return {**raw, "rope_scaling": older}
    theta = newer.get("rope_theta", THETA)
    return {**raw, "rope_theta": theta, "rope_scaling": {**older, "rope_theta": theta}}


def without_older_rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A raw config without what `with_older_rope` added."""
    newer, older = raw.get("rope_parameters"), raw.get("rope_scaling")
    if not isinstance(newer, Mapping) or not isinstance(older, Mapping):
        return dict(raw)
    if _without_theta(older) != _older(raw, newer):
        return dict(raw)
    added = {"rope_scaling", "rope_theta"} if "rope_theta" in older else {"rope_scaling"}
    return {key: value for key, value in raw.items() if key not in added}


def _older(raw: Mapping[str, Any], newer: Mapping[str, Any]) -> dict[str, Any]:
    """The settings `newer` of a raw config as `rope_scaling`, but for theta."""
    kind = newer.get("rope_type") or newer.get("type") or "default"
    older = {**_without_theta(newer), "type": kind}
    if kind in ("llama3", "yarn") and older.get(LENGTH) is None:
        defaults = DEFAULTS.get(raw.get("model_type", ""), {})
        context = raw.get("max_position_embeddings") or defaults.get("max_position_embeddings")
        older[LENGTH] = raw.get(LENGTH) or context
    return older


def _without_theta(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != "rope_theta"}
