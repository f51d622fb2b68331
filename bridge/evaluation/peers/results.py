"""What a run asks for and finds, and what it comes to: medians, and JSON for machines."""

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from bridge.errors import BridgeError
from bridge.evaluation.peers.engine import Entry
from bridge.evaluation.peers.limit import Limit
from bridge.evaluation.peers.plan import Absent
from bridge.numbers.ranges import take

RANGES = {"new": "bench.new", "seconds": "bench.seconds"}  # where they are not called as here


@dataclass(frozen=True)
class Workload:
    """The sizes that are measured."""

    widths: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    new: int = 128  # tokens of each row
    prompt_tokens: int = 85
    rounds: int = 3
    seconds: float = 20.0  # of a call: one that would take longer is of fewer tokens
    threads: int = 1  # of each engine

    def check(self, context: int) -> None:
        """Raises BridgeError for a size that is out of its range or past the context."""
        for width in self.widths:
            take("width", width)
        for name, value in asdict(self).items():
            if name != "widths":
                take(RANGES.get(name, name), value)
        if self.prompt_tokens + self.new > context:
            raise BridgeError(f"prompt_tokens and new go past the context of {context}")


@dataclass(frozen=True)
class Seconds:
    """Of a call: until every row had its first token, and until it had its last."""

    first: float
    all: float


@dataclass
class Found:
    """What was measured of an entry, by width."""

    entry: Entry
    version: str
    likeliest: list[int] = field(default_factory=list)  # tokens after the prompt, of one row
    new: dict[int, int] = field(default_factory=dict)  # tokens of a row in each call
    seconds: dict[int, list[Seconds]] = field(default_factory=dict)  # of the calls
    left_out: dict[int, str] = field(default_factory=dict)  # and why

    def tokens_per_second(self, width: int) -> float | None:
        """Of decoding, by the median; None where nothing was measured, or nothing that a clock can
        tell from none."""
        decoding = [call.all - call.first for call in self.seconds.get(width, ())]
        if not decoding or (seconds := statistics.median(decoding)) <= 0:
            return None
        return width * (self.new[width] - 1) / seconds

    def first_token(self, width: int) -> float | None:
        """Seconds until every row has its first token, the median."""
        first = [call.first for call in self.seconds.get(width, ())]
        return statistics.median(first) if first else None

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "name": self.entry.name,
            "weights": self.entry.weights,
            "blocks": self.entry.blocks,
            "package": self.entry.package,
            "version": self.version,
            "likeliest": self.likeliest,
            "widths": {
                str(width): {
                    "tokens_per_second": self.tokens_per_second(width),
                    "first_token_seconds": self.first_token(width),
                    "new": self.new[width],
                    "seconds": [asdict(call) for call in calls],
                }
                for width, calls in self.seconds.items()
            },
            "left_out": {str(width): why for width, why in self.left_out.items()},
        }


@dataclass
class Results:
    """All of a run."""

    workload: Workload
    parameters: int  # of the host, that a step multiplies by
    absent: list[Absent]
    found: list[Found] = field(default_factory=list)
    failed: list[Absent] = field(default_factory=list)
    limit: Limit | None = None

    def bound(self, width: int) -> float | None:
        """Tokens a second that the machine allows the host with float32 weights."""
        return self.limit and self.limit.tokens_per_second(self.parameters, width)

    def doubts(self) -> dict[str, int]:
        """Engines that have the host in float32 and say other tokens than Bridge's host, with the
        number of tokens until they part: they may run another model than was meant."""
        hosts = [f for f in self.found if f.entry.weights == "float32" and not f.entry.blocks]
        ours = next((f.likeliest for f in hosts if f.entry.backend and f.likeliest), [])
        parting = {f.entry.label: _parting(ours, f.likeliest) for f in hosts}
        return {label: same for label, same in parting.items() if same is not None}

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        limit = None
        if self.limit is not None:
            bounds = {str(width): self.bound(width) for width in self.workload.widths}
            limit = {**asdict(self.limit), "float32_tokens_per_second": bounds}
        return {
            "workload": asdict(self.workload),
            "parameters": self.parameters,
            "limit": limit,
            "engines": [found.to_json() for found in self.found],
            "absent": [asdict(absent) for absent in self.absent],
            "failed": [asdict(failed) for failed in self.failed],
            "doubts": self.doubts(),
        }


def _parting(one: list[int], other: list[int]) -> int | None:
    """How many tokens two rows begin with alike; None where that is all of one."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), None)
