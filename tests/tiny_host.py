"""A tiny random host on disk, written with the libraries that others write checkpoints with.

One token a byte after `<eos>`, so any text is a prompt. At temperature 0 no row ever says `<eos>`,
whose logit is always 0.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from bridge.config import parse_config, tensor_shapes

CHAT = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CONFIG = {
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 200_000,
    "tie_word_embeddings": False,
}


def write_host(path: Path, *, eos: bool = True, chat: bool = True, **config) -> Path:
    """Make the host directory `path`; `config` changes its config.json."""
    path.mkdir()
    raw = {**CONFIG, **config}
    (path / "config.json").write_text(json.dumps(raw))
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.normal(scale=0.3, size=shape).astype(np.float32)
        for name, shape in tensor_shapes(parse_config(raw)).items()
    }
    if "lm_head.weight" in tensors:
        tensors["lm_head.weight"][0] = 0
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<eos>": 0} | {letter: 1 + i for i, letter in enumerate(letters)}
    fast = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<eos>"])
    fast.save(str(path / "tokenizer.json"))
    settings = ({"eos_token": "<eos>"} if eos else {}) | ({"chat_template": CHAT} if chat else {})
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path
