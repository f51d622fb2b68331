"""How weights are quantised, as a config says it: MLX's affine quantisation (clause 9.11)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bridge.errors import BridgeError, one_line, show

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
UNSAID = {"bits": 4, "group_size": 64}  # what MLX takes where it is told nothing


@dataclass(frozen=True)
class Quantization:
    """How a weight is quantised, or most weights of a checkpoint."""

    bits: int
    group_size: int

    def to_json(self) -> dict[str, Any]:
        """The `quantization` object of a config.json, as mlx-lm writes it."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": "affine"}

    def check(self, where: str) -> None:
        """Raise BridgeError, beginning with `where`, for bits or a group size that MLX lacks."""
        for name, known in (("bits", BITS), ("group_size", GROUP_SIZES)):
            if (value := getattr(self, name)) not in known:
                raise BridgeError(f"{where}: {name} {show(value)} is not one of {known}")


def parse_quantization(raw: Mapping[str, Any], source: str = "config.json") -> Quantization | None:
    """What a config says of its quantised weights; None where it says nothing.

    Settings of single layers, which mlx-lm may add by their path, say what a reader tells from the
    tensors themselves; there a key may be missing. A null, as mlx-lm's recipes write, is MLX's own
    default. Raises BridgeError, naming the key, for another mode than affine, for bits or a group
    size that MLX lacks, and for another program's quantisation.
    """
    said = {k: raw[k] for k in ("quantization", "quantization_config") if raw.get(k) is not None}
    parsed: set[Quantization] = set()
    for key, value in said.items():
        where = f"{source}: {key}"
        if not isinstance(value, Mapping):
            raise BridgeError(f"{where} must be an object, not {show(value)}")
        if "quant_method" in value:
            raise BridgeError(
                f"{where}.quant_method {show(value['quant_method'])} is not supported; use the "
                "checkpoint before it was quantised"
            )
        settings = {path: s for path, s in value.items() if isinstance(s, Mapping)}
        own = {k: v for k, v in value.items() if k not in settings and not isinstance(v, bool)}
        for path, each in {"": own, **settings}.items():
            each = {**UNSAID, **each} if path else each
            found = _parse_one(each, f"{where}.{one_line(path)}" if path else where)
            parsed |= set() if path else {found}
    if len(parsed) > 1:
        raise BridgeError(f"{source}: quantization and quantization_config disagree; keep one")
    return parsed.pop() if parsed else None


def _parse_one(settings: Mapping[str, Any], where: str) -> Quantization:
    if settings.get("mode") not in (None, "affine"):
        raise BridgeError(f"{where}.mode {show(settings['mode'])} is not supported; only affine is")
    if unknown := sorted(settings.keys() - {"bits", "group_size", "mode"}):
        raise BridgeError(f"{where}.{one_line(unknown[0])} is not known")
    if missing := sorted(UNSAID.keys() - settings.keys()):
        raise BridgeError(f"{where}.{missing[0]} is missing; mlx-lm needs it too")
    said = {key: UNSAID[key] if settings[key] is None else settings[key] for key in UNSAID}
    for key, value in said.items():
        if type(value) is not int:
            raise BridgeError(f"{where}.{key} must be an integer, not {show(value)}")
    how = Quantization(**said)
    how.check(where)
    return how
