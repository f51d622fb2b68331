"""Inverse frequencies against transformers, in both spellings, and tables of cos and sin; settings
that are refused."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from true_float64 import true_float64

from bridge.config import parse_config
from bridge.errors import BridgeError
from bridge.rope import LENGTH, RopeConfig, inverse_frequencies, parse_rope, rotation_tables
from bridge_conformance.strategies import rope_settings

SIZES = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 32,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def theirs(raw):
    """transformers' inverse frequencies and cos/sin factor for a raw config, in float64."""
    with true_float64():
        config = LlamaConfig(**copy.deepcopy(raw))
        kind = config.rope_parameters["rope_type"]
        compute = LlamaRotaryEmbedding.compute_default_rope_parameters
        frequencies, factor = ROPE_INIT_FUNCTIONS.get(kind, compute)(config)
    assert frequencies.dtype == torch.float64
    return frequencies.numpy(), factor


@given(rope_settings(), st.sampled_from([2, 4, 8, 16, 64]))
def test_inverse_frequencies_are_those_of_transformers(settings, head_dim):
    raw = {**SIZES, "head_dim": head_dim, **settings}
    want, want_factor = theirs(raw)
    got, factor = inverse_frequencies(parse_config(raw).rope, head_dim)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, want, rtol=1e-14)
    assert factor == pytest.approx(want_factor, rel=1e-15)


@given(rope_settings(), st.sampled_from([2, 4, 16]), st.integers(0, 60))
def test_a_table_turns_a_head_by_its_position(settings, head_dim, position):
    """Clause 5.6: coordinates i and i + d/2 are a complex number, turned by position times f_i."""
    rope = parse_config({**SIZES, "head_dim": head_dim, **settings}).rope
    cos, sin = rotation_tables(rope, head_dim, position + 1)
    assert cos.shape == sin.shape == (position + 1, head_dim) and cos.dtype == np.float64
    left, right = np.random.default_rng(position).normal(size=(2, head_dim // 2))
    x, swapped = np.concatenate([left, right]), np.concatenate([right, left])
    frequencies, factor = inverse_frequencies(rope, head_dim)
    want = (left + 1j * right) * factor * np.exp(1j * position * frequencies)
    turned = x * cos[position] + swapped * sin[position]
    np.testing.assert_allclose(turned, np.concatenate([want.real, want.imag]), atol=1e-13)


REAL = {
    "llama 3.1": {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "max_position_embeddings": 131072,
    },
    "qwen3 with yarn": {
        "rope_theta": 1000000,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
        },
        "max_position_embeddings": 131072,
    },
    "linear": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
        "max_position_embeddings": 4096,
    },
}


@pytest.mark.parametrize("name", REAL)
def test_settings_of_released_models(name):
    raw = {**SIZES, "head_dim": 128, **REAL[name]}
    want, want_factor = theirs(raw)
    got, factor = inverse_frequencies(parse_config(raw).rope, 128)
    np.testing.assert_allclose(got, want, rtol=1e-14)
    assert factor == pytest.approx(want_factor, rel=1e-15)


def test_both_spellings_mean_the_same():
    kind = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
    older = {"rope_theta": 5e5, "rope_scaling": kind}
    legacy = {"type" if key == "rope_type" else key: value for key, value in kind.items()}
    newer = {"rope_parameters": {"rope_theta": 5e5, **kind}}
    both = {**older, **newer}
    spelled = [older, {"rope_theta": 5e5, "rope_scaling": legacy}, newer, both]
    assert len({parse_rope(raw, 64, "config.json") for raw in spelled}) == 1
    assert parse_rope({}, 64, "config.json") == RopeConfig()


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
SAME = {  # settings as hosts and other programs write them, and what they come to
    "attention_factor is an integer": ({**YARN, "attention_factor": 2}, 2.0),
    "attention_factor before mscale": (
        {**YARN, "attention_factor": 0.5, "mscale": 0.7, "mscale_all_dim": 1.3},
        0.5,
    ),
    "attention_factor is null": ({**YARN, "attention_factor": None}, None),
    "both mscale": ({**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}, None),
    "mscale_all_dim is 0": ({**YARN, "mscale": 0.7, "mscale_all_dim": 0}, None),
    "mscale is 0": ({**YARN, "mscale": 0.0, "mscale_all_dim": 1.3}, None),
    "mscale alone": ({**YARN, "mscale": 0.7}, None),
    "betas of their own": ({**YARN, "beta_fast": 8, "beta_slow": 2.0}, None),
    "betas are null": ({**YARN, "beta_fast": None, "beta_slow": None}, None),
    "not truncated": ({**YARN, "beta_fast": 4, "truncate": False}, None),
    "as YaRN's own code": (
        {**YARN, "attn_factor": 1.0, "extrapolation_factor": 1, "finetuned": True},
        1 + 0.1 * math.log(4),
    ),
}


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("name", SAME)
def test_settings_of_yarn_mean_what_they_mean_to_transformers(name, spelling):
    settings, known = SAME[name]
    raw = {**SIZES, "head_dim": 16, spelling: settings}
    want, want_factor = theirs(raw)
    got, factor = inverse_frequencies(parse_config(raw).rope, 16)
    np.testing.assert_allclose(got, want, rtol=1e-14)
    assert factor == pytest.approx(want_factor, rel=1e-15)
    assert known is None or factor == known


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
@pytest.mark.parametrize("inside", [{}, {LENGTH: 16}])
def test_the_length_before_scaling_may_stand_outside(kind, inside):
    more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    inside = inside if kind != "linear" else {}
    settings = {"rope_type": kind, "factor": 4.0, **more, **inside}
    raw = {**SIZES, "head_dim": 16, "rope_scaling": settings, LENGTH: 16}
    want, want_factor = theirs(raw)
    rope = parse_config(raw).rope
    got, factor = inverse_frequencies(rope, 16)
    np.testing.assert_allclose(got, want, rtol=1e-14)
    assert factor == pytest.approx(want_factor, rel=1e-15)
    assert getattr(rope, LENGTH) == (None if kind == "linear" else 16)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
REFUSED = {
    "rope_scaling must be an object": {"rope_scaling": "yarn"},
    "rope_parameters must be an object": {"rope_parameters": ["linear"]},
    "'dynamic' is not supported": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "'longrope' is not supported": {"rope_parameters": {"rope_type": "longrope"}},
    "rope type 3 is not supported": {"rope_parameters": {"rope_type": 3}},
    "rope type ['yarn'] is not supported": {"rope_parameters": {"rope_type": ["yarn"]}},
    "rope_type 'yarn' and type 'linear' disagree": {
        "rope_scaling": {"rope_type": "yarn", "type": "linear", "factor": 2.0}
    },
    "partial_rotary_factor": {"rope_parameters": {"partial_rotary_factor": 0.5}},
    "unknown key 'factor' for rope type 'default'": {"rope_parameters": {"factor": 2.0}},
    "unknown key 'short_factor'": {
        "rope_scaling": {"type": "linear", "factor": 2.0, "short_factor": [1.0]}
    },
    "rope type 'linear' needs 'factor'": {"rope_scaling": {"rope_type": "linear"}},
    "rope type 'llama3' needs 'low_freq_factor'": {
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}
    },
    "rope type 'yarn' needs 'factor'": {"rope_scaling": {"rope_type": "yarn"}},
    "factor must be a positive number, not -2": {
        "rope_scaling": {"rope_type": "linear", "factor": -2}
    },
    "factor must be a positive number, not nan": {
        "rope_scaling": {"rope_type": "linear", "factor": float("nan")}
    },
    "factor must be a positive number, not True": {
        "rope_scaling": {"rope_type": "linear", "factor": True}
    },
    "rope_theta must be a positive number, not 0": {"rope_theta": 0},
    "rope_theta must be a positive number, not '1e4'": {"rope_theta": "1e4"},
    "rope_theta must be a positive number, not 'abc'": {
        "rope_theta": "abc",
        "rope_parameters": {"rope_theta": 5e5},
    },
    "rope_theta must be a positive number, not 1000": {"rope_theta": 10**400},
    "rope_theta must be a positive number, not inf": {
        "rope_parameters": {"rope_theta": float("inf")}
    },
    "attn_factor 1.2 is not read by transformers": {"rope_scaling": {**YARN, "attn_factor": 1.2}},
    "attn_factor True is not read by transformers": {"rope_scaling": {**YARN, "attn_factor": True}},
    "extrapolation_factor True is not": {"rope_parameters": {**YARN, "extrapolation_factor": True}},
    "finetuned 1 is not read": {"rope_scaling": {**YARN, "finetuned": 1}},
    "partial_rotary_factor other than 1": {"rope_parameters": {"partial_rotary_factor": True}},
    "extrapolation_factor 0 is not": {"rope_parameters": {**YARN, "extrapolation_factor": 0}},
    "finetuned 'yes' is not read": {"rope_scaling": {**YARN, "finetuned": "yes"}},
    "unknown key 'attn_factor' for rope type 'linear'": {
        "rope_scaling": {"type": "linear", "factor": 2.0, "attn_factor": 1.0}
    },
    "mscale must be a positive number, not -1": {"rope_scaling": {**YARN, "mscale": -1}},
    "attention_factor must be a positive number, not 0": {
        "rope_scaling": {**YARN, "attention_factor": 0}
    },
    "original_max_position_embeddings 16 disagrees with 32 outside": {
        "rope_scaling": YARN,
        LENGTH: 32,
    },
    "truncate must be true or false, not None": {"rope_scaling": {**YARN, "truncate": None}},
    "truncate must be true or false, not 1": {
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": 1}
    },
    "original_max_position_embeddings must be a positive integer, not 8.5": {
        "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8.5}
    },
    "low_freq_factor must be below high_freq_factor": {
        "rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}
    },
    "rope_parameters and rope_scaling disagree": {
        "rope_parameters": {"rope_type": "linear", "factor": 2.0},
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "rope_theta 10000 disagrees": {"rope_theta": 10000, "rope_parameters": {"rope_theta": 5e5}},
    "rope_theta must be above 1 for rope type 'yarn'": {
        "rope_theta": 1.0,
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0},
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_settings_are_refused_in_one_line(message):
    with pytest.raises(BridgeError) as caught:
        parse_config({**SIZES, **REFUSED[message]}, "some/config.json")
    assert str(caught.value).startswith("some/config.json: rope_")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
