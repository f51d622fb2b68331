"""Keys of a GGUF file's metadata: each is carried over, says nothing, or is refused by its name."""

import json

import numpy as np
import pytest
from gguf_host import LLAMA3, host, logits, refused, write
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from bridge.checkpoints.gguf import export_gguf
from bridge.checkpoints.reading import open_checkpoint

YARN = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
KEYS = {
    "holds 'adapter' (general.type)": {"general.type": "adapter"},
    "holds 'mmproj' (general.type)": {"general.type": "mmproj"},
    "llama.logit_scale 0.5 is not supported": {"llama.logit_scale": 0.5},
    "llama.expert_count 8 is not": {"llama.expert_count": 8},
    "llama.attn_logit_softcapping 50.0": {"llama.attn_logit_softcapping": 50.0},
    "llama.attention.temperature_length 8192 is not known": {
        "llama.attention.temperature_length": 8192
    },
    "llama.something_new 'x' is not known": {"llama.something_new": "x"},
    "qwen2.rope.freq_base is not a key of the architecture llama": {"qwen2.rope.freq_base": 1e6},
    "adapter.lora.alpha is not a key": {"adapter.lora.alpha": 16.0},
    "llama.attention.value_length 16 is not the width of a head": {
        "llama.attention.value_length": 16
    },
    "llama.rope.dimension_count 4 is not the width of a head": {"llama.rope.dimension_count": 4},
    "llama.vocab_size is 300, but token_embd.weight has 261 rows": {"llama.vocab_size": 300},
    "llama.feed_forward_length [48, 64] is not one value for all layers": {
        "llama.feed_forward_length": [48, 64]
    },
    "llama.rope.scaling.type 'longrope' is not supported": {"llama.rope.scaling.type": "longrope"},
    "llama.rope.scaling.yarn_ext_factor 0.5": {**YARN, "llama.rope.scaling.yarn_ext_factor": 0.5},
    "llama.rope.scaling.yarn_attn_factor 1.0 is the factor of cos and sin to some": {
        **YARN,
        "llama.rope.scaling.yarn_attn_factor": 1.0,
    },
    "llama.rope.scaling.attn_factor 1.5 is not": {"llama.rope.scaling.attn_factor": 1.5},
    "llama.rope.scaling.yarn_log_multiplier 1.0 is not known": {
        **YARN,
        "llama.rope.scaling.yarn_log_multiplier": 1.0,
    },
    "llama.rope.scaling.factor must be a number, not 'two'": {"llama.rope.scaling.factor": "two"},
    "llama.attention.sliding_window_pattern is not of all layers": {
        "llama.attention.sliding_window": 5,
        "llama.attention.sliding_window_pattern": [True, False],
    },
    "llama.attention.sliding_window_pattern [True] is not of 2 layers": {
        "llama.attention.sliding_window": 5,
        "llama.attention.sliding_window_pattern": [True],
    },
    "llama.block_count is missing": {"llama.block_count": None},
    "llama.attention.layer_norm_rms_epsilon is missing": {
        "llama.attention.layer_norm_rms_epsilon": None
    },
    "rms_norm_eps must be a positive number": {"llama.attention.layer_norm_rms_epsilon": 0.0},
    "eos_token_id 900 is not a token": {"tokenizer.ggml.eos_token_id": 900},
    "tokenizer.ggml.pre 'deepseek-llm' is a way of splitting": {
        "tokenizer.ggml.pre": "deepseek-llm"
    },
    "tokenizer.ggml.normalizer.lowercase True is not known": {
        "tokenizer.ggml.normalizer.lowercase": True
    },
    "tokenizer.ggml.remove_extra_whitespaces True": {
        "tokenizer.ggml.remove_extra_whitespaces": True
    },
    "transformers cannot make its tokenizer": {"tokenizer.ggml.model": "rwkv"},
}


@pytest.fixture(scope="module")
def small():
    return host()


@pytest.mark.parametrize("message", KEYS)
def test_every_key_is_carried_over_or_refused_by_name(small, tmp_path, message):
    path = write(tmp_path / "host.gguf", small, keys=KEYS[message])
    refused(path, tmp_path, "host.gguf: ", message)


def test_a_window_of_qwen2_that_does_not_say_its_layers_is_refused(tmp_path):
    keys = {"qwen2.attention.sliding_window": 5}
    path = write(tmp_path / "host.gguf", host("qwen2"), keys=keys)
    refused(path, tmp_path, "qwen2.attention.sliding_window 5 does not say for which layers")


@pytest.mark.parametrize("architecture", ["mamba", "qwen3moe", "mistral3"])
def test_other_architectures_are_refused(small, tmp_path, architecture):
    path = write(tmp_path / "host.gguf", small)
    old, new = (len(name).to_bytes(8, "little") + name.encode() for name in ("llama", architecture))
    path.write_bytes(path.read_bytes().replace(b"\x08\0\0\0" + old, b"\x08\0\0\0" + new, 1))
    refused(path, tmp_path, f"architecture {architecture!r} is not supported")


def test_keys_that_say_nothing_pass(small, tmp_path):
    keys = {
        "general.type": "model",
        "general.license": "apache-2.0",
        "general.tags": ["text-generation"],
        "quantize.imatrix.entries_count": 12,
        "llama.attention.causal": True,
        "llama.attention.head_count_kv": [2, 2],
        "llama.attention.sliding_window": 128,  # no narrower than the context
        "llama.expert_count": 0,
        "llama.logit_scale": 1.0,
        "llama.rope.scaling.type": "none",
        "llama.rope.scaling.attn_factor": 1.0,
        "llama.rope.scaling.finetuned": False,
        "llama.tensor_data_layout": "Meta AI original pth",
        "tokenizer.ggml.fim_pre_token_id": 3,
        "tokenizer.chat_template.tool_use": "{{ tools }}",
    }
    ones = {"rope_freqs.weight": np.ones(4, np.float32)}
    old = {"blk.0.attn_rot_embd": np.ones(4, np.float32)}  # frequencies, which are computed
    path = write(tmp_path / "host.gguf", small, keys=keys, add={**ones, **old})
    export_gguf(path, tmp_path / "out")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert back.config.model_type == "llama"
    np.testing.assert_array_equal(logits(back), logits(small))


def test_what_the_file_leaves_out_is_as_in_llama_cpp(tmp_path):
    model = host(num_key_value_heads=4)
    names = ("attention.head_count_kv", "attention.key_length", "attention.value_length")
    names += ("rope.dimension_count", "rope.freq_base", "vocab_size")
    drop = tuple(f"llama.{name}" for name in names)
    keys = {"llama.rope.scale_linear": 2.0}
    export_gguf(write(tmp_path / "host.gguf", model, drop=drop, keys=keys), tmp_path / "out")
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    want = logits(host(num_key_value_heads=4, rope_parameters=linear))
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    np.testing.assert_array_equal(logits(back), want)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_factors_of_llama_3_are_known_again(tmp_path, factor):
    """Of Llama 3.1 and 3.2, as they are released; the file has no more of it than 64 numbers."""
    rope = {**LLAMA3, "rope_theta": 500000.0, "factor": factor}
    rope["original_max_position_embeddings"] = 8192
    model = host(head_dim=128, rope_parameters=rope, max_position_embeddings=131072)
    export_gguf(write(tmp_path / "host.gguf", model), tmp_path / "out")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["rope_parameters"] == rope


def split(path, text):
    """The tokens of `text`, of the tokenizer in the directory `path`."""
    return Tokenizer.from_file(str(path / "tokenizer.json")).encode(text).tokens


@pytest.mark.parametrize(
    ("keys", "want"),
    [
        ({"pre": "smollm"}, ["a", "ĠĠ", "1", "1"]),  # each digit for itself, then as GPT-2
        ({"pre": "gpt-2"}, ["a", "Ġ", "Ġ1", "1"]),
        ({"pre": "llama-bpe"}, ["a", "Ġ", "Ġ", "11"]),
        ({"pre": "qwen2", "add_bos_token": True}, ["<bos>", "a", "Ġ", "Ġ", "1", "1"]),
    ],
)
def test_text_is_split_as_the_file_says(small, tmp_path, keys, want):
    keys = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    export_gguf(write(tmp_path / "host.gguf", small, keys=keys), tmp_path / "out")
    assert split(tmp_path / "out", "a  11") == want


@pytest.mark.parametrize(("space", "want"), [(True, ["▁a", "b", "▁a"]), (False, ["a", "b", "▁a"])])
def test_a_space_is_put_first_only_where_the_file_says_so(small, tmp_path, space, want):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(250)), "▁", "a", "b", "▁a"]
    types = [2, 3, 3] + [6] * 250 + [1] * 4
    said = {"model": "llama", "pre": "default", "tokens": tokens, "token_type": types}
    said |= {"scores": [0.0] * len(tokens), "add_space_prefix": space, "merges": None}
    said |= {"add_bos_token": False}
    keys = {f"tokenizer.ggml.{key}": value for key, value in said.items()}
    export_gguf(write(tmp_path / "host.gguf", small, keys=keys), tmp_path / "out")
    assert split(tmp_path / "out", "ab a") == want
    made = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert made.decode(made.encode("ab a").ids) == "ab a"


def test_a_response_may_end_at_the_end_of_a_turn(small, tmp_path):
    keys = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 0}
    export_gguf(write(tmp_path / "host.gguf", small, keys=keys), tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").config.eos_token_ids == (0, 5)
    said = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert said == {"bos_token_id": 1, "eos_token_id": [0, 5]}
