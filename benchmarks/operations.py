"""The arithmetic of an update, counted: what time is held against, measured or foretold.

A multiplication and its addition are two operations. Counted are the cells that are computed: a
group's prompt once (clause 7.14), the head at targets alone. What is computed again in the backward
pass, to save memory, is not counted.
"""

from collections.abc import Collection
from dataclasses import dataclass
from math import prod

from bridge.config import ModelConfig, tensor_shapes

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Work:
    """What an update is of: groups of one shape. A prompt of 0 tokens: rows share nothing."""

    groups: int
    width: int
    prompt: int
    response: int  # tokens of each row

    @property
    def cells(self) -> int:
        """Cells that are computed. The last token of a response is no input, and the last of the
        prompt is: at it, the first is a target."""
        return self.groups * (self.prompt + self.width * (self.response - bool(self.prompt)))

    @property
    def targets(self) -> int:
        """Tokens that are learnt."""
        return self.groups * self.width * self.response

    @property
    def pairs(self) -> float:
        """Of two cells of which one reads the other, in each head of self-attention."""
        alone = self.response - bool(self.prompt)
        row = alone * self.prompt + alone**2 / 2
        return self.groups * (self.prompt**2 / 2 + self.width * row)


def update(config: ModelConfig, trained: Collection[str], work: Work) -> float:
    """Operations: forward, back to the activations, and to the trained weights. Where nothing of
    the host is trained, what lies below the first block needs no gradient; it is counted."""
    shapes = tensor_shapes(config)
    head = HEAD if HEAD in shapes else EMBEDDING
    sizes = {name: prod(shape) for name, shape in shapes.items() if name not in (EMBEDDING, HEAD)}
    own = sum(size for name, size in sizes.items() if name in trained)
    body = work.cells * (4.0 * sum(sizes.values()) + 2.0 * own)
    logits = work.targets * prod(shapes[head]) * (4.0 + 2.0 * (head in trained))
    width = config.num_attention_heads * config.head_dim
    return body + logits + 3.0 * config.num_hidden_layers * work.pairs * 4 * width
