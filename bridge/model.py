"""`bridge.load` and the Model it gives: one face over every backend.

Checks what users pass, turns text into ids, and hands NumPy arrays to the backend.
"""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bridge.checkpoints.reading import Checkpoint, open_checkpoint
from bridge.config import ModelConfig, bridge_shapes, lora_names, tensor_shapes
from bridge.contract import AdamW, BackendModel, Batch, Objective, Trainer
from bridge.decoding.budget import MAX_ROWS, Budget
from bridge.decoding.engine import AHEAD, Engine
from bridge.decoding.events import Done, Event, ResponseSet
from bridge.decoding.generation import follow
from bridge.decoding.inputs import check_optimizer, check_weights, positions_of
from bridge.decoding.memory import check_kept
from bridge.decoding.prompts import (
    Prompt,
    encode_prompt,
    list_prompt_ids,
    list_prompts,
    list_widths,
    read_prompt,
    read_rows,
)
from bridge.decoding.requests import Request, check_sampling, row_length
from bridge.decoding.stops import read_stops
from bridge.errors import BridgeError, show
from bridge.numbers.ranges import take
from bridge.registry import find_backend, resolve_device, resolve_dtype, weights_of
from bridge.text.tokenizer import Tokenizer, read_eos_ids, read_tokenizer

BUNDLED = Path(__file__).with_name("bundled")  # a checkpoint that comes with the package


def load(
    checkpoint: str | Path | None = None,
    *,
    base: str | Path | None = None,
    any_base: bool = False,
    backend: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    weights: str | None = None,
) -> "Model":
    """A model from a checkpoint directory of any form, ready to run.

    `checkpoint`: None is the bundled one, a small model that solves puzzles by trying
    (`bridge/bundled/README.md`).
    `base`: the host of an adapter checkpoint; None is the one that the adapter names. `any_base`:
    take a base whose hash is not the one that the adapter was made for.
    `backend`: a name from `bridge.backends()`; None is the best one present. `device`: None is the
    backend's best. `dtype`: None is the backend's default on CPUs, else the checkpoint's own.
    `weights`: `int8` or `int4` makes the host's matrices integers, for decoding (clause 10.5); None
    leaves them as they are.
    Raises BridgeError, in one line, for what is missing, damaged or not supported.
    """
    where = BUNDLED if checkpoint is None else _path(checkpoint, "checkpoint")
    beside = None if base is None else _path(base, "base")
    opened = open_checkpoint(where, beside, any_base=any_base)
    return build(opened, opened.config, opened.tensors, backend, device, dtype, weights)


def build(
    opened: Checkpoint,
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    backend: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    weights: str | None = None,
) -> "Model":
    """A model of an opened checkpoint, with a config and tensors that may differ from its own: the
    plain host, for one, is `opened.config.without_bridge()` with the same tensors."""
    chosen = find_backend(backend)
    device = resolve_device(chosen, device)
    dtype = resolve_dtype(chosen, device, dtype, opened.dtype)
    check_weights(chosen.name, device, weights, weights_of(chosen, device))
    tokenizer = read_tokenizer(opened.assets)
    eos_ids = read_eos_ids(opened.assets, config.vocab_size) or opened.config.eos_token_ids
    if not eos_ids and tokenizer and tokenizer.eos_token_id is not None:
        eos_ids = (tokenizer.eos_token_id,)
        if eos_ids[0] >= config.vocab_size:
            raise BridgeError(
                f"{opened.assets / 'tokenizer_config.json'}: eos_token is {eos_ids[0]} by "
                f"tokenizer.json, outside the model's vocabulary 0..{config.vocab_size - 1}; "
                "set eos_token_id in config.json"
            )
    narrow = {} if weights is None else {"weights": weights}
    implementation = chosen.load(config, tensors, device=device, dtype=dtype, **narrow)
    return Model(implementation, chosen.name, tokenizer, eos_ids, weights)


class Model:
    """A loaded model. Rows that share a group number answer the same prompt, and see each other."""

    def __init__(
        self,
        implementation: BackendModel,
        backend: str,
        tokenizer: Tokenizer | None = None,
        eos_ids: Sequence[int] = (),
        weights: str | None = None,
    ) -> None:
        """`weights`: what the host's matrices were made of `implementation` (clause 10.5)."""
        self.implementation = implementation
        self.backend = backend
        self.tokenizer = tokenizer
        self.eos_ids = tuple(eos_ids)
        self.weights = weights

    @property
    def config(self) -> ModelConfig:
        """The host's and the blocks' settings."""
        return self.implementation.config

    @property
    def device(self) -> str:
        """Where it runs."""
        return self.implementation.device

    @property
    def dtype(self) -> str:
        """What it computes in."""
        return self.implementation.dtype

    @property
    def has_chat_template(self) -> bool:
        """Whether prompts can be put through a chat template."""
        return self.tokenizer is not None and self.tokenizer.chat_template is not None

    def __repr__(self) -> str:
        kind = self.config.bridge.kind if self.config.bridge else "no"
        lora = f"updates of rank {self.config.lora.rank}, " if self.config.lora else ""
        narrow = f" with {self.weights} weights" if self.weights else ""
        return (
            f"<bridge.Model {self.config.model_type}, {kind} Bridge blocks, {lora}"
            f"{self.backend} on {self.device} in {self.dtype}{narrow}>"
        )

    def logits(
        self,
        tokens: Any,
        *,
        groups: Any,
        active: Any = None,
        positions: Any = None,
    ) -> np.ndarray:
        """Teacher-forced logits `[B, S, V]` (chapters 3 and 5).

        `tokens [B, S]` ids; `groups [B]` the prompt that each row answers; `active [B, S]` whether
        the row fed a real token there (None: everywhere); `positions [B, S]` (None: how many
        active cells the row has before this one). Where not active, logits are unspecified.
        """
        rows = read_rows(self.config, tokens, groups, active, positions)
        return self.implementation.logits(*rows)

    def generate(self, prompts: Prompt | Sequence[Prompt], **options: Any) -> list[ResponseSet]:
        """The answers to each prompt; options as for `stream`."""
        for event in self.stream(prompts, **options):
            if isinstance(event, Done):
                return event.sets
        raise AssertionError("a stream ends with Done")

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        width: int | Sequence[int] = 8,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int = 0,
        stop: str | Sequence[str] | None = None,
        chat: bool = False,
        system: str | None = None,
        max_rows: int = MAX_ROWS,
        cache_bytes: int | None = None,
        ahead: int = AHEAD,
        prompt_ids: Sequence[int] | None = None,
    ) -> Iterator[Event]:
        """Answer prompts, token by token: Started, Token, Finished, and at last one Done.

        Options of the answers as for `requests`, and of how they are decoded as for `engine`; the
        answers do not depend on the latter. Raises BridgeError before anything is computed.
        """
        requests = self.requests(
            prompts,
            width=width,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop=stop,
            chat=chat,
            system=system,
            prompt_ids=prompt_ids,
        )
        check_kept(sum(request.width for request in requests), requests[0].max_new_tokens)
        engine = self.engine(max_rows=max_rows, cache_bytes=cache_bytes, ahead=ahead)
        return follow(engine, requests)

    def engine(
        self, *, max_rows: int = MAX_ROWS, cache_bytes: int | None = None, ahead: int = AHEAD
    ) -> Engine:
        """What answers requests that come at any time: `submit` them, and `step`.

        `max_rows`: at most so many rows are decoded at once, and a wider group alone.
        `cache_bytes`: what their keys and values may take; None: what fits in the memory that is
        free. `ahead`: at most so many tokens of a row are drawn before it is looked at.
        """
        budget = Budget(
            self.implementation,
            take("max_rows", max_rows),
            None if cache_bytes is None else take("cache_bytes", cache_bytes),
        )
        return Engine(self.implementation, self.tokenizer, budget, take("ahead", ahead))

    def requests(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        width: int | Sequence[int] = 8,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int = 0,
        stop: str | Sequence[str] | None = None,
        chat: bool = False,
        system: str | None = None,
        prompt_ids: Sequence[int] | None = None,
    ) -> list[Request]:
        """What an engine is to be asked for, one request a prompt.

        A prompt is raw text, ids (a list, an array or a tensor), or a list of chat messages.
        `width`: interdependent answers a prompt, one number or one a prompt. `max_new_tokens`: None
        is 256, or what the context leaves. `temperature=0` is argmax. `seed`: the same seed gives
        the same tokens on every backend up to rounding. `stop`: texts that end a row, which its
        text leaves out; the name of a special token ends it at that token.
        `chat`: put texts through the checkpoint's chat template, after `system` if given; without
        `chat` a `system` is refused. `prompt_ids`: the prompts' numbers in the sampling counter
        (clause 6.2), so that they may be asked in any order and draw the same; None: 0, 1, 2, ...
        Raises BridgeError for what is out of its range, or does not fit the context.
        """
        sampling = check_sampling(temperature, top_k, top_p, min_p, seed)
        stops = read_stops(stop, self.tokenizer)
        listed = list_prompts(prompts)
        widths = list_widths(width, len(listed))
        ids = list_prompt_ids(prompt_ids, len(listed))
        names = [f"prompt {number}" for number in range(len(listed))]
        read = [self._encode(p, chat, system, n) for p, n in zip(listed, names, strict=True)]
        lengths = {name: len(tokens) for name, (_, tokens) in zip(names, read, strict=True)}
        limit = row_length(max_new_tokens, lengths, self.config.max_position_embeddings)
        ends = frozenset(self.eos_ids)
        return [
            Request(text, tokens, rows, number, limit, sampling, ends, stops)
            for (text, tokens), rows, number in zip(read, widths, ids, strict=True)
        ]

    def encode(
        self,
        prompt: Prompt,
        *,
        chat: bool = False,
        system: str | None = None,
        name: str = "prompt",
    ) -> list[int]:
        """The ids that `requests` would read a prompt as. `name`: what errors call it."""
        return self._encode(prompt, chat, system, name)[1]

    def logprobs(self, batch: Batch, temperature: float = 1.0) -> np.ndarray:
        """The log-probability of each target of a batch, `[B, S]`, by the training forward; 0 where
        there is none (clause 7.12). `temperature`: that of the sampling."""
        return self.implementation.logprobs(batch, temperature)

    def norm_ratios(self, batch: Batch) -> np.ndarray:
        """Of each block, in order of layers: the mean over a batch's active cells of the norm of
        what it adds, divided by that of what it reads (clause 3.9). Empty without blocks."""
        cells = (batch.tokens, batch.groups, batch.active, positions_of(batch))
        return self.implementation.norm_ratios(*cells)

    @contextmanager
    def swapped(self, tensors: Mapping[str, np.ndarray]) -> Iterator[None]:
        """Compute with these tensors in the place of the model's own while this lasts, such as the
        starting values of what is trained (clause 7.16). A trainer's masters stay as they are, and
        it must not step meanwhile. Raises BridgeError for a name that the model lacks, another
        shape, and a model whose matrices were made integers."""
        before = self.implementation.swap(tensors)
        try:
            yield
        finally:
            self.implementation.swap(before)

    def trainer(
        self,
        objective: Objective,
        optimizer: AdamW | None = None,
        trainable: str | Sequence[str] = "bridge",
        *,
        checkpoint_activations: bool = False,
        loss_chunk: int | None = None,
    ) -> Trainer:
        """A trainer of this model. `trainable`: `bridge` (the blocks, and low-rank updates if there
        are any), `all`, or names of tensors.

        `checkpoint_activations`: less memory for more time, by computing each layer again in the
        backward pass (clause 7.11). `loss_chunk`: of how many targets the logits may be in memory
        at once; None: 256 (clause 7.15). Raises BridgeError for a number out of its range.
        """
        if optimizer is not None:
            check_optimizer(optimizer)
        return self.implementation.trainer(
            objective,
            optimizer or AdamW(),
            trainable_names(self.config, trainable),
            checkpoint_activations=checkpoint_activations,
            loss_chunk=loss_chunk,
        )

    def _encode(
        self, prompt: Any, chat: bool, system: str | None, name: str
    ) -> tuple[str, list[int]]:
        """A prompt's text, or what its last message says, and its ids."""
        fed = read_prompt(prompt, chat, system, name)
        return encode_prompt(fed, self.tokenizer, self.eos_ids, self.config.vocab_size, name)


def trainable_names(config: ModelConfig, trainable: str | Sequence[str]) -> list[str]:
    """Tensor names for `bridge`, `all`, or a list of names, which must exist."""
    names = list(tensor_shapes(config))
    if trainable == "all":
        return names
    if trainable == "bridge":
        layers = range(config.num_hidden_layers)
        chosen = {n for i in layers for n in bridge_shapes(config, i)} | set(lora_names(config))
        if not chosen:
            raise BridgeError(
                "trainable 'bridge': the model has no Bridge blocks, and no low-rank updates; run "
                "bridge init, or train with --lora-rank"
            )
        return [name for name in names if name in chosen]
    listed = isinstance(trainable, Collection) and all(isinstance(n, str) for n in trainable)
    if isinstance(trainable, str) or not listed:
        raise BridgeError(f"trainable must be 'bridge', 'all' or names, not {show(trainable)}")
    if unknown := sorted(set(trainable) - set(names)):
        raise BridgeError(f"trainable: no tensor is named {unknown[0]!r}")
    return [name for name in names if name in set(trainable)]


def _path(given: str | Path, name: str) -> Path:
    if not isinstance(given, str | os.PathLike) or not os.fspath(given):
        mend = "name a directory" + ", or None for the bundled model" * (name == "checkpoint")
        raise BridgeError(f"{name} is {show(given)}; {mend}")
    return Path(given)
