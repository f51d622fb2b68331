"""What the sharing does: answers of one group are replayed, and each block is watched.

The replay is teacher-forced, through the reference (the backend `numpy`), whose attention weights
are those of the spec to the last digit. Answers may come from any backend. A *step* counts a row's
tokens from 0 (clause 6.2): at step t a row reads the others, and then token t is drawn; step 0 is
the last timestep of the prompt, where all rows are still the same. It draws nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from bridge.contract import Sampling
from bridge.decoding.events import ResponseSet
from bridge.decoding.inputs import default_positions
from bridge.errors import BridgeError
from bridge.model import Model
from bridge.tracing.diversity import Diversity, agree_from, agreement, diversity
from bridge.training.batches import Group, make_batch


@dataclass(frozen=True)
class Trace:
    """What `trace` saw. Axes: T steps of the longest answer, N rows, H heads, layers with a block.

    Where a row has ended, `tokens` are -1 and figures NaN. `entropy` is of what a token was drawn
    from, in nats; of greedy answers (temperature 0), of the softmax at temperature 1.
    """

    prompt: str
    prompt_tokens: list[int]
    answers: list[str]
    reasons: list[str]  # why each row ended: eos, stop or length
    tokens: Int[np.ndarray, "N T"]
    words: list[list[str]]  # the text of each token, one list a row
    kind: str  # attention or mlp
    layers: tuple[int, ...]
    attention: Float[np.ndarray, "layers H T N N"] | None  # a row's weights on rows; None for mlp
    norm_ratios: Float[np.ndarray, " layers"]  # clause 3.9, over all active cells
    entropy: Float[np.ndarray, "N T"]
    greedy: bool  # whether the answers were drawn at temperature 0

    @property
    def width(self) -> int:
        """Rows of the group."""
        return len(self.tokens)

    @property
    def steps(self) -> int:
        """Tokens of the longest answer, with the one that ended it."""
        return self.tokens.shape[1]

    @property
    def active(self) -> Bool[np.ndarray, "N T"]:
        """Whether a row was still there at a step."""
        return self.tokens >= 0

    @property
    def heads(self) -> int:
        """Of a block's attention; 0 for mlp."""
        return 0 if self.attention is None else self.attention.shape[1]

    def to_others(self) -> Float[np.ndarray, "layers T N"]:
        """The share of each row's attention that goes to others than itself, mean over heads."""
        seen = self._attention().mean(axis=1)
        return 1 - np.diagonal(seen, axis1=-2, axis2=-1)

    def by_layer(self) -> Float[np.ndarray, "layers T"]:
        """`to_others`, mean over the active rows."""
        return np.nanmean(self.to_others(), axis=2)

    def even(self) -> Float[np.ndarray, " T"]:
        """`to_others` of rows that look at all rows alike: (n - 1) / n of n active rows."""
        n = self.active.sum(axis=0)
        return (n - 1) / n

    def looks(self, layer: int | None = None) -> Float[np.ndarray, "N N"]:
        """Who looks at whom: the weight that each row (first axis) gives to each, mean over heads
        and over the steps at which the one that looks is there; its rows sum to 1.

        `layer`: by its number in the model; None is the mean over layers. Raises BridgeError for
        one without a block.
        """
        return np.nanmean(self._attention(layer), axis=(0, 1, 2))

    def heard(self, layer: int | None = None) -> Float[np.ndarray, "T N"]:
        """How much each row is looked at by the others: the mean over the other active rows of the
        weight that they give to it. Even attention gives 1 / n of n active rows. NaN where the row
        has ended or is alone. `layer`: as for `looks`."""
        given = self._attention(layer).mean(axis=(0, 1))  # [T, who looks, at whom]
        others = np.where(np.eye(self.width, dtype=bool), np.nan, given)
        there, n = self.active.T, self.active.sum(axis=0)[:, None]
        received = np.nansum(others, axis=1) / np.maximum(n - 1, 1)
        return np.where(there & (n > 1), received, np.nan)

    def mean_entropy(self) -> Float[np.ndarray, " T"]:
        """Mean over the rows active at each step."""
        return np.nanmean(self.entropy, axis=0)

    def agreement(self) -> Float[np.ndarray, " T"]:
        """See `diversity.agreement`."""
        return agreement(self.tokens)

    def agree_from(self) -> int | None:
        """See `diversity.agree_from`."""
        return agree_from(self.tokens)

    def diversity(self) -> Diversity:
        """See `diversity.diversity`; the token that ended a row for good (EOS) is left out."""
        said = [
            row[row >= 0][: -1 if reason == "eos" else None].tolist()
            for row, reason in zip(self.tokens, self.reasons, strict=True)
        ]
        return diversity(self.answers, said)

    def remarks(self) -> list[str]:
        """What the figures mean, and what should be known of them, a sentence each."""
        alike, start = self.diversity(), self.agree_from()
        said = [f"{alike.distinct} of {alike.answers} answers are distinct"]
        if alike.edit_distance is not None:
            said.append(
                f"two differ by {alike.edit_distance:.1f} token edits ({alike.edit_share:.0%} of "
                "the longer) in the mean"
            )
        for n, share in enumerate((alike.distinct_1, alike.distinct_2), 1):
            said += [] if share is None else [f"distinct-{n} is {share:.2f}"]
        lines = ["; ".join(said) + "."]
        if self.width > 1:
            since = f"From step {start} on (the last is {self.steps - 1}),"
            since = "There is no step from which on" if start is None else since
            lines.append(f"{since} at least half of the rows, and two or more, say the same token.")
        greedy = " (answers are greedy; this is of the softmax)" if self.greedy else ""
        lines.append(f"Entropy is in nats, of what tokens are drawn from{greedy}.")
        if self.kind != "attention":
            lines.append(
                "P-Match blocks (kind mlp) read no other rows: there is no attention to show."
            )
        elif not self.norm_ratios.any():
            lines.append(
                "All norm ratios are 0: these blocks add nothing yet, as fresh ones do not."
            )
        return lines

    def to_json(self) -> dict[str, Any]:
        """Plain lists for machines: rounded to six decimals, null where a row has ended.

        `attention` is the mean over heads, `[layers, T, N, N]`; heads are told apart by the share
        that goes to others, `[layers, H]`.
        """
        seen = self.attention
        return {
            "prompt": self.prompt,
            "prompt_tokens": self.prompt_tokens,
            "width": self.width,
            "steps": self.steps,
            "answers": [
                {"text": text, "finish_reason": reason, "tokens": row[row >= 0].tolist()}
                for text, reason, row in zip(self.answers, self.reasons, self.tokens, strict=True)
            ],
            "kind": self.kind,
            "layers": list(self.layers),
            "heads": self.heads,
            "norm_ratios": plain(self.norm_ratios),
            "diversity": vars(self.diversity()),
            "entropy": plain(self.entropy),
            "greedy": self.greedy,
            "mean_entropy": plain(self.mean_entropy()),
            "agreement": plain(self.agreement()),
            "agree_from": self.agree_from(),
            "to_others": None if seen is None else plain(self.to_others()),
            "to_others_by_head": None if seen is None else plain(self._by_head()),
            "even": plain(self.even()),
            "looks": None if seen is None else plain(self.looks()),
            "attention": None if seen is None else plain(seen.mean(axis=1)),
        }

    def _by_head(self) -> Float[np.ndarray, "layers H"]:
        """Mean over active cells."""
        return np.nanmean(1 - np.diagonal(self._attention(), axis1=-2, axis2=-1), axis=(2, 3))

    def _attention(self, layer: int | None = None) -> Float[np.ndarray, "layers H T N N"]:
        """Of all layers, or of one, by its number in the model."""
        if self.attention is None:
            raise BridgeError(f"{self.kind} blocks read no other rows, so there is no attention")
        if layer is None:
            return self.attention
        if layer not in self.layers:
            known = ", ".join(map(str, self.layers))
            raise BridgeError(f"layer {layer} has no Bridge block; layers with one: {known}")
        return self.attention[[self.layers.index(layer)]]


def trace(
    reference: Model,
    answers: ResponseSet,
    sampling: Sampling,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Trace:
    """Replay the answers of one group and watch.

    `reference`: the model on the backend `numpy`. `sampling`: how the answers were drawn.
    `progress` hears of layers done, and their number. Raises BridgeError for a model without
    blocks, and one of a backend that cannot be watched.
    """
    bridge = reference.config.bridge
    if bridge is None or not bridge.layers:
        raise BridgeError("the model has no Bridge blocks, so rows share nothing; run bridge init")
    if not hasattr(reference.implementation, "watch"):
        raise BridgeError(f"backend {reference.backend} cannot be watched; load with numpy")
    watch: Any = reference.implementation  # beyond the contract
    said = [response.tokens for response in answers.responses]
    batch = make_batch([Group(answers.prompt_tokens, said, name="the answers")])
    greedy = sampling.temperature == 0
    attention, ratios, entropy = watch.watch(
        batch.tokens,
        batch.groups,
        batch.active,
        default_positions(batch.active),
        batch.target_mask,
        Sampling() if greedy else sampling,
        progress,
    )
    first = len(answers.prompt_tokens) - 1
    there = batch.target_mask[:, first:]
    if attention is not None:
        attention = attention[:, :, first:]
        attention[:, :, ~there.T] = np.nan  # of a row that has ended, all it would look at
    return Trace(
        prompt=answers.prompt,
        prompt_tokens=answers.prompt_tokens,
        answers=[response.text for response in answers.responses],
        reasons=[response.finish_reason for response in answers.responses],
        tokens=np.where(there, batch.targets[:, first:], -1),
        words=[[_word(reference, token) for token in row] for row in said],
        kind=bridge.kind,
        layers=bridge.layers,
        attention=attention,
        norm_ratios=ratios,
        entropy=np.where(there, entropy[:, first:], np.nan),
        greedy=greedy,
    )


def layers_shown(layer: int | None) -> str:
    """What is shown where one layer, or none, is asked for."""
    return "mean over layers" if layer is None else f"layer {layer}"


def plain(figures: np.ndarray) -> list[Any]:
    """Nested lists, rounded to six decimals, with None for NaN."""
    if figures.ndim > 1:
        return [plain(part) for part in figures]
    return [None if np.isnan(x) else round(float(x), 6) for x in figures]


def _word(model: Model, token: int) -> str:
    """The text of one token; its name where it writes none, its number without a tokenizer."""
    if model.tokenizer is None:
        return str(token)
    return model.tokenizer.decode([token]) or model.tokenizer.fast.id_to_token(token) or str(token)
