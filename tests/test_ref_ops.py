"""Every hand-written backward of the reference's operations, by the complex step.

For a function f that is analytic, `Im f(x + i e) / e` is its derivative to the last digits, with no
subtraction: e can be 1e-30. Central differences on the same functions confirm the method itself.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.config import BridgeConfig
from bridge_ref import ops
from bridge_ref.attention import (
    attention,
    attention_backward,
    causal_allowed,
    masked_softmax,
    self_attention,
    self_attention_backward,
)
from bridge_ref.block import bridge_block, bridge_block_backward

SEEDS = st.integers(0, 2**32 - 1)
B, S, D, H, KV, d, F, V = 4, 3, 8, 4, 2, 2, 5, 7
ACTIVE = np.array([[1, 1, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], bool)
GROUPS = np.array([3, 1, 3, 3])
TOKENS = np.array([[0, 3, 3], [1, 6, 0], [2, 2, 2], [6, 5, 4]])
POSITIONS = np.maximum(np.cumsum(ACTIVE, 1) - 1, 0)
ANGLES = np.random.default_rng(0).normal(size=(B, S, d // 2))
COS, SIN = 1.2 * np.cos(ANGLES), 1.2 * np.sin(ANGLES)
ATTENTION = {"q_proj": (H * d, D), "k_proj": (H * d, D), "v_proj": (H * d, D), "o_proj": (D, H * d)}
MLP = {"up_proj": (2 * H * d, D), "down_proj": (D, 2 * H * d)}


def block_pair(kind, names):
    """The block as a function of its residual stream and weights."""
    config = BridgeConfig(kind, H, d, (0,), 1e-3)

    def forward(h, *weights):
        named = {f"{n}.weight": w for n, w in zip(names, weights, strict=True)}
        return bridge_block(h, GROUPS, ACTIVE, named, config)

    def backward(dy, cache):
        dh, grads = bridge_block_backward(dy, cache)
        return dh, *(grads[f"{n}.weight"] for n in names)

    return forward, backward


def sees(window):
    return causal_allowed(ACTIVE, POSITIONS, window)


# name: forward, backward, shapes of the inputs that have a gradient
PAIRS = {
    "rms_norm": (
        lambda x, w: ops.rms_norm(x, w, 1e-3),
        ops.rms_norm_backward,
        [(B, S, D), (D,)],
    ),
    "linear": (ops.linear, ops.linear_backward, [(B, S, D), (F, D), (F,)]),
    "silu": (ops.silu, ops.silu_backward, [(B, S, D)]),
    "swiglu": (ops.swiglu, ops.swiglu_backward, [(B, S, F), (B, S, F)]),
    "embedding": (lambda w: ops.embedding(TOKENS, w), ops.embedding_backward, [(V, D)]),
    "rotate": (
        lambda x: (ops.rotate(x, COS, SIN), ()),
        lambda dy, _: ops.rotate_backward(dy, COS, SIN),
        [(B, S, H, d)],
    ),
    "log_softmax": (ops.log_softmax, ops.log_softmax_backward, [(B, S, V)]),
    "attention": (
        lambda q, k, v: attention(q, k, v, sees(None)),
        attention_backward,
        [(B, S, d), (B, S, d), (B, S, d)],
    ),
    "self_attention": (
        lambda q, k, v: self_attention(q, k, v, sees(None)),
        self_attention_backward,
        [(B, S, H, d), (B, S, KV, d), (B, S, KV, d)],
    ),
    "self_attention in a window": (
        lambda q, k, v: self_attention(q, k, v, sees(2)),
        self_attention_backward,
        [(B, S, H, d), (B, S, KV, d), (B, S, KV, d)],
    ),
    "block of attention": (
        *block_pair("attention", ("norm", *ATTENTION)),
        [(B, S, D), (D,), *ATTENTION.values()],
    ),
    "block of P-Match": (*block_pair("mlp", ("norm", *MLP)), [(B, S, D), (D,), *MLP.values()]),
}


@pytest.mark.parametrize("name", PAIRS)
@given(seed=SEEDS)
def test_backward_is_the_derivative(name, seed):
    forward, backward, shapes = PAIRS[name]
    rng = np.random.default_rng(seed)
    inputs = [rng.normal(size=shape) for shape in shapes]
    y, cache = forward(*inputs)
    dy = rng.normal(size=y.shape)
    grads = backward(dy, cache)
    grads = grads if isinstance(grads, tuple) else (grads,)
    for i, (x, grad) in enumerate(zip(inputs, grads, strict=True)):
        assert grad.shape == x.shape and grad.dtype == x.dtype
        direction = rng.normal(size=x.shape)

        def along(step, i=i, x=x, direction=direction):
            moved = [z.astype(np.asarray(step).dtype) for z in inputs]
            moved[i] = x + step * direction
            return np.sum(dy * forward(*moved)[0])

        want = np.sum(grad * direction)
        complex_step = along(1e-30j).imag / 1e-30
        central = (along(1e-5) - along(-1e-5)) / 2e-5
        size = np.sum(np.abs(grad * direction)) + 1e-3
        assert abs(complex_step - want) <= 1e-11 * size, f"{name}, input {i}"
        assert abs(central - want) <= 1e-5 * size + 1e-7, f"{name}, input {i}"


@given(SEEDS)
def test_masked_softmax_sums_to_one_or_nothing(seed):
    rng = np.random.default_rng(seed)
    score = rng.normal(size=(5, 4)) * 1000
    allowed = rng.random((5, 4)) < 0.5
    score = np.where(allowed, score, np.nan)
    p = masked_softmax(score, allowed)
    assert (p[~allowed] == 0).all()
    np.testing.assert_allclose(p.sum(-1), allowed.any(-1), rtol=1e-15)


def test_a_window_is_measured_in_positions():
    active = np.array([[1, 0, 1, 1]], bool)
    positions = np.array([[0, 0, 1, 2]])
    assert causal_allowed(active, positions, 2)[0].astype(int).tolist() == [
        [1, 0, 0, 0],
        [0, 0, 0, 0],
        [1, 0, 1, 0],
        [0, 0, 1, 1],
    ]


def test_silu_of_extremes_is_finite():
    x = np.array([-1e4, -800.0, 0.0, 800.0, 1e4])
    y, cache = ops.silu(x)
    assert y.tolist() == [0, 0, 0, 800, 1e4]
    assert ops.silu_backward(np.ones(5), cache).tolist() == [0, 0, 0.5, 1, 1]
