"""What a check runs on: a model, a batch, a residual stream, or prompts with forced tokens.

A case is small and frozen: settings and seeds. Its arrays are computed from them, so that printing
a case tells how to build it again. Axes: B rows, S timesteps, D model width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from bridge.config import LoraConfig, ModelConfig, parse_config, tensor_shapes
from bridge.contract import GRPO, Batch, Objective
from bridge.decoding.inputs import default_positions
from bridge_conformance.tolerance import DTYPES


@dataclass(frozen=True)
class ModelCase:
    """A raw config, the low-rank updates beside it, and the seed of its tensors."""

    raw: dict[str, Any]
    seed: int
    magnitudes: str = "plain"  # one of MAGNITUDES
    lora: LoraConfig | None = None

    @cached_property
    def config(self) -> ModelConfig:
        """The parsed config, and the updates."""
        return replace(parse_config(self.raw), lora=self.lora)

    def tensors(self, dtype: str, *, fresh: bool = False) -> dict[str, np.ndarray]:
        """Random tensors in canonical order, float32 values rounded to `dtype`.

        Plain magnitudes keep activations near 1. `fresh` zeroes the blocks' outputs, as
        `bridge init` does (clause 8.2).
        """
        powers = MAGNITUDES[self.magnitudes]
        return random_tensors(self.config, self.seed, dtype, fresh=fresh, powers=powers)


# Powers of two by which tensors are multiplied, by the end of their names. Where a backend computes
# in too narrow a dtype, these overflow or vanish: squares in a norm, exponentials in a softmax. In
# float16 no tensor and no activation of the reference leaves its range.
SCORES = ("q_proj.weight", "k_proj.weight")
OUTPUTS = ("o_proj.weight", "down_proj.weight")
MAGNITUDES: dict[str, dict[str, int]] = {
    "plain": {},
    "large embeddings": {"embed_tokens.weight": 9},
    "tiny embeddings": {"embed_tokens.weight": -12},
    "large scores": dict.fromkeys(SCORES, 4),
    "large outputs": dict.fromkeys(OUTPUTS, 6),
    "tiny outputs": dict.fromkeys(OUTPUTS, -10),
}


def random_tensors(
    config: ModelConfig,
    seed: int,
    dtype: str,
    *,
    fresh: bool = False,
    powers: Mapping[str, int] | None = None,
) -> dict[str, np.ndarray]:
    """Every tensor of `config` by name; see `ModelCase.tensors`. `powers`: as in `MAGNITUDES`."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        values = rng.normal(size=shape)
        if name.endswith("norm.weight"):
            values = 1 + 0.2 * values
        elif name.endswith(".bias"):
            values = 0.2 * values
        elif "embed_tokens" not in name:
            values = values / np.sqrt(shape[-1])
        if fresh and name.endswith((".bridge.o_proj.weight", ".bridge.down_proj.weight")):
            values = np.zeros(shape)
        for end, power in (powers or {}).items():
            if name.endswith(end):
                values = values * 2.0**power
        tensors[name] = values.astype(np.float32).astype(DTYPES[dtype])
    return tensors


@dataclass(frozen=True)
class RowsCase:
    """A model and a teacher-forced batch: the arguments of `BackendModel.logits`."""

    model: ModelCase
    tokens: np.ndarray  # [B, S] int64
    groups: np.ndarray  # [B] int64
    active: np.ndarray  # [B, S] bool
    positions: np.ndarray  # [B, S] int64

    @property
    def arguments(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """As `BackendModel.logits` takes them."""
        return self.tokens, self.groups, self.active, self.positions

    def take(self, rows: np.ndarray) -> "RowsCase":
        """The batch of `rows` (indices or a mask), in that order."""
        return replace(
            self,
            tokens=self.tokens[rows],
            groups=self.groups[rows],
            active=self.active[rows],
            positions=self.positions[rows],
        )

    def pad(self, before: int, after: int) -> "RowsCase":
        """The same rows with inactive timesteps on either side."""

        def widen(array: np.ndarray) -> np.ndarray:
            return np.pad(array, ((0, 0), (before, after)))

        return replace(
            self,
            tokens=widen(self.tokens),
            active=widen(self.active),
            positions=widen(self.positions),
        )


def rows_of(
    model: ModelCase,
    widths: list[int],
    timesteps: int,
    patterns: list[str],
    shifted: bool,
    seed: int,
) -> RowsCase:
    """A batch of groups of `widths`, rows in random order, each active as its pattern says.

    `shifted` moves the default positions of every row by an offset of its own.
    """
    rng = np.random.default_rng(seed)
    labels = rng.choice(1000, size=len(widths), replace=False)
    groups = rng.permutation(np.repeat(labels, widths))
    active = np.stack([_activity(pattern, timesteps, rng) for pattern in patterns])
    positions = default_positions(active)
    if shifted:
        largest = model.config.max_position_embeddings - timesteps
        positions = positions + rng.integers(0, largest, size=(len(groups), 1))
    tokens = rng.integers(0, model.config.vocab_size, size=active.shape)
    return RowsCase(model, tokens, groups, active, positions)


def share(
    rows: RowsCase, leads: Sequence[int], patterns: Sequence[str], shift: str, seed: int
) -> RowsCase:
    """The batch with the first `leads[g]` timesteps of the rows of its g-th group, by number,
    alike in activity and in tokens, as a prompt's are (clause 7.14).

    `shift`: what has an offset to its positions, `none`, each `group` or each `row`; where rows
    have their own, groups of several share nothing.
    """
    rng = np.random.default_rng(seed)
    tokens, active = rows.tokens.copy(), rows.active.copy()
    labels, line = np.unique(rows.groups, return_inverse=True)
    for group, (lead, pattern) in enumerate(zip(leads, patterns, strict=True)):
        mine = np.flatnonzero(line == group)
        tokens[mine, :lead] = tokens[mine[0], :lead]
        active[mine, :lead] = _activity(pattern, tokens.shape[1], rng)[:lead]
    several = {"none": 1, "group": len(labels), "row": len(line)}[shift]
    largest = rows.model.config.max_position_embeddings - tokens.shape[1]
    offsets = rng.integers(0, largest, size=several) * (shift != "none")
    of = {"none": np.zeros_like(line), "group": line, "row": np.arange(len(line))}[shift]
    positions = default_positions(active) + offsets[of][:, None]
    return replace(rows, tokens=tokens, active=active, positions=positions)


def _activity(pattern: str, timesteps: int, rng: np.random.Generator) -> np.ndarray:
    cells = np.arange(timesteps)
    first, last = np.sort(rng.integers(0, timesteps, size=2))
    return {
        "full": cells >= 0,
        "left": cells >= first,
        "right": cells <= last,
        "both": (cells >= first) & (cells <= last),
        "gaps": rng.random(timesteps) < 0.6,
        "none": cells < 0,
    }[pattern]


@dataclass(frozen=True)
class BlockCase:
    """The block of one layer, and the seed of a residual stream for the batch `rows`."""

    rows: RowsCase
    layer: int
    seed: int

    def hidden(self, dtype: str) -> np.ndarray:
        """`[B, S, D]` in `dtype`; magnitudes differ from row to row."""
        rng = np.random.default_rng(self.seed)
        B, S = self.rows.active.shape
        hidden = rng.normal(size=(B, S, self.rows.model.config.hidden_size))
        hidden *= rng.uniform(0.3, 3.0, size=(B, S, 1))
        return hidden.astype(np.float32).astype(DTYPES[dtype])


@dataclass(frozen=True)
class DecodeCase:
    """Prompts, and everything that is fed to them: the prompts' rows in order, R in all.

    `steps` counts sampled timesteps. Before step t a row lives where `alive[t]`; those that end
    with step t are not kept by the t-th advance.
    """

    model: ModelCase
    widths: tuple[int, ...]
    lengths: tuple[int, ...]
    steps: int
    seed: int
    ragged: bool = True  # False: every row lives to the last step

    @cached_property
    def prompts(self) -> list[np.ndarray]:
        """One int64 array a prompt."""
        rng = np.random.default_rng(self.seed)
        return [rng.integers(0, self.model.config.vocab_size, size=n) for n in self.lengths]

    @cached_property
    def forced(self) -> np.ndarray:
        """The token that each row is fed after each step: `[steps, R]` int64."""
        rng = np.random.default_rng([self.seed, 1])
        return rng.integers(0, self.model.config.vocab_size, size=(self.steps, sum(self.widths)))

    @cached_property
    def alive(self) -> np.ndarray:
        """`[steps, R]` bool: true from the first step to the one with which the row ends."""
        if not self.ragged:
            return np.ones((self.steps, sum(self.widths)), dtype=bool)
        rng = np.random.default_rng([self.seed, 2])
        ends = rng.integers(1, self.steps + 1, size=sum(self.widths))
        ends[self.row_prompt < rng.integers(len(self.widths))] = 1  # whole prompts leave, or none
        ends[-1 - rng.integers(self.widths[-1])] = self.steps  # one row lives to the end
        return np.arange(self.steps)[:, None] < ends

    @cached_property
    def row_prompt(self) -> np.ndarray:
        """The prompt of each row: `[R]`."""
        return np.repeat(np.arange(len(self.widths)), self.widths)

    @cached_property
    def row_number(self) -> np.ndarray:
        """The number of each row within its group: `[R]`."""
        return np.concatenate([np.arange(width) for width in self.widths])

    def teacher_forced(self, left: int = 0) -> tuple[RowsCase, np.ndarray]:
        """The same tokens as one batch, and the timestep at which each row's step 0 lies, `[R]`.
        `left` inactive timesteps come first."""
        *arguments, first = teacher_forced(
            self.prompts, self.row_prompt, self.forced, self.alive, left
        )
        return RowsCase(self.model, *arguments), first


def teacher_forced(
    prompts: Sequence[np.ndarray],
    row_prompt: np.ndarray,
    said: np.ndarray,
    alive: np.ndarray,
    left: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows that said `said [steps, R]` while they were `alive [steps, R]`, as a batch: tokens,
    groups, active, positions; and the timestep at which each row's step 0 lies, `[R]`.

    A row's last token is a target, never an input: a row that lives for n steps is fed n - 1 of its
    tokens (clauses 2.3 and 7.2).
    """
    lengths = np.array([len(prompt) for prompt in prompts])
    starts = lengths[row_prompt] + left
    tokens = np.zeros((len(starts), lengths.max() + len(said) + left), dtype=np.int64)
    active = np.zeros(tokens.shape, dtype=bool)
    for row, start in enumerate(starts):
        fed = alive[1:, row].sum()
        tokens[row, left:start] = prompts[row_prompt[row]]
        tokens[row, start : start + len(said)] = said[:, row]
        active[row, left : start + fed] = True
    return tokens, row_prompt, active, default_positions(active), starts - 1


@dataclass(frozen=True)
class TrainCase:
    """A batch to learn from, and with which objective (chapter 7)."""

    rows: RowsCase
    objective: Objective
    trainable: tuple[str, ...]
    seed: int

    @property
    def temperature(self) -> float:
        """At which log-probabilities are taken (clause 7.1)."""
        return self.objective.temperature if isinstance(self.objective, GRPO) else 1.0

    def batch(self, logits: np.ndarray) -> Batch:
        """Targets at some active cells; what GRPO reads lies around the policy of `logits`.

        Ratios are far from where clipping begins, so that no rounding crosses it. What is not to be
        read holds NaN. Every other batch leaves out all that may be left out: positions, the
        sampling policy, and, unless beta weighs it, the reference policy.
        """
        rng = np.random.default_rng([self.seed, 3])
        rows = self.rows
        mask = rows.active & (rng.random(rows.active.shape) < 0.7)
        mask[np.nonzero(rows.active)[0][:1], np.nonzero(rows.active)[1][:1]] = True
        targets = rng.integers(0, rows.model.config.vocab_size, size=mask.shape)
        shifted = (logits - logits.max(-1, keepdims=True)) / self.temperature
        logp = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        lp = np.take_along_axis(logp, targets[..., None], -1)[..., 0]
        ratio = rng.choice([0.5, 0.95, 1.05, 1.6], size=mask.shape)
        bare = self.seed % 2 == 0
        beta = self.objective.beta if isinstance(self.objective, GRPO) else 0.0
        old = np.where(mask, lp - np.log(ratio), np.nan)
        ref = np.where(mask, lp + rng.normal(0, 0.3, size=mask.shape), np.nan)
        return Batch(
            tokens=rows.tokens,
            groups=rows.groups,
            active=rows.active,
            targets=np.where(mask, targets, -100),
            target_mask=mask,
            positions=None if bare else rows.positions,
            advantages=rng.choice([-1.0, 0.5, 2.0], size=len(mask)),
            old_logprobs=None if bare else old,
            ref_logprobs=None if bare and not beta else ref,
        )
