"""Drawing next tokens on the device (chapter 6), by the rule that the reference states.

Only uniforms come from the host (`bridge.decoding.uniforms`); all else stays where the logits are.
Axes: R rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from bridge.contract import Sampling
from bridge.decoding.uniforms import alike

# Settings, seeds aside, and the rows that draw by them; None: all do.
Draws = list[tuple[Sampling, Int[Tensor, " some"] | None]]


def draws_of(sampling: Sampling | Sequence[Sampling], device: torch.device) -> Draws:
    """How rows draw: all alike, or each by its own settings (clause 6.9)."""
    return [
        (replace(settings, seed=0), None if rows is None else torch.from_numpy(rows).to(device))
        for settings, rows in alike(sampling)
    ]


def sample_rows(
    logits: Float[Tensor, "R V"], uniform: Float[Tensor, " R"], draws: Draws
) -> Int[Tensor, " R"]:
    """One token a row, by its settings; 0 for a row without any."""
    if len(draws) == 1 and draws[0][1] is None:
        return sample(logits, uniform, draws[0][0])
    tokens = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    for settings, rows in draws:
        assert rows is not None  # of several, none is for all
        tokens[rows] = sample(logits[rows], uniform[rows], settings)
    return tokens


def sample(
    logits: Float[Tensor, "R V"], uniform: Float[Tensor, " R"], sampling: Sampling
) -> Int[Tensor, " R"]:
    """One token a row: int64, on the device of the logits."""
    if sampling.temperature == 0:  # clause 6.8; argmax takes the first of equals
        return logits.argmax(-1)
    w = weights(logits.float(), sampling)
    if w.device.type != "cpu":
        return first_above(w.cumsum(-1), w, uniform)
    cumulative = w.cumsum_(-1)  # summed in order there: ascending
    # Clause 6.7. A total is at least 1, and `uniform` at most 1 - 2**-24: the product is below it,
    # and a token above, but for an overflown model, which has NaN here.
    found = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    return found[:, 0].clamp_(max=cumulative.shape[-1] - 1)


def first_above(
    cumulative: Float[Tensor, "R V"], w: Float[Tensor, "R V"], uniform: Float[Tensor, " R"]
) -> Int[Tensor, " R"]:
    """Clause 6.7 for a sum that was taken in parallel: it may dip by a rounding, so a token without
    weight is passed over, and where none is left above, it is the last with weight."""
    kept = w > 0
    above = (cumulative > uniform[:, None] * cumulative[:, -1:]).logical_and_(kept)
    last = w.shape[-1] - 1 - kept.flip(-1).to(torch.uint8).argmax(-1)
    return torch.where(above.any(-1), above.to(torch.uint8).argmax(-1), last)


def weights(z: Float[Tensor, "R V"], sampling: Sampling) -> Float[Tensor, "R V"]:
    """Unnormalised weights of the kept tokens, 0 elsewhere (clauses 6.3 to 6.6)."""
    cut = None
    if sampling.top_k is not None and sampling.top_k < z.shape[-1]:
        cut = z < z.topk(sampling.top_k, sorted=True).values[:, -1:]
    w = z - z.amax(-1, keepdim=True)  # the one copy of the vocabulary; all else is in place
    w.div_(max(sampling.temperature, torch.finfo(z.dtype).tiny)).exp_()
    if cut is not None:
        w.masked_fill_(cut, 0)
    if sampling.top_p is not None and sampling.top_p < 1:
        w.masked_fill_(w < nucleus_floor(w, sampling.top_p), 0)
    if sampling.min_p is not None:
        w.masked_fill_(w < sampling.min_p, 0)  # the largest weight is 1
    return w


def nucleus_floor(w: Float[Tensor, "R V"], top_p: float) -> Float[Tensor, "R one"]:
    """The smallest weight that top-p keeps: that of the last token, likeliest first, before which
    the others' share is below `top_p` (clause 6.5); equal weights stay together."""
    total = w.sum(-1, keepdim=True)
    # A CPU sorts a vocabulary slowly, and a nucleus is mostly small: take more only where needed.
    count = 512 if w.device.type == "cpu" else w.shape[-1]
    while True:
        count = min(count, w.shape[-1])
        descending = w.topk(count, sorted=True).values
        share = (descending / total).cumsum(-1)
        if count == w.shape[-1] or bool((share[:, -1] >= top_p).all()):
            break
        count *= 8
    before = F.pad(share[:, :-1], (1, 0))
    inside = (before < top_p).sum(-1, keepdim=True).clamp_(min=1)
    return descending.gather(-1, inside - 1)
