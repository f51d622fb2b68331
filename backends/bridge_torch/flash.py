"""Self-attention of cells that lie flat, by kernels that have no scores in memory (clause 7.14).

A cell reads what its group shares and what its own row had before it: two calls of a kernel, merged
by the logarithms of their sums. The gradient of the merged attention is what both kernels' own
backwards give for the merged output and logarithm. Keys that are shared are read where they lie, by
the queries of all rows at once.

Axes: C cells, H query heads, K key heads, d head width; of a call b sequences of n queries and m
keys.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

ATEN = torch.ops.aten
State = tuple[Tensor, ...]


@dataclass(frozen=True)
class Read:
    """`count` sequences, one after the other from the cell `queries` on, of n cells each, and as
    many of m cells from `keys` on, which they read: all, or `causal`, and then n is m."""

    count: int
    queries: int
    n: int
    keys: int
    m: int
    causal: bool

    def followed_by(self, other: "Read") -> bool:
        """Whether the cells of another lie next to these."""
        queries, keys = self.queries + self.count * self.n, self.keys + self.count * self.m
        return (queries, keys) == (other.queries, other.keys)

    def of_queries(self, x: Float[Tensor, "C *one"]) -> Float[Tensor, "b n *one"]:
        """The cells that read, of all; a view."""
        return x[self.queries : self.queries + self.count * self.n].unflatten(0, (-1, self.n))

    def of_keys(self, x: Float[Tensor, "C *one"]) -> Float[Tensor, "b m *one"]:
        """The cells that are read, of all; a view."""
        return x[self.keys : self.keys + self.count * self.m].unflatten(0, (-1, self.m))


@dataclass(frozen=True, eq=False)
class Reads:
    """What the cells of a batch read: first those that groups share, of each other; then those that
    rows have alone, of what is shared and of each other."""

    shared: int  # cells that are
    within: tuple[Read, ...]  # groups
    across: tuple[Read, ...]  # what groups share, by the cells of their rows
    rows: int  # that have cells alone
    longest: int  # cells of one of them
    places: Int[Tensor, " alone"] | None  # of cells in `[rows * longest]`; None: as they lie

    def padded(self, x: Float[Tensor, "C *one"]) -> Float[Tensor, "rows longest *one"]:
        """The cells that rows have alone, a row each; padded on the right, where causal attention
        does not look."""
        x = x[self.shared :]
        if self.places is not None:
            x = x.new_zeros(self.rows * self.longest, *x.shape[1:]).index_copy_(0, self.places, x)
        return x.unflatten(0, (-1, self.longest))

    def flat(self, x: Float[Tensor, "rows longest *one"]) -> Float[Tensor, "alone *one"]:
        """Those cells again, of rows."""
        x = x.flatten(0, 1)
        return x if self.places is None else x.index_select(0, self.places)


class Kernel(NamedTuple):
    """Attention of q `[b, n, H, d]` to k and v `[b, m, K, d]`, `causal` or not.

    `forward(q, k, v, causal)` gives y, the logarithm `[b, n, H]` of its sums in float32 or wider,
    and the state of a dropout that there is not, which any backward of it takes:
    `backward(dy, q, k, v, y, lse, causal, state)` gives the gradients of q, k and v.
    """

    forward: Callable[..., tuple[Tensor, Tensor, State]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def attend(
    q: Float[Tensor, "C H d"],
    k: Float[Tensor, "C K d"],
    v: Float[Tensor, "C K d"],
    reads: Reads,
    kernel: Kernel,
) -> Float[Tensor, "C H d"]:
    """What each cell reads, in one softmax (clause 5.4), with gradients."""
    return _Attend.apply(q, k, v, reads, kernel)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, reads: Reads, kernel: Kernel) -> Tensor:
        y, (C, H, _) = torch.empty_like(q), q.shape
        lse = q.new_empty(C, H, dtype=torch.promote_types(q.dtype, torch.float32))
        ctx.state = ()

        def run(read: Read) -> None:
            parts = read.of_queries(q), read.of_keys(k), read.of_keys(v)
            found, logarithm, ctx.state = kernel.forward(*parts, read.causal)
            read.of_queries(y).copy_(found)
            read.of_queries(lse).copy_(logarithm)

        for read in reads.within:
            run(read)
        if reads.rows:
            own, own_lse, ctx.state = kernel.forward(*map(reads.padded, (q, k, v)), True)
            own, own_lse = reads.flat(own), reads.flat(own_lse)
            if not reads.across:
                y[reads.shared :], lse[reads.shared :] = own, own_lse
            else:
                y[reads.shared :], lse[reads.shared :] = 0, float("-inf")
                for read in reads.across:
                    run(read)
                _merge(y[reads.shared :], lse[reads.shared :], own, own_lse)
        ctx.save_for_backward(q, k, v, y, lse)
        ctx.reads, ctx.kernel = reads, kernel
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, y, lse = ctx.saved_tensors
        reads, kernel, dy = ctx.reads, ctx.kernel, gradients[0].contiguous()
        wide = lse.dtype  # keys that are shared have the gradients of several calls
        dq, dk, dv = torch.zeros_like(q), *(x.new_zeros(x.shape, dtype=wide) for x in (k, v))
        if reads.rows:
            parts = map(reads.padded, (dy, q, k, v, y, lse))
            found = map(reads.flat, kernel.backward(*parts, True, ctx.state))
            for x, one in zip((dq, dk, dv), found, strict=True):
                x[reads.shared :] = one
        for read in (*reads.within, *reads.across):
            (asks, gives), (keys, values) = map(read.of_queries, (dy, q)), map(read.of_keys, (k, v))
            parts = (asks, gives, keys, values, read.of_queries(y), read.of_queries(lse))
            ones = kernel.backward(*parts, read.causal, ctx.state)
            read.of_queries(dq).add_(ones[0])
            read.of_keys(dk).add_(ones[1])
            read.of_keys(dv).add_(ones[2])
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None


def _merge(y: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """One softmax of two, in the place of the first."""
    both = torch.logaddexp(lse, other_lse)
    first, second = ((part - both).exp_()[..., None] for part in (lse, other_lse))
    y.copy_(first.mul(y).add_(second * other))
    lse.copy_(both)


def kernel_for(device: torch.device, dtype: torch.dtype, d: int) -> Kernel | None:
    """The kernel that serves; None: there is none, as for float64 on CUDA."""
    if device.type == "cpu":
        return _on_cpu()
    if device.type != "cuda":
        return None
    new = torch.cuda.get_device_capability(device) >= (8, 0)
    if dtype in (torch.bfloat16, torch.float16) and new and d % 8 == 0 and d <= 256:
        return FLASH
    return EFFICIENT if dtype == torch.float32 and d % 4 == 0 else None


@cache
def _on_cpu() -> Kernel | None:
    """That of CPUs, if this build of torch has it and it lets heads share keys: tried once."""
    q, k = torch.ones(1, 2, 4, 8), torch.ones(1, 2, 2, 8)
    try:
        y, lse, state = CPU.forward(q, k, k, True)
        CPU.backward(y, q, k, k, y, lse, True, state)
    except (AttributeError, RuntimeError, TypeError):
        return None
    return CPU


def _cpu(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor, State]:
    run = ATEN._scaled_dot_product_flash_attention_for_cpu
    y, lse = run(*(x.transpose(1, 2) for x in (q, k, v)), 0.0, causal)
    return y.transpose(1, 2), lse.transpose(1, 2), ()


def _cpu_backward(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, causal, _ = given
    run = ATEN._scaled_dot_product_flash_attention_for_cpu_backward
    dq, dk, dv = run(*(x.transpose(1, 2) for x in tensors), 0.0, causal)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor, State]:
    run, (n, m) = ATEN._flash_attention_forward, (q.shape[1], k.shape[1])
    y, lse, *state = run(q, k, v, None, None, n, m, 0.0, causal, False)
    return y, lse.transpose(1, 2), tuple(state[:2])


def _flash_backward(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    dy, q, k, v, y, lse, causal, state = given
    run, (n, m) = ATEN._flash_attention_backward, (q.shape[1], k.shape[1])
    lse = lse.transpose(1, 2).contiguous()
    return run(dy, q, k, v, y, lse, None, None, n, m, 0.0, causal, *state)


def _efficient(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor, State]:
    run, shared = ATEN._efficient_attention_forward, q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(shared, 2), v.repeat_interleave(shared, 2)
    y, lse, *state = run(q, k, v, None, None, None, None, None, 0.0, int(causal), True)
    return y, lse[..., : q.shape[1]].transpose(1, 2), tuple(state[:2])


def _efficient_backward(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    dy, q, k, v, y, lse, causal, state = given
    run, (n, m), K = ATEN._efficient_attention_backward, (q.shape[1], k.shape[1]), k.shape[2]
    k, v = (x.repeat_interleave(q.shape[2] // K, 2) for x in (k, v))
    # The kernel takes logarithms in lots of 32, infinite where there is no query.
    lse = F.pad(lse.transpose(1, 2), (0, -n % 32), value=float("inf")).contiguous()
    dq, dk, dv, _ = run(
        *(dy, q, k, v, None, y, None, None, n, m, lse, 0.0, *state, int(causal), False)
    )
    return dq, dk.unflatten(2, (K, -1)).sum(3), dv.unflatten(2, (K, -1)).sum(3)


CPU = Kernel(_cpu, _cpu_backward)
FLASH = Kernel(_flash, _flash_backward)  # of CUDA, in bfloat16 and float16
EFFICIENT = Kernel(_efficient, _efficient_backward)  # of CUDA, in float32
