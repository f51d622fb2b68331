"""What the sharing does: weights against torch, and figures worked by hand."""

import json
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from traced import answered, exact, hand_made

import bridge
from bridge.config import BridgeConfig
from bridge.contract import Sampling
from bridge.decoding.inputs import default_positions
from bridge.errors import BridgeError
from bridge.tracing.diversity import agree_from, agreement, distinct_n, diversity, edit_distance
from bridge.tracing.trace import trace
from bridge_ref.block import bridge_block
from bridge_ref.model import hidden_states
from bridge_ref.trace import rows_weights

# Weights, norm ratios and entropies, against what others compute


def torch_weights(h, groups, active, weights, heads, eps):
    """p of clause 3.5 by torch's own norm and attention: with the unit vectors for values, what
    attention gives is its weights. Cells that are not active are left as NaN."""
    h = torch.from_numpy(np.where(active[:, :, None], h, 0))
    w = {name: torch.from_numpy(value) for name, value in weights.items()}
    x = torch.nn.functional.rms_norm(h, h.shape[-1:], w["norm.weight"], eps)
    B, S, _ = x.shape
    q, k = (
        (x @ w[f"{name}_proj.weight"].T).reshape(B, S, heads, -1).permute(1, 2, 0, 3)
        for name in "qk"
    )
    there = torch.from_numpy(active.T)
    same = torch.from_numpy(groups[:, None] == groups)
    allowed = same & there[:, :, None] & there[:, None, :]
    unit = torch.eye(B, dtype=x.dtype).expand(S, heads, B, B)
    p = torch.nn.functional.scaled_dot_product_attention(q, k, unit, allowed[:, None])
    return p.transpose(0, 1).numpy()


def test_weights_of_a_block_are_torchs():
    rng = np.random.default_rng(0)
    B, S, D, H, d = 6, 5, 12, 3, 4
    shapes = {
        "q_proj": (H * d, D),
        "k_proj": (H * d, D),
        "v_proj": (H * d, D),
        "o_proj": (D, H * d),
    }
    weights = {f"{name}.weight": rng.normal(size=shape) for name, shape in shapes.items()}
    weights["norm.weight"] = rng.normal(size=D)
    groups, active = np.array([7, 3, 7, 3, 3, 9]), rng.random((B, S)) < 0.7
    config = BridgeConfig("attention", H, d, (0,), 1e-6)
    h = rng.normal(size=(B, S, D))
    h[~active] = np.nan  # which must have no influence
    found = rows_weights(bridge_block(h, groups, active, weights, config)[1])
    wanted = torch_weights(h, groups, active, weights, H, config.norm_eps)
    for s in range(S):
        for b in range(B):
            if active[b, s]:
                np.testing.assert_allclose(found[:, s, b], wanted[:, s, b], rtol=1e-12, atol=1e-15)
                np.testing.assert_allclose(found[:, s, b].sum(axis=-1), 1, rtol=1e-12)
            else:
                assert not found[:, s, b].any()
            shut = ~active[:, s] | (groups != groups[b])
            assert not found[:, s, b][:, shut].any()
    assert (active.sum(axis=1) > 0).all() and not active.all()


def test_a_watched_model_gives_the_weights_of_its_own_residual_stream(traced):
    """Blocks on the last layer read what the host alone gives."""
    model = exact(traced / "last")
    tensors = dict(model.implementation.tensors())
    rng = np.random.default_rng(2)
    tokens, groups = rng.integers(1, 257, (5, 6)), np.array([0, 1, 0, 1, 1])
    active = np.arange(6) < np.array([[6], [4], [3], [6], [5]])
    positions, drawn = default_positions(active), active & (np.arange(6) >= 2)
    plain = model.config.without_bridge()
    h, _ = hidden_states(plain, tensors, tokens, groups, active, positions)
    seen = model.implementation.watch(
        tokens, groups, active, positions, drawn, Sampling(temperature=0.7)
    )
    names = ("norm", "q_proj", "k_proj")
    weights = {f"{n}.weight": tensors[f"model.layers.2.bridge.{n}.weight"] for n in names}
    wanted = torch_weights(h, groups, active, weights, 2, model.config.bridge.norm_eps)
    assert seen.attention.shape == (1, 2, 6, 5, 5)
    where = active.T[:, :, None] & np.ones(5, bool)
    np.testing.assert_allclose(
        seen.attention[0][:, where], wanted[:, where], rtol=1e-10, atol=1e-14
    )
    assert not seen.attention[0][:, ~where].any()
    assert np.ptp(wanted[:, where]) > 0.2  # they are not even
    logits = model.logits(tokens, groups=groups, active=active)
    softmax = torch.distributions.Categorical(logits=torch.from_numpy(logits).float() / 0.7)
    np.testing.assert_allclose(
        seen.entropy[drawn], softmax.entropy().numpy()[drawn], rtol=1e-5, atol=1e-6
    )
    assert not seen.entropy[~drawn].any()


def test_entropy_is_of_the_tokens_that_can_be_drawn(traced):
    model = exact(traced / "all")
    tokens, active = np.array([[5, 6, 7]]), np.ones((1, 3), bool)
    batch = (tokens, np.zeros(1, int), active, default_positions(active), active)
    found = model.implementation.watch(*batch, Sampling(temperature=0.9, top_k=4)).entropy
    logits = torch.from_numpy(model.logits(tokens, groups=[0]))
    four = torch.distributions.Categorical(logits=logits.topk(4).values / 0.9)
    np.testing.assert_allclose(found, four.entropy().numpy(), rtol=1e-6)
    assert (model.implementation.watch(*batch, Sampling(top_k=1)).entropy == 0).all()


@pytest.mark.parametrize("name", ["all", "last", "mlp"])
def test_norm_ratios_are_those_of_the_contract(traced, name):
    model = exact(traced / name)
    answers = answered([5, 6], [7, 8, 9, 1], [7, 3], [4, 4, 4])
    found = trace(model, answers, Sampling())
    tokens = np.array([[5, 6, 7, 8, 9], [5, 6, 7, 0, 0], [5, 6, 4, 4, 0]])
    active = np.arange(5) < np.array([[5], [3], [4]])
    positions = default_positions(active)
    wanted = model.implementation.norm_ratios(tokens, np.zeros(3, int), active, positions)
    np.testing.assert_array_equal(found.norm_ratios, wanted)
    assert (wanted > 0).all() and len(wanted) == len(found.layers)
    assert (found.attention is None) == (name == "mlp")


# A trace


def test_the_worked_figure_of_the_spec(traced):
    """Clause 2.5: three rows that end after 4, 2 and 3 tokens."""
    reasons = ["eos", "eos", "length"]
    answers = answered([10, 11], [20, 21, 22, 0], [23, 0], [24, 25, 26], reasons=reasons)
    found = trace(exact(traced / "all"), answers, Sampling())
    assert found.tokens.tolist() == [[20, 21, 22, 0], [23, 0, -1, -1], [24, 25, 26, -1]]
    assert (found.width, found.steps, found.heads, found.layers) == (3, 4, 2, (0, 1, 2))
    # At step 0 the prompt's last token is fed, then what each row said.
    reads = [{0, 1, 2}, {0, 1, 2}, {0, 2}, {0}]
    for t, rows in enumerate(reads):
        for row in range(3):
            seen = found.attention[:, :, t, row]
            if row in rows:
                np.testing.assert_allclose(seen.sum(axis=-1), 1, rtol=1e-12)
                assert (seen[..., sorted(rows)] > 0).all()
                assert not seen[..., sorted({0, 1, 2} - rows)].any()
            else:
                assert np.isnan(seen).all()
    np.testing.assert_allclose(found.attention[:, :, 0], 1 / 3)  # rows are still the same
    assert np.isnan(found.entropy).tolist() == (found.tokens < 0).tolist()
    assert np.isnan(found.to_others()).tolist() == [(found.tokens.T < 0).tolist()] * 3
    assert found.even().tolist() == pytest.approx([2 / 3, 2 / 3, 1 / 2, 0])
    assert not found.to_others()[:, 3, 0].any()  # alone
    assert found.diversity().edit_distance == pytest.approx((3 + 3 + 3) / 3)  # without EOS
    assert found.words[0][3] == "<eos>" and found.words[0][0] == chr(ord("!") + 20 - 1)


def test_rows_that_say_the_same_look_at_all_alike(traced):
    found = trace(exact(traced / "all"), answered([5], *[[6, 7, 8]] * 4), Sampling())
    np.testing.assert_allclose(found.attention, 1 / 4, rtol=1e-12)
    assert found.agree_from() == 0 and found.diversity().edit_distance == 0
    apart = trace(exact(traced / "all"), answered([5], [6, 7, 8], [9, 7, 8]), Sampling())
    assert np.ptp(apart.attention[:, :, 1:]) > 0.1


def test_maps_of_rows_worked_by_hand():
    found = hand_made()
    np.testing.assert_allclose(found.to_others()[0], [[2 / 3] * 3, [0.75, 0.5, np.nan]])
    np.testing.assert_allclose(found.to_others()[1, 1], [0.25, 1, np.nan])
    # Row 0 in layer 1: 1/3, 1/3, 1/3 and then 0.25, 0.75, 0; row 2 only at step 0.
    np.testing.assert_allclose(found.looks(1)[0], [7 / 24, 13 / 24, 1 / 6])
    np.testing.assert_allclose(found.looks(1)[2], [1 / 3] * 3)
    np.testing.assert_allclose(found.looks()[0], [(7 / 24 + 13 / 24) / 2] * 2 + [1 / 6])
    np.testing.assert_allclose(found.looks().sum(axis=1), 1)
    np.testing.assert_allclose(found.heard(1), [[1 / 3] * 3, [0.5, 0.75, np.nan]])
    np.testing.assert_allclose(found.heard(), [[1 / 3] * 3, [0.75, 0.5, np.nan]])
    np.testing.assert_allclose(found.mean_entropy(), [1.0, 0.25])
    with pytest.raises(BridgeError, match="layer 2 has no Bridge block; layers with one: 1, 3"):
        found.looks(2)
    with pytest.raises(BridgeError, match="mlp blocks read no other rows"):
        hand_made(kind="mlp", attention=None).to_others()


def test_its_json_has_null_where_a_row_has_ended():
    said = json.loads(json.dumps(hand_made().to_json(), allow_nan=False))
    assert said["entropy"] == [[1.0, 0.5], [2.0, 0.0], [0.0, None]]
    assert said["to_others"][0] == [[0.666667] * 3, [0.75, 0.5, None]]
    assert said["attention"][1][1] == [[0.75, 0.25, 0.0], [1.0, 0.0, 0.0], [None] * 3]
    assert said["to_others_by_head"] == [[0.65], [0.65]]
    assert said["answers"][2] == {"text": "d", "finish_reason": "eos", "tokens": [0]}
    assert hand_made(kind="mlp", attention=None).to_json()["looks"] is None


# How alike answers are


def test_distances_and_ngrams_of_textbooks():
    assert edit_distance([*map(ord, "kitten")], [*map(ord, "sitting")]) == 3
    assert edit_distance([*map(ord, "intention")], [*map(ord, "execution")]) == 5
    assert edit_distance([], [1, 2]) == 2 and edit_distance([1, 2], []) == 2
    assert distinct_n([[1, 2, 1], [2, 1]], 1) == 2 / 5
    assert distinct_n([[1, 2, 1], [2, 1]], 2) == 2 / 3
    assert distinct_n([[1], []], 2) is None
    found = diversity(["a ", "a", "b"], [[1, 2], [1, 2], [3]])
    assert (found.answers, found.distinct) == (3, 2)
    assert found.edit_distance == pytest.approx(4 / 3)  # 0, 2 and 2
    assert found.edit_share == pytest.approx(2 / 3)
    alone = diversity(["a"], [[]])
    assert (alone.edit_distance, alone.distinct_1, alone.distinct) == (None, None, 1)


@given(*[st.lists(st.integers(0, 3), max_size=8)] * 2)
def test_the_distance_is_the_least_by_its_definition(a, b):
    @cache
    def least(i, j):
        if not i or not j:
            return i + j
        swap = least(i - 1, j - 1) + (a[i - 1] != b[j - 1])
        return min(swap, least(i - 1, j) + 1, least(i, j - 1) + 1)

    assert edit_distance(a, b) == least(len(a), len(b))


@pytest.mark.parametrize(
    ("rows", "shares", "start"),
    [
        (["abcd", "abcd"], [1, 1, 1, 1], 0),
        (["abcd", "axcd"], [1, 0.5, 1, 1], 2),  # one of two is no agreement
        (["abcd", "axcx"], [1, 0.5, 1, 0.5], None),
        (["abcd", "abcx", "xbyc", "zbyz"], [0.5, 1, 0.5, 0.25], None),
        (["xbcd", "abcx", "ybyd", "zbyz"], [0.25, 1, 0.5, 0.5], 1),
        (["abcd", "ab", "xb"], [2 / 3, 1, None, None], 0),  # one left has nobody to agree with
        (["ab", "xy", "a"], [2 / 3, 0.5], None),
        (["abc"], [None, None, None], None),
    ],
)
def test_when_rows_agree(rows, shares, start):
    T = max(map(len, rows))
    tokens = np.array([[ord(c) for c in row] + [-1] * (T - len(row)) for row in rows])
    np.testing.assert_allclose(agreement(tokens), np.array(shares, float))
    assert agree_from(tokens) == start


def test_a_backend_that_cannot_be_watched_is_named(traced):
    model = bridge.load(traced / "all", backend="torch")
    with pytest.raises(BridgeError, match="backend torch cannot be watched; load with numpy"):
        trace(model, answered([5], [6]), Sampling())
    with pytest.raises(BridgeError, match="no Bridge blocks"):
        trace(exact(traced / "host"), answered([5], [6]), Sampling())
