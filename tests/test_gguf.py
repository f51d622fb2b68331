"""GGUF files: what comes out is the host that they were written from, or they are refused by name.

The oracle is transformers: its logits with the host, and with what was read back.
"""

import numpy as np
import pytest
from gguf import GGMLQuantizationType, dequantize, quantize
from gguf_host import LLAMA3, host, logits, refused, write
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from bridge.checkpoints.gguf import export_gguf
from bridge.checkpoints.reading import open_checkpoint
from bridge.config import parse_config
from bridge_cli.main import app

HOSTS = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "biases of attention": ("llama", {"attention_bias": True}),
    "a head of its own width": ("llama", {"head_dim": 16}),
    "theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.5}}),
    "yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "yarn with betas": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 2.0,
                "beta_fast": 8.0,
                "beta_slow": 0.5,
            }
        },
    ),
    "llama3": ("llama", {"head_dim": 16, "rope_parameters": LLAMA3}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral with a window": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen2 with windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3 with biases": ("qwen3", {"head_dim": 8, "attention_bias": True}),
}


@pytest.mark.parametrize("name", HOSTS)
def test_what_comes_out_is_the_host_that_it_was_written_from(tmp_path, name):
    family, changes = HOSTS[name]
    model = host(family, **changes)
    export_gguf(write(tmp_path / "host.gguf", model), tmp_path / "out")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    np.testing.assert_array_equal(logits(back), logits(model))
    opened, state = open_checkpoint(tmp_path / "out"), model.state_dict()
    assert state.keys() - opened.specs.keys() <= {"lm_head.weight"}
    for tensor in opened.specs:
        np.testing.assert_array_equal(opened.tensors[tensor], state[tensor].numpy())
    ours, theirs = opened.config, parse_config(model.config.to_dict())
    for field in ("rope", "sliding_windows", "head_dim", "qkv_bias", "o_bias", "mlp_bias"):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.eos_token_ids == (0,)


def test_the_settings_matter_to_these_logits():
    """Without them the test above would pass whatever was dropped."""
    plain = logits(host())
    for name in ("theta", "linear", "yarn", "biases", "mistral with a window"):
        family, changes = HOSTS[name]
        other = host("llama" if "window" not in name else family, **changes)
        assert np.abs(logits(other) - plain).max() > 0.1 * np.abs(plain).max(), name
    default = {**LLAMA3, "rope_type": "default"}
    pair = [host(head_dim=16, rope_parameters=rope) for rope in (LLAMA3, default)]
    assert np.abs(logits(pair[0]) - logits(pair[1])).max() > 0.1 * np.abs(plain).max()


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_quantised_matrices_are_those_of_the_gguf_package(tmp_path, kind):
    model, how = host(hidden_size=64, intermediate_size=64), GGMLQuantizationType[kind]
    export_gguf(write(tmp_path / "host.gguf", model, kind=how), tmp_path / "out")
    opened = open_checkpoint(tmp_path / "out")
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        want = dequantize(quantize(model.state_dict()[name].numpy(), how), how)
        np.testing.assert_array_equal(opened.tensors[name], want)


class TestParts:
    """A model split over several files."""

    @pytest.fixture
    def first(self, tmp_path):
        return write(tmp_path / "host.gguf", host(), split=8)

    def test_all_are_read(self, first, tmp_path):
        assert len(list(tmp_path.glob("*.gguf"))) == 3 and "00001-of-00003" in first.name
        export_gguf(first, tmp_path / "out")
        back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        np.testing.assert_array_equal(logits(back), logits(host()))

    def test_one_that_is_not_there(self, first, tmp_path):
        (tmp_path / "host-00002-of-00003.gguf").unlink()
        refused(first, tmp_path, "part 1 of 3", "host-00002-of-00003.gguf", "--merge")
        for command in (["init"], ["convert"]):
            more = ["--to", "torch"] if command == ["convert"] else []
            done = CliRunner().invoke(app, [*command, str(first), str(tmp_path / "out"), *more])
            assert done.exit_code == 2 and "part 1 of 3" in done.output.replace("\n", " ")
            assert not (tmp_path / "out").exists()

    def test_not_the_first(self, first, tmp_path):
        second = tmp_path / "host-00002-of-00003.gguf"
        refused(second, tmp_path, "is part 2 of 3", first.name)

    def test_under_another_name(self, first, tmp_path):
        refused(first.rename(tmp_path / "model.gguf"), tmp_path, "part 1 of 3", "not named as such")

    def test_a_part_of_another_file(self, first, tmp_path):
        third = tmp_path / "host-00003-of-00003.gguf"
        second = (tmp_path / "host-00002-of-00003.gguf").read_bytes()
        third.write_bytes(second)
        refused(first, tmp_path, third.name, "part 3 of 3")

    def test_a_part_that_is_cut_off(self, first, tmp_path):
        second = tmp_path / "host-00002-of-00003.gguf"
        second.write_bytes(second.read_bytes()[:-4000])
        refused(first, tmp_path, second.name, "cannot be read as GGUF")


Q, NORM = "blk.1.attn_q.weight", "output_norm.weight"
TENSORS = {
    "a layer's is missing": ({"drop": (Q,)}, "tensor 'blk.1.attn_q.weight' is missing"),
    "the norm is missing": ({"drop": (NORM,)}, "tensor 'output_norm.weight' is missing"),
    "the embedding is missing": (
        {"drop": ("token_embd.weight",)},
        "tensor 'token_embd.weight' is missing",
    ),
    "one too many": (
        {"add": {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}},
        "tensor 'blk.0.attn_sinks.weight' is not one of a llama model",
    ),
    "a layer too many": (
        {"add": {"blk.2.attn_norm.weight": np.ones(32, np.float32)}},
        "tensor 'blk.2.attn_norm.weight' is not one of",
    ),
    "biases of some": (
        {"add": {"blk.0.attn_q.bias": np.ones(32, np.float32)}},
        "tensor 'blk.0.attn_k.bias' is missing",
    ),
    "factors that are none of llama3": (
        {"add": {"rope_freqs.weight": np.array([1, 2, 3, 8], np.float32)}},
        "rope_freqs.weight is not what llama3 scaling gives",
    ),
    "too few factors": (
        {"add": {"rope_freqs.weight": np.array([1, 8], np.float32)}},
        "rope_freqs.weight must be 4 numbers from 1 on",
    ),
    "factors beside linear scaling": (
        {
            "add": {"rope_freqs.weight": np.array([1, 1, 8, 8], np.float32)},
            "keys": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
        },
        "llama.rope.scaling.type 'linear' beside rope_freqs.weight",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_every_tensor_is_accounted_for(tmp_path, name):
    changes, message = TENSORS[name]
    refused(write(tmp_path / "host.gguf", host(), **changes), tmp_path, "host.gguf: ", message)


def test_a_count_past_the_end_is_no_reason_to_read_on(tmp_path):
    """Its reader would go on for as long as the count says."""
    path = write(tmp_path / "host.gguf", host(), keys={"general.numbers": [7, 7, 7]})
    data, many = path.read_bytes(), (2**22).to_bytes(8, "little")
    three = b"\x05\0\0\0" + (3).to_bytes(8, "little") + 3 * b"\x07\0\0\0"
    assert data.count(three) == 1
    data = data.replace(three, three[:4] + many + three[12:])
    path.write_bytes(data + bytes(-(len(data) - data.index(many)) % 4))  # whole numbers to the end
    refused(path, tmp_path, "host.gguf: cannot be read as GGUF (it ends early")


def test_a_tensor_that_is_not_finite_is_refused(tmp_path):
    norm = np.ones(32, np.float32)
    norm[7] = np.nan
    path = write(tmp_path / "host.gguf", host(), drop=(NORM,), add={NORM: norm})
    refused(path, tmp_path, "host.gguf: tensor 'output_norm.weight' holds nan at [7]")


def test_a_tensor_of_another_shape_is_refused(tmp_path):
    keys = {"llama.attention.head_count_kv": 4}
    message = "tensor 'blk.0.attn_k.weight' is [16, 32], but the metadata call for [32, 32]"
    refused(write(tmp_path / "host.gguf", host(), keys=keys), tmp_path, message)
