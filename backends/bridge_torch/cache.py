"""What a decoder remembers: keys and values, of prompts and of rows' own timesteps (chapter 4).

A prompt's are shared by the rows of its group; a row's own begin with its first timestep. Groups
come (4.5), rows leave (4.3) and go back (4.7). `PaddedCache` has one tensor for all rows, for steps
that are tensor operations; `RaggedCache` has one a row, which comes and goes with it, for steps
that are told where each lies. The Bridge block has no cache: it reads the rows that are left.

Axes: L layers, G prompts, P prefix slots, R rows left, T own timesteps, K key heads, d head width.
"""

from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridge.config import ModelConfig
from bridge.decoding.rows import Rows, lost_to_window
from bridge_torch.block import Grid
from bridge_torch.shared_prefix import Readers


class Cache(Protocol):
    """What a `Decoder` asks of either."""

    rows: Rows  # that are left

    @classmethod
    def empty(cls, config: ModelConfig, like: Tensor) -> Self:
        """Without rows, for a model whose tensors are `like` this one."""
        ...

    def joined(self, rows: Rows) -> tuple[Self, list[Float[Tensor, "L two K P d"]]]:
        """This cache with room for rows that come, which is to go on in its place, and where the
        keys and values of each of their prompts go."""
        ...

    def keep(self, kept: Int[np.ndarray, " kept"]) -> None:
        """Only the rows at these places, ascending, stay; prompts without rows go too."""
        ...

    def back(self, steps: Int[np.ndarray, " R"]) -> None:
        """The last so many timesteps of each row were never fed."""
        ...


class Reach(NamedTuple):
    """What the present timestep may read: the prefix from slot `p0` on, own timesteps from `t0` to
    `end`. `hidden`: which of those places are not to be read; of the last ones nothing is said
    where it is shorter. None: all are."""

    p0: int
    t0: int
    end: int
    hidden: Bool[Tensor, "G S"] | None


class PaddedCache:
    """Rows in tensors as long as the longest. Prompts end at the last slot, own timesteps begin
    with the first. Places without a number that is somebody's hold 0, not NaN."""

    def __init__(
        self,
        prefix: Float[Tensor, "L two prompts K P d"],  # of G prompts, the first ones
        own: Float[Tensor, "L two rows K T d"],  # of R rows, the first ones
        rows: Rows,
    ) -> None:
        self.prefix, self.own, self.rows = prefix, own, rows
        self._lay_out()

    @classmethod
    def empty(cls, config: ModelConfig, like: Tensor) -> "PaddedCache":
        L, K, d = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        nothing = like.new_zeros(L, 2, 0, K, 0, d)
        return cls(nothing, nothing, Rows.none())

    def _lay_out(self) -> None:
        """What stays the same for as long as the same rows are left."""
        device, lengths, P = self.prefix.device, self.rows.lengths, self.prefix.shape[4]
        self.grid = Grid.of(self.rows.group, device)
        self._readers: Readers | None = None
        self.first_rows = np.searchsorted(self.rows.group, np.arange(len(lengths)))
        self.padding: Bool[Tensor, "G P"] | None = None  # None: prompts are equally long
        if len(lengths) and lengths.min() < lengths.max():
            self.padding = torch.from_numpy(np.arange(P) < P - lengths[:, None]).to(device)

    def joined(self, rows: Rows) -> tuple["PaddedCache", list[Float[Tensor, "L two K P d"]]]:
        G, R = len(self.rows.lengths), len(self.rows)
        both = self.rows.joined(rows)
        prefix = _roomy(self.prefix, G, len(both.lengths), int(both.lengths.max()), at_end=True)
        own = _roomy(self.own, R, len(both), int(both.limits.max(initial=1)), at_end=False)
        P = prefix.shape[4]
        places = [prefix[:, :, G + g, :, P - length :] for g, length in enumerate(rows.lengths)]
        return PaddedCache(prefix, own, both), places

    def keep(self, kept: Int[np.ndarray, " kept"]) -> None:
        steps = self.rows.steps
        for new, old in enumerate(kept):
            if new != old:
                step = steps[old]
                self.own[:, :, new, :, :step] = self.own[:, :, old, :, :step]
                self.own[:, :, new, :, step : steps[new]] = 0
        self.rows, prompts = self.rows.keep(kept).compact()
        for new, old in enumerate(prompts):
            if new != old:
                self.prefix[:, :, new] = self.prefix[:, :, old]
        self._lay_out()

    def back(self, steps: Int[np.ndarray, " R"]) -> None:
        ends = self.rows.steps
        for row in np.flatnonzero(steps):
            self.own[:, :, row, :, ends[row] - steps[row] : ends[row]] = 0
        self.rows = self.rows.fed(-steps)

    def put(
        self, i: int, k: Float[Tensor, "R K d"], v: Float[Tensor, "R K d"], at: int | Tensor
    ) -> None:
        """Layer i's keys and values of the present timestep; `at`: which it is, of all rows or of
        each."""
        own, rows = self.own[i], len(k)
        if isinstance(at, int):
            own[0, :rows, :, at], own[1, :rows, :, at] = k, v
        else:
            row = torch.arange(rows, device=at.device)
            own[0][row, :, at], own[1][row, :, at] = k, v

    @property
    def readers(self) -> Readers:
        """Which rows read which prompt, on the device."""
        if self._readers is None:
            self._readers = Readers.of(self.rows, self.prefix.device)
        return self._readers

    def reach(self, window: int | None) -> Reach:
        """Of all rows, at their present timesteps."""
        rows, P = self.rows, self.prefix.shape[4]
        longest, T = P - int(rows.lengths.max()), int(rows.steps.max()) + 1
        if rows.in_step:
            p0, t0 = lost_to_window(window, P, T)
            p0 = max(p0, longest)
            return Reach(p0, t0, T, None if self.padding is None else self.padding[:, p0:])
        steps = rows.steps[self.first_rows][:, None]
        back = steps - np.arange(-P, T)  # how far before the present each place stands
        reach = rows.lengths[:, None] + steps + 1
        hidden = (back < 0) | (back >= (reach if window is None else np.minimum(reach, window)))
        p0 = longest + int(np.argmin(hidden[:, longest:P].all(0))) if longest < P else P
        return Reach(p0, 0, T, torch.from_numpy(hidden[:, p0:]).to(self.prefix.device))


def _roomy(cache: Tensor, used: int, count: int, length: int, at_end: bool) -> Tensor:
    """A cache with places for `count`, of which `used` are taken, each of a `length`. In one that
    has them the new places are cleared: whose they were may have left NaN."""
    L, two, there, K, slots, d = cache.shape
    if there >= count and slots >= length:
        cache[:, :, used:count] = 0
        return cache
    roomy = cache.new_zeros(L, two, max(there, count), K, max(slots, length), d)
    taken = slice(-slots, None) if at_end else slice(slots)
    if used and slots:
        roomy[:, :, :used, :, taken] = cache[:, :, :used]
    return roomy


class RaggedCache:
    """Tensors of each row, no longer than it needs. A prompt's is that of all rows of its group."""

    def __init__(
        self,
        like: Float[Tensor, "L two K zero d"],
        prefixes: list[Float[Tensor, "L two K P d"]],  # one a row
        own: list[Float[Tensor, "L two K T d"]],  # one a row
        rows: Rows,
    ) -> None:
        self.like, self.prefixes, self.own, self.rows = like, prefixes, own, rows
        self.prepared: Any = None  # a step's own, for as long as the same rows are left

    @classmethod
    def empty(cls, config: ModelConfig, like: Tensor) -> "RaggedCache":
        L, K, d = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        return cls(like.new_empty(L, 2, K, 0, d), [], [], Rows.none())

    def joined(self, rows: Rows) -> tuple["RaggedCache", list[Float[Tensor, "L two K P d"]]]:
        L, two, K, _, d = self.like.shape

        def room(timesteps: int) -> Tensor:
            return self.like.new_empty(L, two, K, timesteps, d)

        places = [room(int(length)) for length in rows.lengths]
        prefixes = self.prefixes + [places[g] for g in rows.group]
        own = self.own + [room(int(limit)) for limit in rows.limits]
        return RaggedCache(self.like, prefixes, own, self.rows.joined(rows)), places

    def keep(self, kept: Int[np.ndarray, " kept"]) -> None:
        self.prefixes = [self.prefixes[row] for row in kept]
        self.own = [self.own[row] for row in kept]
        self.prepared = None
        self.rows, _ = self.rows.keep(kept).compact()

    def back(self, steps: Int[np.ndarray, " R"]) -> None:
        self.rows = self.rows.fed(-steps)
