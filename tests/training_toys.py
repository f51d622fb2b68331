"""A toy task, a scorer within the process, and a tiny model with a tokenizer of characters.

The task: a prompt such as `3+4=` wants the last digit of the sum, and then the end. Problems are
few and a model of a few thousand parameters can be trained on them in seconds.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models

from bridge.checkpoints.initialise import init
from bridge.config import parse_config, tensor_shapes
from bridge.contract import Batch
from bridge.decoding.inputs import positions_of
from bridge.decoding.shared import SharedPlan
from bridge.tasks import Problem, Score

LETTERS = "0123456789+="
CONFIG = {
    "model_type": "llama",
    "vocab_size": 1 + len(LETTERS),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


class Sums:
    """`a+b=` and the last digit of the sum; `first`: the first digit of the prompt instead."""

    name, threshold = "sums", 1.0

    def __init__(self, first: bool = False, sizes: tuple[int | None, int | None] = (80, 20)):
        self.first, self.sizes = first, dict(zip(("train", "validation"), sizes, strict=True))

    def size(self, split: str) -> int | None:
        return self.sizes[split]

    def problem(self, split: str, number: int) -> Problem:
        place = (37 * (number if split == "train" else 80 + number)) % 100  # 37 has an inverse
        a, b = divmod(place, 10)
        return Problem(number, f"{a}+{b}=", str(a if self.first else (a + b) % 10))

    def score(self, problem: Problem, response: str) -> float:
        return float(response[:1] == problem.answer)

    def read_answer(self, response: str) -> str | None:
        return response[:1] or None


class Graded(Sums):
    """The same, but what is wrong is worth something too, more or less: no group's rewards are
    equal for long, so every step moves the weights."""

    def score(self, problem: Problem, response: str) -> float:
        return max(super().score(problem, response), sum(map(ord, response)) % 50 / 100)


class Nasty(Graded):
    """Its reward raises, hangs or is no number, by the problem."""

    def score(self, problem: Problem, response: str) -> float:
        wrong = problem.number % 4
        if wrong == 1:
            raise RuntimeError("no\nluck")
        if wrong == 2:
            time.sleep(3600)
        return float("nan") if wrong == 3 else super().score(problem, response)


class InProcess:
    """Scores with no process of its own; what a test wants to go wrong, goes wrong here."""

    def __init__(self, task: Any) -> None:
        self.task = task

    def score(self, pairs: Any) -> list[Score]:
        return [Score(self.task.score(problem, response)) for problem, response in pairs]


def write_model(path: Path, seed: int = 0, **config: Any) -> Path:
    """A checkpoint with blocks that do something, in the directory `path`, made with its parents.

    The host's logits are small, so that sampling begins near uniform.
    """
    host = path.parent / f"{path.name}-host"
    host.mkdir(parents=True)
    raw = {**CONFIG, **config}
    (host / "config.json").write_text(json.dumps(raw))
    rng = np.random.default_rng(seed)
    tensors = {
        name: rng.normal(scale=0.2, size=shape).astype(np.float32)
        for name, shape in tensor_shapes(parse_config(raw)).items()
    }
    save_file(tensors, host / "model.safetensors", metadata={"format": "pt"})
    vocab = {"<eos>": 0} | {letter: 1 + i for i, letter in enumerate(LETTERS)}
    fast = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    fast.decoder = decoders.Fuse()
    fast.add_special_tokens(["<eos>"])
    fast.save(str(host / "tokenizer.json"))
    (host / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    init(host, path, heads=2, head_dim=4)
    tensors = load_file(path / "model.safetensors")
    for name in tensors:
        if name.endswith("bridge.o_proj.weight"):
            tensors[name] = rng.normal(scale=0.2, size=tensors[name].shape).astype(np.float32)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def computed(batch: Batch) -> int:
    """Cells that backends compute of a batch, by the plan that they all go by."""
    plan = SharedPlan.of(batch.tokens, batch.groups, batch.active, positions_of(batch))
    return plan.of_shared.size + plan.of_alone.size
