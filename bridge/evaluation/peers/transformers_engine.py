"""transformers: its own `generate`, with its own cache."""

import time
from typing import Any

from bridge.evaluation.peers.engine import Call, Decoded, Setup, tokens_of


class TransformersSession:
    """A model of transformers'."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def decode(self, call: Call) -> Decoded:
        """One `generate`, which tells of each step through a stopping criterion."""
        import torch

        steps: list[float] = []
        goes_on = torch.zeros(call.width, dtype=torch.bool, device=self.model.device)

        def step(tokens: Any, scores: Any) -> Any:
            if not steps:
                tokens.cpu()  # waits for the device
                steps.append(time.perf_counter())
            return goes_on

        torch.manual_seed(call.seed)
        prompt = torch.from_numpy(tokens_of(call))[None].to(self.model.device)
        drawing = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if call.temperature else {}
        start = time.perf_counter()
        with torch.inference_mode():
            out = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=bool(drawing),
                **drawing,
                num_return_sequences=call.width,
                max_new_tokens=call.new,
                eos_token_id=None,
                pad_token_id=0,
                stopping_criteria=[step],
            )
        tokens = out[:, len(call.prompt) :].tolist()
        return Decoded(steps[0] - start, time.perf_counter() - start, tokens)


def load(setup: Setup) -> TransformersSession:
    """The host, by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, setup.entry.weights)
    model: Any = AutoModelForCausalLM.from_pretrained(setup.host, dtype=dtype)
    return TransformersSession(model.to(setup.device).eval())
