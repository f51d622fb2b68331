"""Rotary position settings: both Hugging Face spellings in, tables of cos and sin out.

They are computed on the host in float64, so that every backend starts from the same numbers. The
rope types are those the spec lists (clause 5.6); any other is refused by name.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from bridge.errors import BridgeError, show
from bridge.files.strict_json import among

LENGTH = "original_max_position_embeddings"
ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", LENGTH},
    "yarn": {
        "factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        LENGTH,
    },
}
# Settings that YaRN's own code and vLLM read and transformers does not, with the values under which
# all compute the same.
NEUTRAL: dict[str, dict[str, tuple[Any, ...]]] = {
    "yarn": {"attn_factor": (1,), "extrapolation_factor": (1,), "finetuned": (True, False)},
}
# No model is near these bounds; within them every frequency is a finite number.
LEAST, MOST = 1e-12, 1e18
REQUIRED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}


@dataclass(frozen=True)
class RopeConfig:
    """One rope setting. Keys keep Hugging Face's names; those of other types stay at None."""

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


def parse_rope(raw: Mapping[str, Any], max_position_embeddings: int, source: str) -> RopeConfig:
    """Read a config's `rope_parameters` (newer), or its `rope_theta` and `rope_scaling` (older).

    Both spellings are those of clause 5.7; `original_max_position_embeddings` may stand beside them
    too. Raises BridgeError for an unknown rope type, a missing
    or unknown key, a number out of range, and where both spellings are present and disagree.
    """
    newer, older = raw.get("rope_parameters"), raw.get("rope_scaling")
    theta = raw.get("rope_theta")
    if (beside := raw.get(LENGTH)) is not None:
        _check_value(LENGTH, beside, source)
    lengths = (beside, max_position_embeddings)
    parsed = []
    for field, settings in (("rope_parameters", newer), ("rope_scaling", older)):
        if settings is not None:
            if not isinstance(settings, Mapping):
                raise BridgeError(f"{source}: {field} must be an object, not {show(settings)}")
            parsed.append(_parse_one(settings, theta, lengths, f"{source}: {field}"))
    if not parsed:
        parsed = [_parse_one({}, theta, lengths, f"{source}: rope_theta")]
    if len(set(parsed)) > 1:
        raise BridgeError(
            f"{source}: rope_parameters and rope_scaling disagree; keep one of the two spellings"
        )
    if theta is not None:
        _check_value("rope_theta", theta, source)
    if newer is not None and theta is not None and parsed[0].rope_theta != theta:
        raise BridgeError(
            f"{source}: rope_theta {theta} disagrees with rope_parameters.rope_theta "
            f"{parsed[0].rope_theta}; keep one of the two"
        )
    return parsed[0]


def _parse_one(
    settings: Mapping[str, Any], theta: Any, lengths: tuple[int | None, int], where: str
) -> RopeConfig:
    """`lengths`: `original_max_position_embeddings` beside the settings, and the context."""
    given = {key: value for key, value in settings.items() if value is not None}
    if settings.get("truncate", True) is None:  # to transformers, false; to others, not said
        raise BridgeError(f"{where}: truncate must be true or false, not None")
    rope_type = given.pop("rope_type", None)
    legacy_type = given.pop("type", None)
    if rope_type is not None and legacy_type is not None and rope_type != legacy_type:
        raise BridgeError(
            f"{where}: rope_type {show(rope_type)} and type {show(legacy_type)} disagree"
        )
    rope_type = rope_type if rope_type is not None else legacy_type or "default"
    if not isinstance(rope_type, str) or rope_type not in ROPE_KEYS:
        known = ", ".join(ROPE_KEYS)
        raise BridgeError(f"{where}: rope type {show(rope_type)} is not supported (known: {known})")
    if not among(given.pop("partial_rotary_factor", 1), (1,)):
        raise BridgeError(f"{where}: partial_rotary_factor other than 1 is not supported")
    theta = given.pop("rope_theta", theta if theta is not None else 10000.0)
    _drop_neutral(given, rope_type, where)
    for key in given:
        if key not in ROPE_KEYS[rope_type]:
            raise BridgeError(f"{where}: unknown key {show(key)} for rope type {rope_type!r}")
    for key in REQUIRED.get(rope_type, ()):
        if key not in given:
            raise BridgeError(f"{where}: rope type {rope_type!r} needs {key!r}")
    for key, value in {"rope_theta": theta, **given}.items():
        _check_value(key, value, where)
    if rope_type in ("llama3", "yarn"):
        beside, context = lengths
        if beside is not None and given.setdefault(LENGTH, beside) != beside:
            raise BridgeError(
                f"{where}: {LENGTH} {given[LENGTH]} disagrees with {beside} outside; keep one"
            )
        given.setdefault(LENGTH, context)
    integers = ("truncate", LENGTH)
    numbers: dict[str, Any] = {k: v if k in integers else float(v) for k, v in given.items()}
    rope = RopeConfig(rope_type, float(theta), **numbers)
    if rope_type == "llama3" and not rope.low_freq_factor < rope.high_freq_factor:  # type: ignore[operator]
        raise BridgeError(f"{where}: low_freq_factor must be below high_freq_factor")
    if rope_type == "yarn" and rope.rope_theta <= 1:
        raise BridgeError(f"{where}: rope_theta must be above 1 for rope type 'yarn'")
    return rope


def _drop_neutral(given: dict[str, Any], rope_type: str, where: str) -> None:
    """Take out what says nothing, and refuse what transformers and others read differently."""
    for key, values in NEUTRAL.get(rope_type, {}).items():
        if key in given and not among(value := given.pop(key), values):
            mend = "remove it, or say the factor of cos and sin as attention_factor"
            raise BridgeError(
                f"{where}: {key} {show(value)} is not read by transformers, but by others; {mend}"
            )
    for key in ("mscale", "mscale_all_dim") if rope_type == "yarn" else ():
        if type(given.get(key)) in (int, float) and given[key] == 0:
            del given[key]  # to transformers as if it were not there


def _check_value(key: str, value: Any, where: str) -> None:
    if key == "truncate":
        kind, valid = "true or false", isinstance(value, bool)
    elif key == LENGTH:
        kind = "a positive integer"
        valid = type(value) is int and value > 0
    else:
        # Bounds first: JSON allows integers that no float holds.
        kind = "a positive number"
        valid = type(value) in (int, float) and 0 < value <= sys.float_info.max
    if valid and not isinstance(value, bool) and not LEAST <= value <= MOST:
        kind, valid = f"in {LEAST:g}..{MOST:g}", False
    if not valid:
        raise BridgeError(f"{where}: {key} must be {kind}, not {show(value)}")


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Inverse frequencies `[d / 2]` in float64, and the factor that multiplies cos and sin.

    Sources: linear, Chen et al. 2023 (arXiv 2306.15595); yarn, Peng et al. 2023
    (arXiv 2309.00071); llama3, as Llama 3.1 was released.
    """
    plain = 1.0 / rope.rope_theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.rope_type == "default":
        return plain, 1.0
    assert rope.factor is not None
    if rope.rope_type == "linear":
        return plain / rope.factor, 1.0
    if rope.rope_type == "llama3":
        return _llama3(rope, plain), 1.0
    return _yarn(rope, plain, head_dim)


def rotation_tables(
    rope: RopeConfig, head_dim: int, length: int
) -> Float[np.ndarray, "two length head_dim"]:
    """cos and sin for each position below `length` (clause 5.6), in float64, by which a head turns:

        turned = x * cos + (halves of x swapped) * sin

    where the sign of Hugging Face's `rotate_half` is in sin, and yarn's factor in both.
    """
    frequencies, factor = inverse_frequencies(rope, head_dim)
    angles = np.arange(length)[:, None] * frequencies
    cos, sin = np.cos(angles) * factor, np.sin(angles) * factor
    return np.stack([np.concatenate([cos, cos], -1), np.concatenate([-sin, sin], -1)])


def _llama3(rope: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    assert rope.factor and rope.low_freq_factor and rope.high_freq_factor
    assert rope.original_max_position_embeddings
    turns = rope.original_max_position_embeddings * plain / (2 * math.pi)
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return (1 - kept) * plain / rope.factor + kept * plain


def _yarn(rope: RopeConfig, plain: np.ndarray, head_dim: int) -> tuple[np.ndarray, float]:
    """A linear ramp between the dimensions that turn `beta_fast` and `beta_slow` times."""
    assert rope.factor and rope.original_max_position_embeddings

    def dimension_of(turns: float) -> float:
        length = rope.original_max_position_embeddings / (turns * 2 * math.pi)  # type: ignore[operator]
        return head_dim * math.log(length) / (2 * math.log(rope.rope_theta))

    low, high = dimension_of(rope.beta_fast or 32.0), dimension_of(rope.beta_slow or 1.0)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    stretched = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
    frequencies = stretched * plain / rope.factor + (1 - stretched) * plain

    def mscale(m: float) -> float:
        return 0.1 * m * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0  # type: ignore

    if rope.attention_factor is not None:
        return frequencies, rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return frequencies, mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return frequencies, mscale(1.0)
