"""The reference block against its formula written out cell by cell, and what follows from it."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bridge.config import BridgeConfig
from bridge.decoding.inputs import default_positions
from bridge_conformance.cases import ModelCase
from bridge_ref.backend import Reference
from bridge_ref.block import allowed_rows, bridge_block, bridge_block_backward, norm_ratio

S, D, H, d = 3, 6, 2, 4
SEEDS = st.integers(0, 2**32 - 1)
ROWS = st.integers(1, 6)
KINDS = st.sampled_from(["attention", "mlp"])
SHAPES = {
    "attention": {"q_proj": (H * d, D), "k_proj": (H * d, D), "v_proj": (H * d, D)}
    | {"o_proj": (D, H * d)},
    "mlp": {"up_proj": (2 * H * d, D), "down_proj": (D, 2 * H * d)},
}


def case(seed, B, kind="attention"):
    """A residual stream, groups, activity, weights and config, all random."""
    rng = np.random.default_rng(seed)
    h = rng.normal(size=(B, S, D))
    groups, active = rng.integers(0, 2, B), rng.random((B, S)) < 0.7
    weights = {f"{n}.weight": rng.normal(size=s) for n, s in SHAPES[kind].items()}
    weights["norm.weight"] = rng.normal(size=D)
    return h, groups, active, weights, BridgeConfig(kind, H, d, (0,), 1e-6)


def block(*arguments):
    return bridge_block(*arguments)[0]


@given(SEEDS, ROWS)
def test_attention_is_the_formula(seed, B):
    h, groups, active, weights, config = case(seed, B)
    norm, q_proj, k_proj, v_proj, o_proj = (
        weights[f"{n}.weight"] for n in ("norm", "q_proj", "k_proj", "v_proj", "o_proj")
    )
    want = h.copy()
    for b, s in zip(*np.nonzero(active), strict=True):
        x = h[:, s] / np.sqrt((h[:, s] ** 2).mean(-1, keepdims=True) + 1e-6) * norm
        others = [c for c in range(B) if groups[c] == groups[b] and active[c, s]]
        heads = []
        for n in range(H):
            of_head = slice(n * d, (n + 1) * d)
            q, k, v = x[b] @ q_proj[of_head].T, x @ k_proj[of_head].T, x @ v_proj[of_head].T
            weight = np.exp([q @ k[c] / np.sqrt(d) for c in others])
            heads.append(sum(w * v[c] for w, c in zip(weight / weight.sum(), others, strict=True)))
        want[b, s] += np.concatenate(heads) @ o_proj.T
    got = block(h, groups, active, weights, config)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


def test_allowed_rows_are_active_ones_of_the_same_group():
    groups = np.array([5, 5, 2, 5])
    active = np.array([[True, True], [True, False], [True, True], [True, True]])
    allowed = allowed_rows(groups, active)
    assert allowed[:, :, 0].astype(int).tolist() == [
        [1, 1, 0, 1],
        [1, 1, 0, 1],
        [0, 0, 1, 0],
        [1, 1, 0, 1],
    ]
    assert allowed[:, :, 1].astype(int).tolist() == [
        [1, 0, 0, 1],
        [0, 0, 0, 0],
        [0, 0, 1, 0],
        [1, 0, 0, 1],
    ]


@given(SEEDS, ROWS, KINDS)
def test_consequences(seed, B, kind):
    h, groups, active, weights, config = case(seed, B, kind)
    out = block(h, groups, active, weights, config)
    np.testing.assert_array_equal(out[~active], h[~active])
    last = "o_proj.weight" if kind == "attention" else "down_proj.weight"
    fresh = weights | {last: np.zeros_like(weights[last])}
    np.testing.assert_array_equal(block(h, groups, active, fresh, config), h)
    order = np.random.default_rng(seed).permutation(B)
    moved = block(h[order], groups[order], active[order], weights, config)
    np.testing.assert_allclose(moved, out[order], rtol=1e-10, atol=1e-12)
    twice = (np.concatenate([a, a]) for a in (h, groups, active))
    np.testing.assert_allclose(block(*twice, weights, config)[:B], out, rtol=1e-10, atol=1e-12)


@given(SEEDS, ROWS, KINDS)
def test_nothing_leaks_from_inactive_cells_and_other_groups(seed, B, kind):
    h, groups, active, weights, config = case(seed, B, kind)
    out = block(h, groups, active, weights, config)
    mine = active & (groups == groups[0])[:, None]
    poisoned = np.where(mine[:, :, None], h, np.nan)
    got, cache = bridge_block(poisoned, groups, active, weights, config)
    np.testing.assert_array_equal(got[mine], out[mine])
    dh, _ = bridge_block_backward(mine[:, :, None] * np.ones_like(h), cache)
    assert np.isfinite(dh[mine]).all()


@given(SEEDS, ROWS)
def test_gradients_flow_across_the_rows_of_a_group_only(seed, B):
    h, groups, active, weights, config = case(seed, B)
    _, cache = bridge_block(h, groups, active, weights, config)
    dout = np.zeros_like(h)
    dout[0] = 1.0
    dh, _ = bridge_block_backward(dout, cache)
    reads = allowed_rows(groups, active)[0]
    assert (dh[~reads] == dout[~reads]).all()  # exactly: 0 but for the residual of row 0 itself
    assert (dh[reads] != 0).any(axis=-1).all()


@given(SEEDS)
def test_width_one_adds_v_o(seed):
    h, groups, active, weights, config = case(seed, 1)
    x = h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-6) * weights["norm.weight"]
    y = x @ weights["v_proj.weight"].T @ weights["o_proj.weight"].T
    got = block(h, groups, active, weights, config)
    np.testing.assert_allclose(got[active], (h + y)[active], rtol=1e-12, atol=1e-12)


@given(SEEDS, ROWS, KINDS)
def test_the_norm_ratio_is_a_mean_over_active_cells(seed, B, kind):
    """Clause 3.9."""
    h, groups, active, weights, config = case(seed, B, kind)
    h[0, 0] = 0
    h = np.where(active[:, :, None], h, np.nan)
    out, cache = bridge_block(h, groups, active, weights, config)
    ratios = [
        float(np.linalg.norm(out[b, s] - h[b, s]) / np.linalg.norm(h[b, s]))
        for b, s in zip(*np.nonzero(active), strict=True)
        if h[b, s].any()
    ]
    want = sum(ratios) / max(active.sum(), 1)
    np.testing.assert_allclose(norm_ratio(cache), want, rtol=1e-9)


def norm_ratios(layers, **changed):
    """Of three layers, with blocks on `layers` and some of the weights `changed`."""
    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3}
    raw = {"model_type": "llama", **sizes, "num_attention_heads": 2, "tie_word_embeddings": True}
    if layers:
        sizes = {"num_heads": 2, "head_dim": 3, "layers": layers, "norm_eps": 1e-6}
        raw["bridge"] = {"spec_version": "1.0", "kind": "attention", **sizes}
    model = ModelCase(raw, 0)
    tensors = model.tensors("float64")
    for i, factor in changed.items():
        tensors[f"model.layers.{i[1:]}.bridge.o_proj.weight"] *= factor
    loaded = Reference().load(model.config, tensors, device="cpu", dtype="float64")
    active = np.array([[True] * 4, [True, True, False, False]])
    tokens = np.arange(8).reshape(2, 4)
    return loaded.norm_ratios(tokens, np.zeros(2, int), active, default_positions(active))


def test_norm_ratios_are_of_the_layers_with_a_block_in_order():
    first, last = norm_ratios([0, 2])
    assert first > 0 and last > 0
    np.testing.assert_array_equal(norm_ratios([0, 2], l2=0), [first, 0])
    np.testing.assert_allclose(norm_ratios([0, 2], l0=2)[0], 2 * first, rtol=1e-12)
    assert norm_ratios([1, 2], l1=0)[0] == 0
    assert norm_ratios([]).shape == (0,)
