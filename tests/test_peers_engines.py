"""Real engines of `bridge bench --peers` run the host that they are given; those that are not
installed are skipped. They are asked in this process: `test_peers.py` is about the others."""

from importlib.util import find_spec

import numpy as np
import pytest
from tiny_host import write_host

from bridge.checkpoints.gguf import export_gguf
from bridge.checkpoints.initialise import init
from bridge.checkpoints.reading import open_checkpoint
from bridge.evaluation.peers import (
    bridge_engine,
    ctranslate2_engine,
    llama_cpp,
    mlx_lm_engine,
    transformers_engine,
)
from bridge.evaluation.peers.engine import Call, Entry, Setup
from bridge.evaluation.peers.gguf_file import write_gguf
from bridge.evaluation.peers.host import write_host as write_plain_host

PROMPT = (5, 80, 11, 200, 33, 7)
ENGINES = {
    "transformers": (transformers_engine, "transformers"),
    "llama.cpp": (llama_cpp, "xllamacpp"),
    "CTranslate2": (ctranslate2_engine, "ctranslate2"),
    "mlx-lm": (mlx_lm_engine, "mlx_lm"),
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint with blocks, and the host that peers get of it."""
    out = tmp_path_factory.mktemp("engines")
    init(write_host(out / "host", max_position_embeddings=256), out / "bridge", heads=2, head_dim=4)
    write_plain_host(open_checkpoint(out / "bridge"), out / "plain")
    return out / "bridge"


def setup(checkpoint, scratch, name="peer", backend="", weights="float32"):
    return Setup(
        entry=Entry(name, weights, bool(backend), "", "", backend),
        checkpoint=checkpoint,
        host=checkpoint.parent / "plain",
        scratch=scratch,
        device="cpu",
        threads=1,
        widest=3,
        context=len(PROMPT) + 12,
    )


def likeliest(session):
    call = Call(PROMPT, width=1, new=8, temperature=0.0)
    decoded = session.decode(call)
    decoded.check(call)
    return decoded.tokens[0]


@pytest.fixture(scope="module")
def ours(checkpoint, tmp_path_factory):
    """What the reference says."""
    return likeliest(
        bridge_engine.load(setup(checkpoint, tmp_path_factory.mktemp("s"), backend="numpy"))
    )


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_ours(checkpoint, tmp_path, ours, backend):
    session = bridge_engine.load(setup(checkpoint, tmp_path, backend=backend))
    assert likeliest(session) == ours
    check_draws(session)


@pytest.mark.parametrize("name", ENGINES)
def test_a_peer_runs_the_same_host(checkpoint, tmp_path, ours, name):
    engine, module = ENGINES[name]
    if find_spec(module) is None:
        pytest.skip(f"{module} is not installed: pip install 'bridge-llm[peers]'")
    given = setup(checkpoint, tmp_path)
    if hasattr(engine, "prepare"):
        engine.prepare(given)
    session = engine.load(given)
    assert likeliest(session) == ours
    check_draws(session)


def check_draws(session):
    """Rows of as many tokens as were asked for, past an end of text too; each draws for itself, and
    anew with another seed."""
    made = [session.decode(Call(PROMPT, width=3, new=12, seed=seed)) for seed in (1, 2)]
    for decoded in made:
        decoded.check(Call(PROMPT, width=3, new=12))
        assert decoded.first > 0 and decoded.all > 0
    rows = [tuple(row) for decoded in made for row in decoded.tokens]
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize(
    "family,changes",
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "head_dim": 8, "rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 9.0, "factor": 2.0}}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 8}),
    ],
)
def test_a_gguf_file_is_the_host(tmp_path, monkeypatch, family, changes):
    monkeypatch.setattr("bridge.checkpoints.gguf.save_tokenizer", lambda *_: None)  # made-up words
    host = open_checkpoint(write_host(tmp_path / "host", model_type=family, **changes))
    write_gguf(host, tmp_path / "host.gguf", "float32")
    export_gguf(tmp_path / "host.gguf", tmp_path / "back")
    back = open_checkpoint(tmp_path / "back")
    assert list(back.tensors) == list(host.tensors)
    for name, tensor in host.tensors.items():
        np.testing.assert_array_equal(back.tensors[name], tensor)
    same = (
        "model_type",
        "rope",
        "head_dim",
        "num_key_value_heads",
        "tie_word_embeddings",
        "qk_norm",
    )
    for field in (*same, "qkv_bias", "rms_norm_eps", "max_position_embeddings"):
        ours, theirs = getattr(host.config, field), getattr(back.config, field)
        assert theirs == (pytest.approx(ours) if isinstance(ours, float) else ours), field
