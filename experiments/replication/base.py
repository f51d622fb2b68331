"""The base model of the experiment: a small decoder, pretrained on demonstrations of a task.

It learns, say, to write out random trials, to compute their values and verdicts, and to answer with
a trial that came out right: all that a single row can do. What rows can do together it has not
seen.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

import bridge
from bridge.checkpoints.reading import open_checkpoint
from bridge.checkpoints.safetensors_io import specs_of
from bridge.checkpoints.writing import write_checkpoint
from bridge.config import parse_config, tensor_shapes
from bridge.contract import SFT, AdamW
from bridge.tasks.synthetic import Synthetic
from bridge.training.batches import Group, make_batch
from bridge.training.schedule import learning_rate

EOS = "<eos>"
OPTIMIZER = AdamW(lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)
WARMUP = 50
LUCKY = 0.5  # of the demonstrations in the first half of pretraining; see `pretrain`


@dataclass(frozen=True)
class Size:
    """Of the decoder."""

    width: int = 96
    ffn: int = 256
    layers: int = 3
    heads: int = 4
    context: int = 64


def write_fresh(path: Path, task: Synthetic, size: Size, seed: int) -> None:
    """A checkpoint with random weights, and a tokenizer of the task's words."""
    words = [EOS, *task.vocabulary()]
    raw = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(words),
        "hidden_size": size.width,
        "intermediate_size": size.ffn,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "max_position_embeddings": size.context,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
    }
    rng = np.random.default_rng(seed)
    tensors = {
        name: np.ones(shape, np.float32)
        if len(shape) == 1
        else rng.normal(scale=0.02 if "embed" in name else 0.04, size=shape).astype(np.float32)
        for name, shape in tensor_shapes(parse_config(raw)).items()
    }
    write_checkpoint(path, raw, specs_of(tensors), tensors.items())
    vocab = {word: i for i, word in enumerate(words)}
    fast = Tokenizer(models.WordLevel(vocab, unk_token=EOS))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.add_special_tokens([EOS])
    fast.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))


def pretrain(
    source: Path,
    out: Path,
    task: Synthetic,
    *,
    steps: int,
    rows: int,
    demonstration: Mapping[str, Any],
    seed: int,
    note: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Write `out`: the model of `source` after `steps` updates on fresh demonstrations, `rows` each
    and every row a group of its own. `demonstration`: options of what the task demonstrates.

    Trials at random seldom come out right, too seldom to learn from that one then answers with
    that trial. In the first half of the steps LUCKY of the demonstrations therefore have one that
    does; in the second half all are at random again, and the base's trials with them.
    A pure function of its arguments on a machine; `note` hears of step and loss.
    """
    opened = open_checkpoint(source)
    model = bridge.load(source, backend="torch")
    trainer = model.trainer(SFT(), OPTIMIZER, "all")
    for step in range(steps):
        rng = np.random.default_rng([seed, step])
        groups = []
        for i in range(rows):
            problem = task.problem("train", step * rows + i)
            lucky = step < steps // 2 and rng.random() < LUCKY
            said = task.demonstrate(problem, rng=rng, lucky=lucky, **demonstration)
            tokens = [*model.encode(said), 0]
            groups.append(Group(model.encode(problem.prompt), [tokens]))
        lr = learning_rate(step, steps, OPTIMIZER.lr, "cosine", WARMUP, 0.05)
        metrics = trainer.step(make_batch(groups), lr=lr)
        note(step + 1, metrics["loss"])
    tensors = dict(model.implementation.tensors())
    write_checkpoint(
        out, opened.raw_config, specs_of(tensors), tensors.items(), assets=opened.assets
    )
