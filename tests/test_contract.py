"""What every backend refuses of those who call it directly, and what it survives."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from tiny_host import write_host

import bridge
from bridge.checkpoints.initialise import init
from bridge.contract import GRPO, SFT, AdamW, Batch, Sampling
from bridge.errors import BridgeError

BACKENDS = ("numpy", "torch", "jax", "mlx")
GREEDY = Sampling(temperature=0.0)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    out = tmp_path_factory.mktemp("contract")
    write_host(out / "host")
    init(out / "host", out / "some", heads=2, head_dim=4, layers="0,1")
    return out / "some"


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def model(place, backend):
    return bridge.load(place, backend=backend).implementation


def batch(model, rows=4, steps=6, seed=0, **more):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, model.config.vocab_size, (rows, steps + 1))
    mask = np.ones((rows, steps), bool)
    return Batch(tokens[:, :-1], np.arange(rows) // 2 + 2 * seed, mask, tokens[:, 1:], mask, **more)


@pytest.mark.parametrize(
    ("tokens", "keep", "words"),
    [
        ([1, 2], None, r"tokens is \[2\], but there are 3 rows"),
        ([1, 2, 3, 4], None, r"tokens is \[4\], but there are 3 rows"),
        ([1], None, r"tokens is \[1\], but there are 3 rows"),
        ([[1], [2], [3]], None, r"tokens is \[3, 1\]"),
        ([1, -1, 2], None, "tokens has an id outside"),
        ([1, 10**8, 2], None, "tokens has an id outside"),
        (None, [True, False], r"keep is \[2\], but there are 3 rows"),
        (None, [0, 2, 1], "keep must be bool, not int64"),
    ],
)
def test_a_wrong_step_is_refused_and_changes_nothing(model, tokens, keep, words):
    decoder = model.prefill([np.array([1, 2, 3])], [3], 4)
    decoder.sample(GREEDY)
    before = decoder.logits()
    with pytest.raises(BridgeError, match=f"^advance: {words}") as refused:
        decoder.advance(tokens and np.array(tokens), keep and np.array(keep))
    assert "\n" not in str(refused.value)
    np.testing.assert_array_equal(decoder.logits(), before)
    decoder.advance()
    assert decoder.logits().shape == before.shape


def test_what_stands_for_a_dropped_row_is_not_read(model):
    decoder = model.prefill([np.array([1, 2, 3])], [3], 4)
    decoder.advance(np.array([1, -5, 2]), np.array([True, False, True]))
    assert len(decoder.logits()) == 2


def test_past_the_steps_reserved_rows_stay_as_they_are(model):
    decoder = model.prefill([np.array([1, 2, 3])], [3], 3)
    for _ in range(2):
        decoder.advance(np.array([1, 2, 3]))
    before = decoder.logits()
    with pytest.raises(BridgeError, match="past the max_new_tokens that a row came with"):
        decoder.advance(np.array([1, 2, 3]), np.array([True, False, True]))
    np.testing.assert_array_equal(decoder.logits(), before)
    decoder.advance(np.array([1, 2, 3]), np.zeros(3, bool))  # nothing is fed
    assert len(decoder.logits()) == 0


def test_a_single_new_token_is_drawn_and_never_fed(model):
    decoder = model.prefill([np.array([1, 2, 3])], [2], 1)
    decoder.sample(GREEDY)
    with pytest.raises(BridgeError, match="past the max_new_tokens that a row came with"):
        decoder.advance()


def test_without_rows_there_is_nothing_to_draw(model):
    decoder = model.prefill([np.array([1, 2, 3])], [2], 4)
    decoder.advance(np.array([1, 2]), np.zeros(2, bool))
    assert decoder.sample(GREEDY).shape == (0,)
    decoder.advance()
    assert len(decoder.logits()) == 0


@pytest.mark.parametrize("layer", [2, 3, -1])
def test_a_layer_without_a_block_is_refused(model, layer):
    hidden = np.zeros((2, 3, model.config.hidden_size), np.float32)
    with pytest.raises(BridgeError, match=rf"layer {layer} has no Bridge block.*\[0, 1\]"):
        model.block(layer, hidden, np.zeros(2, int), np.ones((2, 3), bool))


def test_to_train_nothing_is_refused(model):
    with pytest.raises(BridgeError, match="trainable: no tensor is named"):
        model.trainer(SFT(), AdamW(), [])


def test_what_the_loss_does_not_read_has_a_gradient_of_zero(model):
    """At width 1 a softmax is 1, so that no q has a part in it (clause 3.8)."""
    name = "model.layers.0.bridge.q_proj.weight"
    _, grads = model.loss_and_grads(batch(model, rows=1), SFT(), [name])
    assert grads[name].shape == dict(model.tensors())[name].shape and not grads[name].any()


def test_a_step_that_was_cut_off_leaves_no_gradient(model, place, backend, monkeypatch):
    other = bridge.load(place, backend=backend).implementation
    names = ["model.norm.weight"]
    steady, cut = (m.trainer(SFT(), AdamW(), names) for m in (other, model))
    trainer = sys.modules[type(cut).__module__]
    usual, calls = trainer.loss_and_grads, []

    def fails_second(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return usual(*arguments, **keywords)

    monkeypatch.setattr(trainer, "loss_and_grads", fails_second)
    with pytest.raises(MemoryError):
        cut.step([batch(model, seed=1), batch(model, seed=2)])
    after = cut.step(batch(model))
    assert after == steady.step(batch(other))


def test_without_a_limit_a_norm_past_float32_leaves_gradients_as_they_are(model):
    trainer = model.trainer(
        GRPO(),
        AdamW(lr=1e-3, max_grad_norm=None),
        ["model.norm.weight", "model.embed_tokens.weight"],
    )
    huge = batch(model, advantages=np.array([1e25, -1e25, 1e25, -1e25], np.float32))
    trainer.step(huge)
    assert all(np.isfinite(a).all() for k, a in trainer.state().items() if k.startswith("master"))


def test_the_kl_of_a_policy_near_its_reference_is_above_0_and_right(model):
    """exp(d) - d - 1 of 1e-4 is all rounding in float32, and below 0 as often as not."""
    learnt = batch(model, advantages=np.ones(4))
    lp = np.asarray(model.logprobs(learnt), np.float64)
    for apart in (1e-4, -1e-4, 1e-3):
        near = replace(learnt, ref_logprobs=lp + apart)
        metrics, _ = model.loss_and_grads(near, GRPO(beta=0.1), ["model.norm.weight"])
        assert metrics["kl"] == pytest.approx(np.expm1(apart) - apart, rel=0.05)
