"""transformers in true float64: what this file lifts is its own casts to float32.

Its norms, rope and eager softmax ask for `torch.float32` by name, or call `Tensor.float`, whatever
the model's dtype. While `true_float64()` holds, those names mean float64 in the modules concerned.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from transformers import modeling_rope_utils
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

MODULES = (modeling_llama, modeling_qwen2, modeling_qwen3, modeling_mistral, modeling_rope_utils)


class _Torch:
    """`torch`, with float64 under the names of float32."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def true_float64() -> Iterator[None]:
    """Build and run models inside, so that their rope tables are float64 too."""
    with ExitStack() as stack:
        for module in MODULES:
            stack.enter_context(patch.object(module, "torch", _Torch()))
        stack.enter_context(patch.object(torch.Tensor, "float", torch.Tensor.double))
        yield
