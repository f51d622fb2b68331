"""The main job on a real model: SmolLM2-135M with fresh blocks is transformers' SmolLM2."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bridge
from bridge.checkpoints.initialise import init

QUESTIONS = (
    "There are 5 bags with 8 marbles in each bag. How many marbles are there in total?",
    "Write one sentence about the sea.",
)


@pytest.fixture(scope="module")
def with_blocks(smollm2, tmp_path_factory):
    out = tmp_path_factory.mktemp("smollm2") / "bridge"
    init(smollm2, out, heads=4, head_dim=32)
    return bridge.load(out, backend="torch")


@pytest.fixture(scope="module")
def host(smollm2):
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


def test_the_chat_template_and_eos_survive(smollm2, with_blocks):
    theirs = AutoTokenizer.from_pretrained(smollm2)
    turns = [{"role": "user", "content": QUESTIONS[0]}]
    want = theirs.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert with_blocks.tokenizer.encode_chat(turns) == list(want)
    assert with_blocks.eos_ids == (theirs.eos_token_id,) == (2,)
    assert theirs.eos_token == "<|im_end|>"


def test_logits_are_the_hosts_within_float32_rounding(smollm2, with_blocks, host):
    """Our error against our own float64 is no more than transformers' is, up to a small factor."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, with_blocks.config.vocab_size, size=(3, 24))
    with torch.inference_mode():
        theirs = host(torch.from_numpy(tokens)).logits.numpy()
    exact = bridge.load(smollm2, backend="torch", dtype="float64")
    exact = exact.logits(tokens, groups=[0, 1, 2])
    ours = with_blocks.logits(tokens, groups=[0, 0, 1])  # fresh blocks: groups do not matter
    their_error = np.abs(theirs - exact).max()
    assert np.abs(ours - exact).max() <= 4 * their_error
    assert np.abs(ours - theirs).max() <= 5 * their_error < 1e-3 * np.abs(exact).max()


@pytest.mark.parametrize("question", QUESTIONS)
def test_greedy_continuation_is_transformers_generate(with_blocks, host, question):
    ids = with_blocks.tokenizer.encode_chat([{"role": "user", "content": question}])
    with torch.inference_mode():
        theirs = host.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=64,
            do_sample=False,
        )[0, len(ids) :].tolist()
    [answers] = with_blocks.generate([ids], width=3, max_new_tokens=64, temperature=0)
    assert len(theirs) >= 16
    for response in answers.responses:
        assert response.tokens == theirs
