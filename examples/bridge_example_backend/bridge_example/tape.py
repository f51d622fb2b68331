"""Reverse-mode differentiation over the few operations that a Bridge model is made of.

A `Var` is an array, with a way back to those that it was made from: how its gradient becomes
theirs. Where nothing that it was made from is trained, nothing is kept, so that inference and
training are one code. It knows nothing of models. A framework with autograd needs none of this.
"""

from collections.abc import Callable
from itertools import count

import numpy as np

Array = np.ndarray
Back = Callable[[Array], Array]  # the gradient of a result to that of one argument

_clock = count()  # a result is always younger than its arguments


class Var:
    """An array; `back` pairs each argument that has a gradient with its way back."""

    def __init__(self, value: Array, *back: tuple["Var", Back], trained: bool = False) -> None:
        self.value = value
        self.back = [(argument, way) for argument, way in back if argument.trained]
        self.trained = trained or bool(self.back)
        self.age = next(_clock)
        self.grad: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def __add__(self, other: "Var | Array | float") -> "Var":
        a, b = self, constant(other)
        return Var(
            a.value + b.value,
            (a, lambda g: _like(g, a.shape)),
            (b, lambda g: _like(g, b.shape)),
        )

    def __mul__(self, other: "Var | Array | float") -> "Var":
        a, b = self, constant(other)
        return Var(
            a.value * b.value,
            (a, lambda g: _like(g * b.value, a.shape)),
            (b, lambda g: _like(g * a.value, b.shape)),
        )

    def __sub__(self, other: "Var | Array | float") -> "Var":
        return self + constant(other) * -1.0

    def __matmul__(self, other: "Var") -> "Var":
        a, b = self, other
        return Var(
            a.value @ b.value,
            (a, lambda g: _like(g @ b.value.swapaxes(-1, -2), a.shape)),
            (b, lambda g: _like(a.value.swapaxes(-1, -2) @ g, b.shape)),
        )

    def __getitem__(self, index) -> "Var":
        def scatter(g: Array) -> Array:
            out = np.zeros_like(self.value)
            np.add.at(out, index, g)  # what was read twice gets both gradients
            return out

        return Var(self.value[index], (self, scatter))

    def reshape(self, *shape: int) -> "Var":
        return Var(self.value.reshape(shape), (self, lambda g: g.reshape(self.shape)))

    def transpose(self, *axes: int) -> "Var":
        inverse = np.argsort(axes)
        return Var(self.value.transpose(axes), (self, lambda g: g.transpose(inverse)))

    def roll(self, by: int) -> "Var":
        """Along the last axis."""
        return Var(np.roll(self.value, by, -1), (self, lambda g: np.roll(g, -by, -1)))

    def sum(self) -> "Var":
        return Var(self.value.sum(), (self, lambda g: np.broadcast_to(g, self.shape)))

    def exp(self) -> "Var":
        y = np.exp(self.value)
        return Var(y, (self, lambda g: g * y))


def constant(x: Var | Array | float) -> Var:
    """What has no gradient. Stays in float32: a Python number takes the array's dtype."""
    return x if isinstance(x, Var) else Var(np.asarray(x, np.float32))


def linear(x: Var, weight: Var, bias: Var | None = None) -> Var:
    """`x @ weight.T + bias`, with weights `[out, in]` (clause 2.1)."""
    rows = x.value.reshape(-1, x.shape[-1])
    y = Var(
        (rows @ weight.value.T).reshape(*x.shape[:-1], -1),
        (x, lambda g: g @ weight.value),
        (weight, lambda g: g.reshape(-1, g.shape[-1]).T @ rows),
    )
    return y if bias is None else y + bias


def where(mask: Array, x: Var) -> Var:
    """`x` where the mask is true, else 0: not a product, which would let NaN through."""
    return Var(np.where(mask, x.value, np.float32(0)), (x, lambda g: np.where(mask, g, 0)))


def silu(x: Var) -> Var:
    """`x / (1 + exp(-x))` (clause 5.8); the exponent never overflows."""
    small = np.exp(-np.abs(x.value))
    s = np.where(x.value >= 0, 1, small) / (1 + small)
    return Var(x.value * s, (x, lambda g: g * s * (1 + x.value * (1 - s))))


def rms_norm(x: Var, weight: Var, eps: float) -> Var:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis (clause 3.2)."""
    scale = 1 / np.sqrt(np.mean(x.value * x.value, -1, keepdims=True) + np.float32(eps))
    unit = x.value * scale

    def to_x(g: Array) -> Array:
        g = g * weight.value
        return scale * (g - unit * np.mean(g * unit, -1, keepdims=True))

    return Var(unit * weight.value, (x, to_x), (weight, lambda g: _like(g * unit, weight.shape)))


def softmax(score: Var, allowed: Array) -> Var:
    """Over the last axis where allowed, else 0; where nothing is, all 0 (clauses 3.5 and 5.4)."""
    z = np.where(allowed, score.value, np.float32(-np.inf))
    top = z.max(-1, keepdims=True)
    e = np.exp(z - np.where(np.isfinite(top), top, 0))
    total = e.sum(-1, keepdims=True)
    p = e / np.where(total > 0, total, 1)
    return Var(p, (score, lambda g: p * (g - np.sum(g * p, -1, keepdims=True))))


def log_softmax(x: Var) -> Var:
    """Over the last axis."""
    z = x.value - x.value.max(-1, keepdims=True)
    y = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return Var(y, (x, lambda g: g - np.exp(y) * g.sum(-1, keepdims=True)))


def recompute(f: Callable[[Var], Var], x: Var) -> Var:
    """`f(x)` that keeps x alone, and computes f again in the backward pass (clause 7.11)."""

    def again(g: Array) -> Array:
        start = Var(x.value, trained=True)
        backward(f(start), g)  # also reaches the trained arrays that f reads
        assert start.grad is not None
        return start.grad

    out = Var(f(Var(x.value)).value, trained=True)
    out.back = [(x, again)]  # kept even where x has no gradient: what f reads may have one
    return out


def backward(result: Var, grad: Array) -> None:
    """Add the gradient of `result`, times `grad`, to `.grad` of each trained array behind it."""
    result.grad = grad
    reached, todo = {result.age: result}, [result]
    while todo:
        for argument, _ in todo.pop().back:
            if argument.age not in reached:
                reached[argument.age] = argument
                todo.append(argument)
    for var in sorted(reached.values(), key=lambda var: -var.age):  # each after all that read it
        if not var.back:  # trained: its gradient is what is asked for
            continue
        assert var.grad is not None
        for argument, way in var.back:
            g = way(var.grad)
            argument.grad = g if argument.grad is None else argument.grad + g
        var.grad = None


def _like(g: Array, shape: tuple[int, ...]) -> Array:
    """A gradient summed over the axes along which its argument was broadcast."""
    if g.shape == shape:
        return g
    g = g.sum(tuple(range(g.ndim - len(shape))))
    return g.sum(tuple(i for i, n in enumerate(shape) if n == 1), keepdims=True)
