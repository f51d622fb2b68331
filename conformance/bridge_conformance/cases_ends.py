"""A model whose logits are known exactly, for samplings at their ends (chapter 6).

It adds nothing to what it embeds, so its logits are those of the token that was fed last: whole
numbers and powers of two, which every dtype holds, whatever the order of summation.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from bridge.config import SPEC_VERSION, ModelConfig, parse_config, tensor_shapes
from bridge_conformance.tolerance import DTYPES

D = 4  # as many kinds of logits
SMALLEST = 8  # vocabulary
NEVER = -300.0  # a logit below the largest that leaves no weight


@dataclass(frozen=True)
class EndsCase:
    """A vocabulary of `vocab_size`, the order of its tokens, and seeds to draw with."""

    vocab_size: int
    seed: int

    magnitudes = "plain"

    @property
    def model(self) -> "EndsCase":
        """Itself: it stands for a `cases.ModelCase`."""
        return self

    @cached_property
    def config(self) -> ModelConfig:
        """The parsed config."""
        return parse_config(self.raw)

    @property
    def raw(self) -> dict[str, Any]:
        """The config as a checkpoint has it."""
        return {
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": D,
            "intermediate_size": D,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "bridge": {
                "spec_version": SPEC_VERSION,
                "kind": "attention",
                "num_heads": 1,
                "head_dim": D,
                "layers": [0],
                "norm_eps": 1e-6,
            },
        }

    @cached_property
    def levels(self) -> np.ndarray:
        """Logits after each kind of token `[D, V]`, of tokens in an order of the seed.

        Sums: at a temperature of 1 / ln 2 the weights are 1, 1/2, 1/4 and 1/4, and no other. Near:
        two largest are equal, others a little below. Equal: all. Spread: steps of an eighth.
        """
        V = self.vocab_size
        sums, near = np.full(V, NEVER), np.full(V, -1.0)
        sums[:4] = 0, -1, -2, -2
        near[:6] = 0, 0, -(2.0**-10), -(2.0**-11), -(2.0**-12), -(2.0**-13)
        levels = np.stack([sums, near, np.zeros(V), -np.arange(V) / 8])
        return levels[:, np.random.default_rng(self.seed).permutation(V)]

    def tensors(self, dtype: str) -> dict[str, np.ndarray]:
        """In canonical order. Token t is embedded along axis t mod D, and normed to 2 there."""
        tensors = {}
        for name, shape in tensor_shapes(self.config).items():
            values = np.zeros(shape) if name.endswith("_proj.weight") else np.ones(shape)
            if name == "model.embed_tokens.weight":
                values = 64.0 * np.eye(D)[np.arange(self.vocab_size) % D]
            if name == "lm_head.weight":
                values = self.levels.T / 2
            tensors[name] = values.astype(np.float32).astype(DTYPES[dtype])
        return tensors
