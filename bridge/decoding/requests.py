"""What an engine is asked for: a prompt as ids, how many rows answer it, how they draw and end.

Also what makes such settings of a user's options, and refuses those out of range.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from bridge.contract import Sampling
from bridge.decoding.inputs import check_context
from bridge.decoding.stops import NO_STOPS, Stops
from bridge.numbers.ranges import take


@dataclass(frozen=True)
class Request:
    """One prompt, and the group that is to answer it."""

    text: str  # that the ids came from, for whoever reads the answers
    tokens: list[int]
    width: int
    prompt_id: int  # its number in the sampling counter (clause 6.2)
    max_new_tokens: int
    sampling: Sampling
    eos_ids: frozenset[int] = frozenset()
    stop: Stops = NO_STOPS

    @cached_property
    def ends(self) -> frozenset[int]:
        """Tokens that end a row of it."""
        return self.eos_ids | self.stop.ids


def row_length(asked: int | None, prompts: Mapping[str, int], context: int) -> int:
    """How many tokens rows get: as asked, else 256, or what the longest prompt leaves of the
    context. `prompts`: tokens of each, by what to call it. Raises BridgeError for a length below 1,
    and for a prompt that it takes past the context (clause 4.4)."""
    longest = max(prompts, key=lambda name: prompts[name], default="")
    tokens = prompts.get(longest, 0)
    length = min(256, max(1, context - tokens)) if asked is None else take("max_new_tokens", asked)
    check_context(longest, tokens, length, context)
    return length


def check_sampling(
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    seed: int,
) -> Sampling:
    """A Sampling whose numbers are in range; BridgeError names the one that is not."""
    return Sampling(
        take("temperature", temperature),
        None if top_k is None else take("top_k", top_k),
        None if top_p is None else take("top_p", top_p),
        None if min_p is None else take("min_p", min_p),
        take("seed", seed),
    )
