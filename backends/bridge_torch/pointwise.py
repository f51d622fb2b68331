"""Norm and activation with backwards of their own, which compute again what is cheap.

Autograd keeps what each of their operations gave. Here only what they read is kept: by both CPUs
and, for the activation, CUDA; the norm has a fused kernel there.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def rms_norm(x: Float[Tensor, "*cells D"], weight: Float[Tensor, " D"], eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight`, in float32 or wider (clause 3.2)."""
    return _RmsNorm.apply(x, weight, eps)


def swiglu(gate: Float[Tensor, "*cells I"], up: Float[Tensor, "*cells I"]) -> Tensor:
    """`silu(gate) * up` (clause 5.8)."""
    return _SwiGlu.apply(gate, up)


def _scale(x: Tensor, eps: float) -> Tensor:
    """`1 / sqrt(mean(x^2) + eps)`, float32 or wider."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    return norm.square().div(x.shape[-1]).add(eps).rsqrt()


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return (x * _scale(x, eps)).mul(weight).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        x, weight, ctx.eps = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (dy,), (x, weight) = gradients, ctx.saved_tensors
        scale = _scale(x, ctx.eps)
        normed, dx, dw = x * scale, None, None
        if ctx.needs_input_grad[1]:
            dw = (dy * normed).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            g = dy * weight.to(scale.dtype)
            along = (g * normed).mean(-1, keepdim=True)
            dx = (g - normed * along).mul(scale).to(x.dtype)
        return dx, dw, None


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (dy,), (gate, up) = gradients, ctx.saved_tensors
        return torch.ops.aten.silu_backward(dy * up, gate), dy * F.silu(gate)
