"""A backend whose rows say what a script holds, and tokenizers of bytes, for the loop alone."""

import numpy as np
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from bridge.config import parse_config
from bridge.model import Model
from bridge.text.tokenizer import Tokenizer

EOS = 0
CONFIG = parse_config(
    {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "eos_token_id": EOS,
    }
)


class ScriptedDecoder:
    """Says what the script holds for each (prompt, row), and records what it is fed."""

    def __init__(self, model):
        self.model, self.rows, self.steps = model, [], {}

    def admit(self, prompts, widths, max_new_tokens, prompt_ids=None):
        self.model.prefills.append((list(prompt_ids), list(widths)))
        coming = [(p, n) for p, w in zip(prompt_ids, widths, strict=True) for n in range(w)]
        self.rows += coming
        self.steps |= dict.fromkeys(coming, 0)

    def sample_ahead(self, sampling, steps, ends):
        return np.array([[self.model.script[row][self.steps[row]]] for row in self.rows])

    def advance(self, tokens=None, keep=None, back=None):
        kept = [row for row, k in zip(self.rows, keep, strict=True) if k]
        self.model.fed.append((tokens[keep].tolist(), kept))
        assert kept, "a decoder without rows need not advance"
        self.rows = kept
        self.steps = {row: self.steps[row] + 1 for row in kept}


class ScriptedModel:
    config, device, dtype = CONFIG, "cpu", "float32"

    def __init__(self, script):
        self.script, self.fed, self.prefills = script, [], []

    def prefill(self, *arguments, **options):
        decoder = ScriptedDecoder(self)
        decoder.admit(*arguments, **options)
        return decoder

    def free_bytes(self):
        return None


def byte_tokenizer(eos="<eos>"):
    """One token a byte, after the special ones: the pieces of a character arrive one by one."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<eos>": EOS} | {letter: 1 + i for i, letter in enumerate(letters)}
    fast = FastTokenizer(models.BPE(vocab=vocab, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<eos>"])
    return Tokenizer(fast, {"eos_token": eos} if eos else {})


def scripted(*texts, eos_ids=(EOS,)):
    """A model whose rows of prompt 0 say these texts, each followed by EOS."""
    tokenizer = byte_tokenizer()
    said = [[*tokenizer.encode(text), EOS] for text in texts]
    model = ScriptedModel({(0, n): tokens for n, tokens in enumerate(said)})
    return Model(model, "scripted", tokenizer, eos_ids), model
