"""Several timesteps on the device before the host looks (clause 4.6).

A turn feeds every row what it drew last and draws again. Who has ended is known on the device
alone: such a row stays, inactive, until the host drops it, and what it still writes to the cache is
behind its end, where nothing reads. All that a turn changes, it changes in place, in tensors whose
shapes stay: so on CUDA one turn is captured as a graph, for a bucket of rows and groups, and
replayed for all that fit into it.

Axes: R rows, k columns, G prompts, V vocabulary.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridge.decoding.rows import GridPlan, Rows
from bridge.decoding.uniforms import STEPS
from bridge_torch import shared_prefix
from bridge_torch.block import Grid
from bridge_torch.cache import PaddedCache, Reach
from bridge_torch.packed import Packed
from bridge_torch.sampling import Draws, sample_rows
from bridge_torch.shared_prefix import Readers
from bridge_torch.step import Attend, ByKernels, ByProducts, forward

GRAPHS = 16  # that a decoder keeps


def serves(device: torch.device) -> bool:
    """Whether decoders there run ahead. A CPU would win nothing: it is its own host."""
    return device.type == "cuda"


@dataclass(frozen=True)
class Layout:
    """What is known of R rows for as long as the same ones are left."""

    lengths: Int[Tensor, " R"]  # tokens of each row's prompt
    limits: Int[Tensor, " R"]  # timesteps that each may be fed
    grid: Grid
    readers: Readers

    @classmethod
    def of(cls, rows: Rows, grid: Grid, readers: Readers) -> "Layout":
        """On the device of the readers."""
        device = readers.row.device
        lengths = torch.tensor(rows.lengths[rows.group], device=device)
        return cls(lengths, torch.tensor(rows.limits, device=device), grid, readers)


@dataclass(frozen=True)
class Running:
    """R rows under way: all that a turn changes."""

    tokens: Int[Tensor, " R"]  # what each is fed next; -1: nothing, it has ended
    alive: Bool[Tensor, " R"]  # has not
    steps: Int[Tensor, " R"]  # own timesteps that were fed
    logits: Float[Tensor, "R V"]
    drawn: Int[Tensor, "k R"]
    column: Int[Tensor, " one"]  # of `drawn`, to be filled next
    uniforms: Float[Tensor, "k R"]
    ends: Bool[Tensor, " V"]  # tokens that end a row


def turn(
    weights: Packed,
    cache: PaddedCache,
    layout: Layout,
    now: Running,
    draws: Draws,
    timesteps: int,
) -> None:
    """One timestep, and a draw from what it gives. No row has been fed `timesteps` or more."""
    # A row past its limit writes, again and again, what it would be fed last, were it to go back.
    at = torch.minimum(now.steps, (layout.limits - 1).clamp(min=0))
    positions, like = layout.lengths + at, weights.like
    rope = weights.rope(positions, cache.prefix.shape[4] + cache.own.shape[4], like.dtype)
    windows = {layer.window for layer in weights.layers}
    if shared_prefix.serves(like.device, like.dtype, weights.config.head_dim):
        attend: Attend = ByKernels.of(cache, layout.readers, at, timesteps, windows)
    else:
        reach = {window: reach_of(cache, layout, at, window, timesteps) for window in windows}
        attend = ByProducts(cache, layout.grid, at, reach)
    fed = now.tokens.clamp(min=0)
    now.logits.copy_(forward(weights, fed, rope, layout.grid, attend, now.alive))
    now.steps.add_(1)
    draw(layout, now, draws)


def draw(layout: Layout, now: Running, draws: Draws) -> None:
    """A column from the logits that are there; and who ends with it."""
    uniform = now.uniforms.index_select(0, now.column)[0]
    now.tokens.copy_(sample_rows(now.logits, uniform, draws).masked_fill(~now.alive, -1))
    now.drawn.index_copy_(0, now.column, now.tokens[None])
    now.column.add_(1)
    ended = now.ends[now.tokens.clamp(min=0)]
    now.alive.logical_and_(now.steps < layout.limits).logical_and_(~ended)


def reach_of(
    cache: PaddedCache,
    layout: Layout,
    at: Int[Tensor, " R"],
    window: int | None,
    timesteps: int,
) -> Reach:
    """What rows at timesteps `at` may read, without a look at where they are."""
    readers, P = layout.readers, cache.prefix.shape[4]
    p0 = P - readers.longest
    steps = at[readers.first.clamp(max=len(at) - 1)][:, None]
    back = steps - torch.arange(p0 - P, timesteps, device=at.device)
    reach = readers.lengths[:, None] + steps + 1
    hidden = (back < 0) | (back >= (reach if window is None else reach.clamp(max=window)))
    return Reach(p0, 0, timesteps, hidden)


class Ahead:
    """Runs a decoder's rows ahead. `captures`: by graphs, of which it keeps those that it has."""

    def __init__(self, weights: Packed, captures: bool) -> None:
        self.weights, self.captures = weights, captures
        self.graphs: OrderedDict[Any, Captured] = OrderedDict()
        self.cached: Any = None  # where the cache is that they read

    def __call__(
        self,
        cache: PaddedCache,
        draws: Draws,
        uniforms: Float[Tensor, "k R"],
        ends: Collection[int],
        logits: Float[Tensor, "R V"],
        fed: Int[Tensor, " R"] | None = None,
    ) -> tuple[Int[Tensor, "k R"], Float[Tensor, "R V"]]:
        """What rows draw, -1 after their ends, and the logits that they end with. They begin with a
        draw from `logits`, or with a timestep at which they are `fed`. The cache is as if all were
        fed to the end; its `rows` are left to the caller."""
        R, k = len(cache.rows), len(uniforms)
        turns = k - 1 if fed is None else k
        if not self.captures:
            layout = Layout.of(cache.rows, cache.grid, cache.readers)
            timesteps = min(int(cache.rows.steps.max()) + turns, cache.own.shape[4])
            now = begin(cache.rows, uniforms, ends, logits, fed)
            go = partial(turn, self.weights, cache, layout, now, draws, timesteps)
        else:
            rows = padded(cache.rows, bucket(R, cache.own.shape[2]))
            layout = bucketed(cache, rows)
            lines = max(k, STEPS)
            now = begin(rows, F.pad(uniforms, (0, 0, 0, lines - k)), ends, logits, fed)
            go = self._captured(cache, layout, now, draws)
            layout, now = go.layout, go.now
        if fed is None:
            draw(layout, now, draws)
        for _ in range(turns):
            go()
        return now.drawn[:k, :R].clone(), now.logits[:R].clone()

    def _captured(
        self, cache: PaddedCache, layout: Layout, now: Running, draws: Draws
    ) -> "Captured":
        """A turn that begins with this state, captured before or now."""
        cached = [(x.data_ptr(), x.shape) for x in (cache.prefix, cache.own)]
        if cached != self.cached:
            self.graphs.clear()
            self.cached = cached
        shapes = [tensor.shape for part in (layout, now) for tensor in tensors(part)]
        settings = [(one, None if own is None else own.tolist()) for one, own in draws]
        key = repr((shapes, layout.grid.groups, layout.grid.width, settings))
        if key not in self.graphs:
            self.graphs[key] = Captured(self.weights, cache, layout, now, draws)
            if len(self.graphs) > GRAPHS:
                self.graphs.popitem(last=False)
        self.graphs.move_to_end(key)
        captured = self.graphs[key]
        captured.load(layout, now)
        return captured


def begin(
    rows: Rows,
    uniforms: Float[Tensor, "k some"],
    ends: Collection[int],
    logits: Float[Tensor, "some V"],
    fed: Int[Tensor, " some"] | None,
) -> Running:
    """Before the first column. Some of the rows, the first, are alive; the others fill a bucket."""
    device, (some, V) = logits.device, logits.shape
    more = len(rows) - some
    ended = torch.zeros(V, dtype=torch.bool)
    ended[[end for end in ends if 0 <= end < V]] = True
    tokens = torch.full((some,), -1, device=device) if fed is None else fed
    return Running(
        tokens=F.pad(tokens, (0, more), value=-1),
        alive=torch.arange(len(rows), device=device) < some,
        steps=torch.tensor(rows.steps, device=device),
        logits=F.pad(logits, (0, 0, 0, more)),
        drawn=torch.full((len(uniforms), len(rows)), -1, device=device),
        column=torch.zeros(1, dtype=torch.int64, device=device),
        uniforms=F.pad(uniforms, (0, more)),
        ends=ended.to(device),
    )


def bucket(count: int, most: int) -> int:
    """The size that so many are padded to: up to seven more than there are."""
    return min(count if count < 3 else 4 if count < 5 else -(-count // 8) * 8, most)


def padded(rows: Rows, count: int) -> Rows:
    """As many rows: those that are missing repeat the last one."""
    return rows.keep(np.minimum(np.arange(count), len(rows) - 1))


def bucketed(cache: PaddedCache, rows: Rows) -> Layout:
    """Rows in a grid of a bucket's size, and all sizes such that others of the bucket fit, too."""
    device, plan = cache.prefix.device, GridPlan.of(rows.group)
    groups = bucket(plan.groups, cache.prefix.shape[2])
    plan = plan.padded(groups, bucket(plan.width, len(rows)))
    readers = Readers.of(rows, device, groups)
    readers = replace(readers, widest=plan.width, longest=cache.prefix.shape[4])
    return Layout.of(rows, Grid.planned(plan, device), readers)


def tensors(part: Any) -> Iterator[Tensor]:
    """All that a layout or a state holds, always in the same order."""
    for field in fields(part):
        value = getattr(part, field.name)
        if isinstance(value, Tensor):
            yield value
        elif is_dataclass(value):
            yield from tensors(value)


class Captured:
    """A turn over tensors of its own, of which it is told anew what they hold."""

    def __init__(
        self, weights: Packed, cache: PaddedCache, layout: Layout, now: Running, draws: Draws
    ) -> None:
        self.layout, self.now = layout, now
        call = partial(turn, weights, cache, layout, now, draws, cache.own.shape[4])
        self.graph = Graph(call, list(tensors(now)))
        self.table = weights.rope.tables  # which is read for ever, even if that one grows

    def load(self, layout: Layout, now: Running) -> None:
        """Begin with these values."""
        for mine, given in ((self.layout, layout), (self.now, now)):
            for target, source in zip(tensors(mine), tensors(given), strict=True):
                target.copy_(source)

    def __call__(self) -> None:
        self.graph()


class Graph:
    """What a call launches on a CUDA device, captured, to be launched again. `state`: the tensors
    that it changes. Tests stand the call itself in for this: they have no such device, and what
    runs it is the stage `torch-ahead` of benchmarks/accelerator.py."""

    def __init__(self, call: Callable[[], None], state: list[Tensor]) -> None:
        self.call = call  # what it reads is not freed
        self.device, before = state[0].device, [tensor.clone() for tensor in state]
        with torch.cuda.device(self.device):
            side, main = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(main)
            with torch.cuda.stream(side):
                call()  # libraries load and kernels compile, which they must not while captured
            main.wait_stream(side)
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                call()

    def __call__(self) -> None:
        with torch.cuda.device(self.device):
            self.graph.replay()
