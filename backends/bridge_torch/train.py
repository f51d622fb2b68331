"""Losses and a whole training step (chapter 7), with autograd and `torch.optim.AdamW`.

Gradients are those of the module's own parameters; all that are not asked for are frozen meanwhile.
Master weights and moments are float32 or wider, whatever the model's dtype, and the module computes
with them as rounded to it. A batch holds whole groups (clause 7.3): gradients flow across the rows
of a group, so a group may not be split over two batches of an update.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from bridge.contract import SFT, AdamW, Batch, Objective
from bridge.decoding.inputs import (
    add_metrics,
    check_batch,
    check_state,
    check_temperature,
    check_trainable,
    micro_batches,
    positions_of,
)
from bridge.decoding.rows import only_active
from bridge.decoding.targets import TargetCells
from bridge_torch.block import wide
from bridge_torch.model import Transformer
from bridge_torch.packed import Packed
from bridge_torch.weights import Weights

Metrics = dict[str, float]


def loss_and_grads(
    model: Transformer,
    trainable: Sequence[str],
    batch: Batch,
    objective: Objective,
    count: int | None = None,
    checkpoint_activations: bool = False,
) -> tuple[Metrics, dict[str, Tensor]]:
    """Clauses 7.1 to 7.5: metrics, and the gradient of the loss at each parameter named in
    `trainable`, in its wide dtype.

    `count`: see `loss`. Raises BridgeError for a batch whose shapes disagree, that has no target,
    or lacks what the objective reads.
    """
    check_batch(batch, objective, model.config.vocab_size)
    targets = TargetCells.of(batch)
    with learning(model, trainable) as leaves, torch.enable_grad():
        logits = target_logits(model, batch, checkpoint_activations)
        value, metrics = loss(logits, targets, objective, count)
        # A tensor that the loss does not read at all has a gradient of zero, and it may read none:
        # at width 1 a block has no use for q and k.
        if value.requires_grad:
            grads = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
        else:
            grads = tuple(map(torch.zeros_like, leaves.values()))
    wanted = {name: g.to(wide(g.dtype)) for name, g in zip(leaves, grads, strict=True)}
    return {name: float(x) for name, x in metrics.items()}, wanted


@contextmanager
def learning(model: nn.Module, trainable: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """The parameters named, which alone ask for gradients while this lasts."""
    parameters, asked = dict(model.named_parameters()), set(trainable)
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in asked)
        yield {name: parameters[name] for name in trainable}
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(before[name])


@torch.no_grad()
def logprobs(
    model: Transformer | Packed, batch: Batch, temperature: float
) -> Float[Tensor, " tokens"]:
    """Clause 7.12: lp of each target at the temperature, in the order of the mask."""
    check_batch(batch, SFT(), model.config.vocab_size)
    check_temperature(temperature)
    return at_targets(target_logits(model, batch), TargetCells.of(batch), temperature)[1]


def target_logits(
    model: Transformer | Packed, batch: Batch, checkpoint_activations: bool = False
) -> Float[Tensor, "tokens V"]:
    """Logits of the cells with a target, in the order of the mask. The head reads no other cell: a
    vocabulary is wide, and prompts have none."""
    ids = torch.from_numpy(only_active(batch.tokens, batch.active).astype(np.int64))
    cells = model.cells(batch.groups, batch.active, positions_of(batch))
    device = cells.rope.device
    mask = torch.tensor(batch.target_mask, device=device)
    if isinstance(model, Packed):  # of narrow weights, which only read
        return model.logits(model.read(ids.to(device), cells)[mask])
    return model(ids.to(device), cells, read=mask, recompute=checkpoint_activations)


def at_targets(
    logits: Float[Tensor, "tokens V"], targets: TargetCells, temperature: float
) -> tuple[Float[Tensor, "tokens V"], Float[Tensor, " tokens"]]:
    """log p of every token, and of the target (clause 7.1)."""
    logp = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
    ids = torch.from_numpy(targets.targets).to(logits.device, torch.int64)
    return logp, logp.gather(-1, ids[:, None])[:, 0]


def loss(
    logits: Float[Tensor, "tokens V"],
    targets: TargetCells,
    objective: Objective,
    count: int | None = None,
) -> tuple[Tensor, dict[str, Tensor | float]]:
    """The loss over target tokens, and its metrics, `loss` and `tokens` among them.

    `logits` are those of the cells with a target. `count` is the number of targets that sums are
    divided by: of the whole update, where the batch is one of several (clause 7.10); None: of this
    batch. SFT is clause 7.4: `loss = -sum(lp) / count` with
    lp = log p(target). GRPO is clause 7.5, with advantage A by row:

        rho  = exp(lp - old)
        gain = min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A)
        kl   = exp(ref - lp) - (ref - lp) - 1
        loss = -sum(gain - beta kl) / count
    """
    temperature = 1.0 if isinstance(objective, SFT) else objective.temperature
    logp, lp = at_targets(logits, targets, temperature)
    count = len(lp) if count is None else count
    if isinstance(objective, SFT):
        value = -lp.sum() / count
        return value, {"loss": value.detach(), "tokens": len(lp)}
    assert targets.advantages is not None
    A, old = torch.from_numpy(targets.advantages).to(lp), lp.detach()
    if targets.old_logprobs is not None:
        old = torch.from_numpy(targets.old_logprobs).to(lp)
    rho = (lp - old).exp()
    clipped = rho.clamp(1 - objective.eps_low, 1 + objective.eps_high)
    gain = torch.where(rho * A <= clipped * A, rho * A, clipped.detach() * A)
    metrics: dict[str, Tensor | float] = {
        "tokens": len(lp),
        "clip_fraction": (rho * A > clipped * A).to(rho.dtype).sum() / count,
        "entropy": -(logp.exp() * logp).sum().detach() / count,
    }
    if targets.ref_logprobs is not None:
        difference = torch.from_numpy(targets.ref_logprobs).to(lp) - lp
        kl = difference.expm1() - difference  # of a small difference, exp is 1 and no more
        gain = gain - objective.beta * kl
        metrics["kl"] = kl.sum().detach() / count
    value = -gain.sum() / count
    return value, {"loss": value.detach(), **metrics}


class Trainer:
    """Updates a model's trainable tensors in place; see `bridge.contract.Trainer`."""

    def __init__(
        self,
        weights: Weights,
        objective: Objective,
        optimizer: AdamW,
        trainable: Sequence[str],
        checkpoint_activations: bool = False,
    ) -> None:
        """Masters start at the model's own values, moments at 0 (clause 7.9)."""
        self.weights, self.objective, self.options = weights, objective, optimizer
        self.checkpoint_activations = checkpoint_activations
        own = weights.module().state_dict()
        check_trainable(own, trainable)
        self.master = {n: own[n].to(wide(own[n].dtype), copy=True) for n in trainable}
        self.adamw = torch.optim.AdamW(
            list(self.master.values()),
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
        )

    def step(self, batch: Batch | Sequence[Batch], *, lr: float | None = None) -> Metrics:
        """One update, of one batch or accumulated over several (clause 7.10); the loss's metrics,
        and `grad_norm` before clipping (clauses 7.7, 7.8)."""
        batches, count = micro_batches(batch, self.objective, self.weights.config.vocab_size)
        model, names = self.weights.module(), list(self.master)
        parts, total = [], {}
        for part in batches:
            metrics, grads = loss_and_grads(
                model, names, part, self.objective, count, self.checkpoint_activations
            )
            parts.append(metrics)
            for name, grad in grads.items():
                total[name] = total[name].add_(grad) if name in total else grad
        for name, master in self.master.items():
            master.grad = total[name]
        limit = self.options.max_grad_norm
        norm = torch.nn.utils.get_total_norm(list(total.values()))
        if limit is not None:  # a norm of inf would make gradients NaN even at a limit of inf
            torch.nn.utils.clip_grads_with_norm_(self.master.values(), limit, norm)
        self.adamw.param_groups[0]["lr"] = self.options.lr if lr is None else lr
        self.adamw.step()
        self.adamw.zero_grad()
        self._publish()
        return {**add_metrics(parts), "grad_norm": float(norm)}

    def state(self) -> dict[str, np.ndarray]:
        """`step`, and `master.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME` of each trained tensor."""
        arrays = {key: tensor.cpu().numpy().copy() for key, tensor in self._tensors().items()}
        return {"step": np.array(self._steps(), np.int64), **arrays}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` gave. Raises BridgeError, and changes nothing, where an array is
        missing, left over or has another shape."""
        check_state(self.weights.config, self.master, state)
        step = torch.tensor(float(state["step"]))
        mine = self._tensors().items()
        given = {key: torch.from_numpy(np.array(state[key])).to(t) for key, t in mine}
        for name, master in self.master.items():
            master.copy_(given[f"master.{name}"])
            moments = {key: given[f"{key}.{name}"] for key in ("exp_avg", "exp_avg_sq")}
            self.adamw.state[master] = {"step": step.clone(), **moments}
        self._publish()

    def _steps(self) -> int:
        first = next(iter(self.master.values()))
        return int(self.adamw.state.get(first, {}).get("step", 0))

    def _tensors(self) -> dict[str, Tensor]:
        """What a state holds beside its step; moments are 0 before the first."""
        tensors = {f"master.{name}": master for name, master in self.master.items()}
        for kind in ("exp_avg", "exp_avg_sq"):
            for name, master in self.master.items():
                moments = self.adamw.state.get(master, {})
                tensors[f"{kind}.{name}"] = moments.get(kind, torch.zeros_like(master))
        return tensors

    @torch.no_grad()
    def _publish(self) -> None:
        """The model computes with the master weights rounded to its dtype."""
        own = self.weights.module().state_dict()
        for name, master in self.master.items():
            own[name].copy_(master)
