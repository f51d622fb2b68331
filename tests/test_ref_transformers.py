"""The reference's host forward against transformers, in float64, on random configs of every family.

Both spellings of rope settings, all rope types, GQA, biases, q/k norm, sliding windows, tied and
untied embeddings, left padding: to 1e-10 relative, with transformers' casts to float32 lifted.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM
from true_float64 import true_float64

from bridge.config import FAMILIES
from bridge_conformance import strategies
from bridge_conformance.cases import ModelCase
from bridge_ref.model import forward


def transformers_logits(raw, tensors, tokens, active, positions):
    config = AutoConfig.for_model(**raw)
    config._attn_implementation = "eager"
    with true_float64(), torch.no_grad():
        host = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
        state = {name: torch.tensor(array) for name, array in tensors.items()}
        lacking, unknown = host.load_state_dict(state, strict=False)
        assert not unknown and lacking in ([], ["lm_head.weight"])
        logits = host(
            torch.tensor(tokens),
            attention_mask=torch.tensor(active).long(),
            position_ids=torch.tensor(positions),
        ).logits
    assert logits.dtype == torch.float64
    return logits.numpy()


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=15)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_host_logits_are_transformers(family, data, seed):
    raw = data.draw(strategies.host_configs((family,)))
    case = ModelCase(raw, seed)
    rng = np.random.default_rng(seed)
    # A window spans timesteps in transformers, positions here: the same without gaps.
    starts = rng.integers(0, 4, size=3)
    tokens = rng.integers(0, raw["vocab_size"], (3, 9))
    active = np.arange(9) >= starts[:, None]
    positions = np.maximum(np.cumsum(active, axis=1) - 1, 0)
    tensors = case.tensors("float64")
    got, _ = forward(case.config, tensors, tokens, np.zeros(3, int), active, positions)
    want = transformers_logits(raw, tensors, tokens, active, positions)
    scale = np.abs(want[active]).max()
    np.testing.assert_allclose(got[active], want[active], rtol=1e-10, atol=1e-10 * scale)
