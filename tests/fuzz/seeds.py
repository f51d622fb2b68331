"""Small valid checkpoints of every form, in memory, as the libraries that others use write them.

A tree maps paths to entries: bytes, or what else a directory may hold. `model/` is the checkpoint
that is opened; beside it lie the base of an adapter, and files that nobody may read.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import BertProcessing, TemplateProcessing

from bridge.config import parse_config, tensor_shapes


@dataclass(frozen=True)
class Link:
    """A symbolic link."""

    target: str


@dataclass(frozen=True)
class Special:
    """`fifo`, a pipe that nobody writes to; `folder`, an empty directory; `absent`, no entry."""

    kind: str


Entry = bytes | Link | Special
Tree = dict[str, Entry]
Tensors = dict[str, np.ndarray]

CHAT = (
    "{% for message in messages %}<{{ message.role }}>{{ message['content'] | trim }}\n"
    "{% if loop.first and message.role == 'system' %}{% continue %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token ~ '<assistant>' }}{% endif %}"
)
HOST: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 0,
}
BLOCK = {
    "spec_version": "1.0",
    "kind": "attention",
    "num_heads": 2,
    "head_dim": 4,
    "layers": [0, 1],
    "norm_eps": 1e-6,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "rope_theta": 10000.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
    "truncate": True,
    "attention_factor": 1.1,
    "original_max_position_embeddings": 32,
}


@cache
def seeds() -> Mapping[str, Tree]:
    """Every seed by name; each opens without a fault."""
    return {make.__name__.removeprefix("_"): {**OUTSIDE, **make()} for make in MAKERS}


def _torch() -> Tree:
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **HOST,
        "tie_word_embeddings": False,
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA3,
        "attention_bias": True,
        "mlp_bias": True,
        "bridge": BLOCK,
    }
    tensors = _tensors(config, np.float32)
    return {
        "model/config.json": _json(config),
        "model/model.safetensors": save(tensors, {"format": "pt"}),
        "model/tokenizer.json": _byte_level(),
        "model/tokenizer_config.json": _json({"eos_token": "<eos>", "bos_token": "<eos>"}),
        "model/chat_template.jinja": CHAT.encode(),
        "model/generation_config.json": _json({"eos_token_id": [0, 3], "do_sample": True}),
    }


def _sharded() -> Tree:
    config = {
        "model_type": "qwen2",
        **HOST,
        "tie_word_embeddings": True,
        "rope_parameters": YARN,
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 1,
        "layer_types": ["full_attention", "sliding_attention"],
        "bridge": {**BLOCK, "kind": "mlp", "layers": [1]},
    }
    tensors = _tensors(config, ml_dtypes.bfloat16)
    tokenizer = {"eos_token": {"content": "</s>"}, "chat_template": CHAT}
    return {
        "model/config.json": _json(config),
        **_shards(tensors, ("pt", "pt")),
        "model/tokenizer.json": _sentencepiece(),
        "model/tokenizer_config.json": _json(tokenizer),
    }


def _adapter() -> Tree:
    host = {
        "model_type": "qwen3",
        **HOST,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
    }
    whole = {**host, "bridge": BLOCK}
    tensors = _tensors(whole, np.float16)
    blocks = {name: array for name, array in tensors.items() if ".bridge." in name}
    rest = {name: array for name, array in tensors.items() if name not in blocks}
    said = {"spec_version": "1.0", "base": "../base", "base_sha256": _content_hash(rest)}
    named = [{"name": "default", "template": CHAT}, {"name": "tool_use", "template": "{{ tools }}"}]
    return {
        "model/config.json": _json(whole),
        "model/bridge_adapter.json": _json(said),
        "model/model.safetensors": save(blocks, {"format": "pt"}),
        "base/config.json": _json(host),
        "base/model.safetensors": save(rest, {"format": "pt"}),
        "base/tokenizer.json": _unigram(),
        "base/tokenizer_config.json": _json({"eos_token": "</s>", "chat_template": named}),
    }


def _jax() -> Tree:
    config = {
        "model_type": "mistral",
        **HOST,
        "num_hidden_layers": 3,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "bridge": {**BLOCK, "layers": [0, 2]},
    }
    stacks: dict[str, list[np.ndarray]] = {}
    for name, array in _tensors(config, np.float32).items():
        if name.startswith("model.layers.1.mlp.up_proj"):
            array = array.astype(np.float16)  # layers of two dtypes stay apart
        stack = re.sub(r"^model\.layers\.\d+\.", "model.layers.*.", name)
        stacks.setdefault(name if "mlp.up_proj" in name else stack, []).append(array)
    tensors = {n: np.stack(a) if "*" in n else a[0] for n, a in stacks.items()}
    return {
        "model/config.json": _json(config),
        "model/model.safetensors": save(tensors, {"format": "jax"}),
    }


def _mlx() -> Tree:
    config = {
        "model_type": "llama",
        **HOST,
        "hidden_size": 32,
        "intermediate_size": 64,
        "tie_word_embeddings": False,
        "quantization": {"group_size": 32, "bits": 4, "mode": "affine"},
        "quantization_config": {"group_size": 32, "bits": 4, "mode": "affine"},
        "bridge": BLOCK,
    }
    host: Tensors = {}
    blocks: Tensors = {}
    rng = np.random.default_rng(1)
    for name, array in _tensors(config, ml_dtypes.bfloat16).items():
        if ".bridge." in name:
            blocks[name] = array
        elif array.ndim == 1 or array.shape[1] % 32 or "layers.1.mlp" in name:
            host[name] = array
        else:
            groups = (array.shape[0], array.shape[1] // 32)
            path = name.removesuffix(".weight")
            words = rng.integers(2**32, size=(groups[0], groups[1] * 4), dtype=np.uint32)
            host[name] = words
            host[path + ".scales"] = rng.normal(size=groups).astype(array.dtype)
            host[path + ".biases"] = rng.normal(size=groups).astype(array.dtype)
    weight_map = dict.fromkeys(host, "model.safetensors")
    weight_map |= dict.fromkeys(blocks, "bridge.safetensors")
    return {
        "model/config.json": _json(config),
        "model/model.safetensors": save(host, {"format": "mlx"}),
        "model/bridge.safetensors": save(blocks, {"format": "mlx"}),
        "model/model.safetensors.index.json": _json({"metadata": {}, "weight_map": weight_map}),
        "model/tokenizer.json": _word_piece(),
    }


def _lora() -> Tree:
    """A host whose updates are as PEFT saves them."""
    config = {"model_type": "qwen2", **HOST, "tie_word_embeddings": True, "bridge": BLOCK}
    tensors = _tensors(config, np.float32)
    targets = {"self_attn.k_proj": (4, 8), "mlp.down_proj": (8, 12)}
    rng = np.random.default_rng(2)
    updates: Tensors = {}
    for layer in range(2):
        for target, (outward, inward) in targets.items():
            stem = f"base_model.model.model.layers.{layer}.{target}.lora_"
            updates[f"{stem}A.weight"] = rng.normal(size=(3, inward)).astype(np.float32)
            updates[f"{stem}B.weight"] = rng.normal(size=(outward, 3)).astype(np.float32)
    said = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 3,
        "lora_alpha": 6,
        "lora_dropout": 0.05,
        "target_modules": ["k_proj", "mlp.down_proj"],
        "exclude_modules": ["bridge.k_proj"],
        "bias": "none",
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "use_rslora": False,
    }
    return {
        "model/config.json": _json(config),
        "model/model.safetensors": save(tensors, {"format": "pt"}),
        "model/lora/adapter_config.json": _json(said),
        "model/lora/adapter_model.safetensors": save(updates, {"format": "pt"}),
    }


OUTSIDE: Tree = {
    "outside/secret.txt": b"a secret\n",
    "outside/model.safetensors": save({"secret": np.ones(4, np.float32)}),
    "outside/tokenizer_config.json": b'{"eos_token": "secret"}',
}
MAKERS: tuple[Callable[[], Tree], ...] = (_torch, _sharded, _adapter, _jax, _mlx, _lora)


def _tensors(config: Mapping[str, Any], dtype: Any) -> Tensors:
    """Random weights of a config, in canonical order."""
    rng = np.random.default_rng(0)
    shapes = tensor_shapes(parse_config(config))
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def _shards(tensors: Tensors, formats: tuple[str, ...]) -> Tree:
    """Shards of about as many tensors each, with their index."""
    names, count = list(tensors), len(formats)
    size = -(-len(names) // count)
    tree: Tree = {}
    weight_map = {}
    for i, form in enumerate(formats):
        file = f"model-{i + 1:05}-of-{count:05}.safetensors"
        part = {name: tensors[name] for name in names[i * size : (i + 1) * size]}
        tree[f"model/{file}"] = save(part, {"format": form})
        weight_map |= dict.fromkeys(part, file)
    total = sum(array.nbytes for array in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return {"model/model.safetensors.index.json": _json(index), **tree}


def _content_hash(tensors: Tensors) -> str:
    """Clause 9.5, from its words alone."""
    digest = hashlib.sha256()
    for name, array in tensors.items():
        code = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[array.dtype.name]
        digest.update(json.dumps([name, code, list(array.shape)]).encode() + array.tobytes())
    return digest.hexdigest()


def _byte_level() -> bytes:
    vocab = {"<eos>": 0} | {letter: 1 + i for i, letter in enumerate("abcdehiru0123456789Ġ<>.")}
    fast = Tokenizer(models.BPE(vocab=vocab | {"ab": 29}, merges=[("a", "b")]))
    fast.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ?[a-z]+| ?[0-9]{1,3}|[^a-z0-9]+", "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<eos>"])
    fast.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 0)])
    return fast.to_str(pretty=False).encode()


def _sentencepiece() -> bytes:
    vocab = {"</s>": 0, "<unk>": 1, "▁": 2, "a": 3, "b": 4, "ab": 5, "<0x41>": 6, "<0xC3>": 7}
    fast = Tokenizer(
        models.BPE(vocab, [("a", "b")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    fast.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip()]
    )
    fast.add_special_tokens(["</s>"])
    fast.add_tokens([AddedToken("<tool>", normalized=False)])
    return fast.to_str(pretty=False).encode()


def _unigram() -> bytes:
    vocab = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("a", -2.5), ("b", -3.0), ("ab", -3.5)]
    fast = Tokenizer(models.Unigram(vocab, unk_id=0))
    fast.normalizer = normalizers.NFKC()
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Metaspace()
    fast.add_special_tokens(["</s>"])
    fast.enable_truncation(50)
    fast.enable_padding(pad_id=1, pad_token="</s>")
    return fast.to_str(pretty=False).encode()


def _word_piece() -> bytes:
    vocab = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3, "##b": 4, "b": 5, "##a": 6}
    fast = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    fast.normalizer = normalizers.BertNormalizer()
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.decoder = decoders.WordPiece()
    fast.post_processor = BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    fast.add_special_tokens(["[CLS]", "[SEP]"])
    return fast.to_str(pretty=False).encode()


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode()
