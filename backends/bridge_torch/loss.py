"""The head and the losses (clauses 7.1 to 7.5), some targets at a time (clause 7.15).

A loss is a function of each target's log-probability by itself. So the logits of a few targets, the
loss and its gradient are made together and dropped before the next: what is left is the gradient of
what the head reads, and that of the head, which adds up in float32 or wider.

Axes: n targets, D model width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from bridge.contract import SFT, Objective
from bridge.decoding.targets import TargetCells
from bridge_torch.block import wide


class Told(NamedTuple):
    """What the loss is told of some targets, on the device; wide."""

    targets: Int[Tensor, " n"]
    advantages: Float[Tensor, " n"] | None = None
    old_logprobs: Float[Tensor, " n"] | None = None
    ref_logprobs: Float[Tensor, " n"] | None = None

    @classmethod
    def of(cls, cells: TargetCells, like: Tensor) -> "Told":
        """What a batch says of its targets."""

        def put(array: np.ndarray | None) -> Tensor | None:
            return None if array is None else torch.from_numpy(array).to(like)

        targets = torch.from_numpy(cells.targets).to(like.device, torch.int64)
        given = (cells.advantages, cells.old_logprobs, cells.ref_logprobs)
        return cls(targets, *map(put, given))

    def split(self, size: int) -> "Iterator[Told]":
        """A few targets at a time."""
        for first in range(0, len(self.targets), size):
            some = slice(first, first + size)
            told = (None if x is None else x[some] for x in self[1:])
            yield Told(self.targets[some], *told)


def logprobs(
    head: Callable[[Tensor], Tensor],
    h: Float[Tensor, "n D"],
    targets: Int[Tensor, " n"],
    temperature: float,
    chunk: int,
) -> Float[Tensor, " n"]:
    """Clause 7.12: lp of each target, of hidden states at its cell; `head` gives their logits."""
    parts = zip(h.split(chunk), targets.split(chunk), strict=True)
    return torch.cat([at_targets(head(x), ids, temperature)[1] for x, ids in parts])


def at_targets(
    logits: Float[Tensor, "n V"], targets: Int[Tensor, " n"], temperature: float
) -> tuple[Float[Tensor, "n V"], Float[Tensor, " n"]]:
    """log p of every token, and of the target (clause 7.1), in float32 or wider."""
    logits = logits.to(wide(logits.dtype))
    logp = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
    return logp, logp.gather(-1, targets[:, None])[:, 0]


@torch.no_grad()
def head_and_loss(
    h: Float[Tensor, "n D"],
    head: Float[Tensor, "V D"],
    told: Told,
    objective: Objective,
    count: int,
    chunk: int,
    learns: bool = True,
    total: Float[Tensor, "V D"] | None = None,
) -> tuple[dict[str, Tensor], Float[Tensor, "n D"] | None]:
    """Metrics, `loss` and `entropy` among them, and the gradient of `h` if it `learns`. That of the
    head is added to `total`, if there is one, in its dtype."""
    gradient = torch.empty_like(h) if learns else None
    sums: dict[str, Tensor] = {}
    for number, some in enumerate(told.split(chunk)):
        cells = slice(number * chunk, (number + 1) * chunk)
        metrics, dz = _of_some(F.linear(h[cells], head), some, objective, count)
        for name, part in metrics.items():
            sums[name] = sums[name] + part if name in sums else part
        if gradient is not None:
            torch.mm(dz, head, out=gradient[cells])
        if total is not None:
            add_product(total, dz, h[cells])
        del dz  # or it stays beside the next one's
    return sums, gradient


def _of_some(
    logits: Float[Tensor, "n V"], told: Told, objective: Objective, count: int
) -> tuple[dict[str, Tensor], Float[Tensor, "n V"]]:
    """Of a few targets: the metrics, and the gradient of their logits, in the dtype of those."""
    temperature = 1.0 if isinstance(objective, SFT) else objective.temperature
    dtype = logits.dtype
    logp, lp = at_targets(logits, told.targets, temperature)
    del logits
    with torch.enable_grad():
        value, metrics = loss(lp.requires_grad_(), told, objective, count)
        (dlp,) = torch.autograd.grad(value, lp)
    if isinstance(objective, SFT):
        p = logp.exp_()
    else:
        p = logp.exp()
        metrics["entropy"] = -logp.mul_(p).sum() / count
    # Of logits: dlp (1 where the target is - p), divided by the temperature.
    dlp = (dlp / temperature)[:, None]
    return metrics, p.mul_(-dlp).scatter_add_(1, told.targets[:, None], dlp).to(dtype)


def add_product(
    total: Float[Tensor, "V D"], dz: Float[Tensor, "n V"], x: Float[Tensor, "n D"]
) -> None:
    """`total += dz.T @ x`, in the dtype of the total."""
    if dz.dtype == total.dtype:
        total.addmm_(dz.T, x)
    else:
        total.add_(dz.T @ x)


def loss(
    lp: Float[Tensor, " n"], told: Told, objective: Objective, count: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss over some targets, of their log-probabilities, and its metrics.

    `count` is the number of targets that sums are divided by: of the whole update, of which these
    may be a few (clauses 7.10 and 7.15). SFT is clause 7.4: `loss = -sum(lp) / count`. GRPO is
    clause 7.5, with advantage A by row:

        rho  = exp(lp - old)
        gain = min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A)
        kl   = exp(ref - lp) - (ref - lp) - 1
        loss = -sum(gain - beta kl) / count
    """
    if isinstance(objective, SFT):
        value = -lp.sum() / count
        return value, {"loss": value.detach()}
    A, old = told.advantages, told.old_logprobs
    assert A is not None
    old = lp.detach() if old is None else old
    rho = (lp - old).exp()
    clipped = rho.clamp(1 - objective.eps_low, 1 + objective.eps_high)
    gain = torch.where(rho * A <= clipped * A, rho * A, clipped.detach() * A)
    metrics = {"clip_fraction": (rho * A > clipped * A).to(rho.dtype).sum() / count}
    if told.ref_logprobs is not None:
        difference = told.ref_logprobs - lp
        kl = difference.expm1() - difference  # of a small difference, exp is 1 and no more
        gain = gain - objective.beta * kl
        metrics["kl"] = kl.sum().detach() / count
    value = -gain.sum() / count
    return value, {"loss": value.detach(), **metrics}
