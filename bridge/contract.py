"""What a backend implements, and all that a porter must read (spec chapter 10).

A backend is an object found through the entry-point group `bridge.backends`. It receives a
configuration and named NumPy arrays, and gives NumPy arrays back, which are the caller's from then
on: no framework's type crosses this border. It knows nothing of tokenizers, files or text. bf16
arrays have ml_dtypes' bfloat16.

Axes: B rows, S timesteps, D model width, V vocabulary, R rows still being decoded.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from bridge.config import ModelConfig


@dataclass(frozen=True)
class Sampling:
    """How next tokens are drawn (chapter 6). `temperature=0` is argmax."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """Teacher-forced rows to learn from (clauses 7.1 to 7.3). Cells not `active` are padding.

    `targets[b, s]` is the token that row b should say after timestep s, where `target_mask[b, s]`.
    GRPO also reads one advantage a row, and the log-probabilities of the targets under the
    sampling policy (`old_logprobs`; None: the current policy, so that rho is 1 with a gradient)
    and under the reference policy (`ref_logprobs`; None where beta is 0).
    """

    tokens: np.ndarray  # [B, S] int
    groups: np.ndarray  # [B] int
    active: np.ndarray  # [B, S] bool
    targets: np.ndarray  # [B, S] int
    target_mask: np.ndarray  # [B, S] bool
    positions: np.ndarray | None = None  # [B, S] int
    advantages: np.ndarray | None = None  # [B]
    old_logprobs: np.ndarray | None = None  # [B, S]
    ref_logprobs: np.ndarray | None = None  # [B, S]


@dataclass(frozen=True)
class SFT:
    """Mean cross-entropy over target tokens (clause 7.4)."""


@dataclass(frozen=True)
class GRPO:
    """Token-normalised clipped policy objective with an optional k3 KL penalty (clause 7.5).

    `temperature`: that of the sampling, at which all log-probabilities are taken (clause 7.1).
    """

    eps_low: float = 0.2
    eps_high: float = 0.2
    beta: float = 0.0
    temperature: float = 1.0


@dataclass(frozen=True)
class AdamW:
    """Decoupled weight decay, bias correction, global-norm clipping (clauses 7.7 and 7.8)."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0


Objective = SFT | GRPO


class Decoder(Protocol):
    """Cached decoding of R rows: those of a prompt side by side, prompts in the order of their
    coming. Each row counts its own steps, from 0. R may fall to 0, and `admit` raises it again.

    After a `sample_ahead` that gave more than one column, `advance` comes next: what else is asked
    before it may be refused (clause 10.1).
    """

    def logits(self) -> np.ndarray:
        """Next-token logits `[R, V]` of the rows left, float32 or wider; `[0, V]` when none is."""
        ...

    def sample(self, sampling: Sampling | Sequence[Sampling]) -> np.ndarray:
        """Draw the next token of each row left: `[R]` int64. Does not advance, and may be called
        again at the same step: what was drawn last counts. `sampling`: one for all rows, or one a
        row (clause 6.9); BridgeError for any other number."""
        ...

    def sample_ahead(
        self, sampling: Sampling | Sequence[Sampling], steps: int, ends: Collection[int]
    ) -> np.ndarray:
        """Draw up to `steps` tokens of each row left, each but the last fed as it is drawn:
        `[R, k]` int64, with 1 <= k <= steps (clause 4.6).

        A row that draws an id of `ends`, or the last token that it may have, is inactive from the
        next timestep on: its further columns are -1. It stays one of R until `advance` drops it, or
        goes back (clause 4.7). The last column is drawn and not fed. Whoever cannot loop on the
        device gives `sample(sampling)[:, None]`.
        """
        ...

    def logprobs(self, tokens: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        """The log-probability of one token for each row left, `tokens [R]`, as its next: `[R]`,
        float32 or wider (clause 6.10). Computed on the device, where `logits` would be copied.
        Raises BridgeError for another number of tokens, an id that is no token, and a temperature
        that is not above 0."""
        ...

    def advance(
        self,
        tokens: np.ndarray | None = None,
        keep: np.ndarray | None = None,
        back: np.ndarray | None = None,
    ) -> None:
        """Feed the rows where `keep [R]` (None: all) their next token and drop the others for good.

        `tokens [R]`: what to feed, drawn or not; None feeds what was drawn last at this step.
        `back [R]` int: how many of the timesteps that the last `sample_ahead` fed are taken back
        first (clause 4.7; None: none), so that `tokens` stand for what was drawn in column
        `k - 1 - back`. All arrays have an entry for every row before the call; what stands for a
        dropped row is not read. Dropped rows are inactive from this timestep on, and R shrinks to
        the number kept. Raises BridgeError, and changes nothing, with neither tokens nor a draw, or
        no tokens and a `back`; for arrays of another length, an id that is no token, a `back` that
        is not 0 to k - 1 or not the same for the rows of a group that are kept, a row kept that has
        -1 in column `k - 1 - back`; and past the `max_new_tokens` that a row came with, the last of
        which is drawn and not fed.
        """
        ...

    def admit(
        self,
        prompts: Sequence[np.ndarray],
        widths: Sequence[int],
        max_new_tokens: int,
        prompt_ids: Sequence[int] | None = None,
    ) -> None:
        """Read further prompts, whose rows stand after those left, at their step 0 (clause 4.5).

        Arguments as for `BackendModel.prefill`, of which this is the same for a decoder that is
        there already, with rows or without: `max_new_tokens` is of the rows that come, and
        `prompt_ids` None is 0, 1, 2, ... once more. What was drawn and not fed is forgotten, so
        draw before the next `advance` without tokens. Raises BridgeError, and changes nothing, for
        what clause 4.4 refuses.
        """
        ...


class Trainer(Protocol):
    """Owns the optimizer's state: float32 (or wider) master weights and moments."""

    def step(self, batch: Batch | Sequence[Batch], *, lr: float | None = None) -> dict[str, float]:
        """One update; metrics `loss`, `grad_norm` (before clipping), `tokens` and more.

        `lr`: the learning rate of this update; None is the optimizer's own (clause 7.8). Several
        batches are one update, accumulated in turn: what fits in memory at once is one of them.
        Groups stay whole, each in one batch (clause 7.10).
        """
        ...

    def state(self) -> dict[str, np.ndarray]:
        """All that resuming needs: `step` (int64), and for each trained tensor `master.NAME`,
        `exp_avg.NAME` and `exp_avg_sq.NAME` (clause 7.9), in one dtype a kind."""
        ...

    def array(self, key: str) -> np.ndarray:
        """One array of `state`, alone: so that a state can be written without a second one of it in
        memory."""
        ...

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from what `state` gave. Raises BridgeError, and changes nothing, where an array is
        missing, left over or has another shape."""
        ...


class BackendModel(Protocol):
    """A loaded model."""

    config: ModelConfig
    device: str
    dtype: str

    def block(
        self, layer: int, hidden: np.ndarray, groups: np.ndarray, active: np.ndarray
    ) -> np.ndarray:
        """The Bridge block of one layer: `hidden [B, S, D]` in, updated residual out, both in the
        model's dtype. Raises BridgeError for a layer without a block."""
        ...

    def logits(
        self,
        tokens: np.ndarray,
        groups: np.ndarray,
        active: np.ndarray,
        positions: np.ndarray,
    ) -> np.ndarray:
        """Teacher-forced logits `[B, S, V]`; where not `active` they are finite but unspecified."""
        ...

    def norm_ratios(
        self,
        tokens: np.ndarray,
        groups: np.ndarray,
        active: np.ndarray,
        positions: np.ndarray,
    ) -> np.ndarray:
        """Of each layer with a block, in order of layers: the mean over active cells of the norm of
        what the block adds, divided by that of what it reads (clause 3.9); float32 or wider. Empty
        for a model without blocks. Arguments as for `logits`."""
        ...

    def prefill(
        self,
        prompts: Sequence[np.ndarray],
        widths: Sequence[int],
        max_new_tokens: int,
        prompt_ids: Sequence[int] | None = None,
    ) -> Decoder:
        """Read each prompt once, and start `widths[g]` rows from prompt g.

        `max_new_tokens`: how many tokens each row may draw. `prompt_ids` are the prompts' numbers
        in the sampling counter; None: 0, 1, 2, ...
        """
        ...

    def free_bytes(self) -> int | None:
        """Bytes that the device can still give, measured now; None where it has no memory of its
        own, and the machine's is what counts."""
        ...

    def loss_and_grads(
        self, batch: Batch, objective: Objective, trainable: Sequence[str]
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Metrics, and the gradient of each tensor named in `trainable`, float32 or wider; zeros
        for a tensor that the loss does not read.

        Metrics are sums over targets divided by their number: `loss`; for GRPO `entropy`,
        `clip_fraction`, and `kl` wherever `ref_logprobs` are given; and `tokens`, the number.
        """
        ...

    def logprobs(self, batch: Batch, temperature: float = 1.0) -> np.ndarray:
        """The log-probability of each target at a temperature, by the training forward: `[B, S]`,
        float32 or wider, 0 where there is no target (clause 7.12)."""
        ...

    def trainer(
        self,
        objective: Objective,
        optimizer: AdamW,
        trainable: Sequence[str],
        *,
        checkpoint_activations: bool = False,
        loss_chunk: int | None = None,
    ) -> Trainer:
        """A trainer that updates this model's `trainable` tensors in place.

        `checkpoint_activations`: keep each layer's input alone for the backward pass, and compute
        the layer again there: less memory, more time, the same numbers (clause 7.11).
        `loss_chunk`: of how many targets the logits may be in memory at once; the numbers are the
        same for any (clause 7.15). None is `bridge.decoding.targets.LOSS_CHUNK`, which is also
        what `loss_and_grads` and `logprobs` keep to.
        """
        ...

    def swap(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute with these in the place of the model's own of the same names, and give those that
        were there, in the model's dtype. A trainer's masters stay as they are, and its next update
        puts them back (clause 7.16). BridgeError, and nothing changed, for a name that it lacks,
        another shape, and a model whose matrices are integers."""
        ...

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor by its Hugging Face name, in canonical order, in the model's dtype."""
        ...


@runtime_checkable
class Backend(Protocol):
    """A way to run Bridge models. One instance a name; construct without arguments."""

    name: str

    def devices(self) -> list[str]:
        """Devices present, best first; never empty. Named `kind` or `kind:number`, such as `cpu` or
        `cuda:0`: who asks for a kind gets the first of it."""
        ...

    def dtypes(self, device: str) -> list[str]:
        """Of `float64 float32 bfloat16 float16`, those that `device` computes in; default first."""
        ...

    def load(
        self, config: ModelConfig, tensors: Mapping[str, np.ndarray], *, device: str, dtype: str
    ) -> BackendModel:
        """A model from its tensors, which are read one at a time (`tensors` may be lazy)."""
        ...


@runtime_checkable
class NarrowBackend(Backend, Protocol):
    """A backend that can also make the host's matrices integers of 8 or 4 bits (clause 10.5)."""

    def weights(self, device: str) -> list[str]:
        """Of `int8 int4`, what matrices can be made on `device`; may be empty."""
        ...

    def load(
        self,
        config: ModelConfig,
        tensors: Mapping[str, np.ndarray],
        *,
        device: str,
        dtype: str,
        weights: str | None = None,
    ) -> BackendModel:
        """As `Backend.load`. `weights`: one of `weights(device)`; None: as they are. The model is
        for reading and decoding: what would change it or needs its gradients is a BridgeError, and
        `tensors` gives the numbers that the integers stand for."""
        ...
