"""Drawing next tokens on the device (chapter 6), by the rule that the reference states.

Uniforms come in (`bridge.decoding.uniforms`), and all stays where the logits are. Axes: R rows,
V vocabulary.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int

from bridge.contract import Sampling
from bridge.decoding.uniforms import alike

Draw = Callable[[mx.array, mx.array], mx.array]


def drawing(sampling: Sampling | Sequence[Sampling]) -> Draw:
    """What draws from logits `[R, V]` and uniforms `[R]` a token of each row, `[R]` int32, by one
    setting or one a row (clause 6.9). Rows of the same setting draw together."""
    settings = alike(sampling)
    if len(settings) == 1:
        return lambda logits, uniform: sample(logits, uniform, settings[0][0]).astype(mx.int32)
    rows = [np.asarray(own) for _, own in settings]
    places = [mx.array(own) for own in rows]
    order = mx.array(np.argsort(np.concatenate(rows)))

    def draw(logits: mx.array, uniform: mx.array) -> mx.array:
        parts = [
            sample(logits[own], uniform[own], one)
            for (one, _), own in zip(settings, places, strict=True)
        ]
        return mx.concatenate(parts)[order].astype(mx.int32)

    return draw


def sample(
    logits: Float[mx.array, "R V"], uniform: Float[mx.array, " R"], sampling: Sampling
) -> Int[mx.array, " R"]:
    """One token a row, on the device of the logits."""
    if sampling.temperature == 0:  # clause 6.8; argmax takes the first of equals
        return mx.argmax(logits, axis=-1)
    w = weights(logits, sampling)
    cumulative = mx.cumsum(w, axis=-1)
    # Clause 6.7. A parallel sum may dip by a rounding, so a token without weight is passed over.
    kept = w > 0
    above = (cumulative > uniform[:, None] * cumulative[:, -1:]) & kept
    last = w.shape[-1] - 1 - mx.argmax(kept[:, ::-1], axis=-1)
    return mx.where(mx.any(above, axis=-1), mx.argmax(above, axis=-1), last)


def weights(z: Float[mx.array, "R V"], sampling: Sampling) -> Float[mx.array, "R V"]:
    """Unnormalised weights of the kept tokens, 0 elsewhere (clauses 6.3 to 6.6)."""
    z = z - mx.max(z, axis=-1, keepdims=True)
    w = mx.exp(z / max(sampling.temperature, float(np.finfo(np.float32).tiny)))
    if sampling.top_k is not None and sampling.top_k < w.shape[-1]:
        kth = mx.min(mx.topk(z, sampling.top_k, axis=-1), axis=-1, keepdims=True)
        w = mx.where(z < kth, 0, w)
    if sampling.top_p is not None and sampling.top_p < 1:
        w = mx.where(w < nucleus_floor(w, sampling.top_p), 0, w)
    if sampling.min_p is not None:
        w = mx.where(w < sampling.min_p, 0, w)  # the largest weight is 1
    return w


def nucleus_floor(w: Float[mx.array, "R V"], top_p: float) -> Float[mx.array, "R one"]:
    """The smallest weight that top-p keeps: that of the last token, likeliest first, before which
    the others' share is below `top_p` (clause 6.5); equal weights stay together."""
    total = mx.sum(w, axis=-1, keepdims=True)
    # A CPU sorts a vocabulary slowly, and a nucleus is mostly small: take more only where needed.
    count = 512 if mx.default_device() == mx.Device(mx.cpu) else w.shape[-1]
    while True:
        count = min(count, w.shape[-1])
        descending = mx.sort(mx.topk(w, count, axis=-1), axis=-1)[:, ::-1]
        share = mx.cumsum(descending / total, axis=-1)
        if count == w.shape[-1] or mx.all(share[:, -1] >= top_p).item():
            break
        count *= 8
    before = mx.pad(share[:, :-1], [(0, 0), (1, 0)])
    inside = mx.maximum(mx.sum(before < top_p, axis=-1, keepdims=True), 1)
    return mx.take_along_axis(descending, inside - 1, axis=-1)
