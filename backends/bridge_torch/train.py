"""Gradients and a whole training step (chapter 7), with autograd and `torch.optim.AdamW`.

The forward is over the cells of `pieces.py`, what rows share computed once; head and loss are those
of `loss.py`. Gradients are those of the module's own parameters; all that are not asked for are
frozen meanwhile. Master weights and moments are float32 or wider, whatever the model's dtype, and
the module computes with them as rounded to it. A batch holds whole groups (clause 7.3): gradients
flow across the rows of a group, so a group may not be split over two batches of an update.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from bridge.contract import SFT, AdamW, Batch, Objective
from bridge.decoding.inputs import (
    add_metrics,
    check_batch,
    check_loss_chunk,
    check_state,
    check_temperature,
    check_trainable,
    micro_batches,
    positions_of,
    state_shapes,
)
from bridge.decoding.targets import LOSS_CHUNK, TargetCells
from bridge.errors import BridgeError
from bridge_torch.block import wide
from bridge_torch.linear import Embedding
from bridge_torch.loss import Told, head_and_loss
from bridge_torch.loss import logprobs as lp_of
from bridge_torch.model import Transformer
from bridge_torch.packed import Packed
from bridge_torch.pieces import Pieces
from bridge_torch.weights import Weights

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Metrics = dict[str, float]


def loss_and_grads(
    model: Transformer,
    trainable: Sequence[str],
    batch: Batch,
    objective: Objective,
    count: int | None = None,
    checkpoint_activations: bool = False,
    loss_chunk: int | None = None,
    total: dict[str, Tensor] | None = None,
) -> tuple[Metrics, dict[str, Tensor]]:
    """Clauses 7.1 to 7.5: metrics, and the gradient of the loss at each parameter named in
    `trainable`, in its wide dtype.

    `count`: see `loss`; None: the targets of this batch. `total`: gradients of before, to which
    these are added in place (clause 7.10). Raises BridgeError for a batch whose shapes disagree,
    that has no target, or lacks what the objective reads.
    """
    check_batch(batch, objective, model.config.vocab_size)
    targets = TargetCells.of(batch)
    count = len(targets.targets) if count is None else count
    embed, head = _plain_weights(model)
    total = {} if total is None else total
    cells = pieces(model, batch)
    with learning(model, trainable, total), torch.enable_grad():
        # The gradients of what is as wide as the vocabulary are added where they add up.
        embedded = F.embedding(cells.tokens, embed).requires_grad_(EMBEDDING in trainable)
        h = model.model.through(embedded, cells, checkpoint_activations)
        h = model.model.norm(h.index_select(0, at(targets, cells, h.device)))
        name = EMBEDDING if model.lm_head is None else HEAD
        metrics, gradient = head_and_loss(
            h.detach(),
            head,
            Told.of(targets, h.new_empty(0, dtype=wide(h.dtype))),
            objective,
            count,
            check_loss_chunk(loss_chunk),
            h.requires_grad,
            _place(total, name, head) if name in trainable else None,
        )
        if h.requires_grad:
            h.backward(gradient)
    if embedded.grad is not None:
        place = _place(total, EMBEDDING, embed)
        place.index_put_((cells.tokens,), embedded.grad.to(place.dtype), accumulate=True)
    parameters = dict(model.named_parameters())
    # A tensor that the loss does not read at all has a gradient of zero, and it may read none: at
    # width 1 a block has no use for q and k.
    wanted = {name: _place(total, name, parameters[name]) for name in trainable}
    names, values = list(metrics), torch.stack(list(metrics.values())).tolist()
    return {**dict(zip(names, values, strict=True)), "tokens": len(targets.targets)}, wanted


@contextmanager
def learning(
    model: nn.Module, trainable: Sequence[str], total: dict[str, Tensor]
) -> Iterator[None]:
    """The parameters named alone ask for gradients while this lasts, and a backward pass adds each
    of those to `total` as it has it. The embedding and the head, whose gradients are as large as
    they are, ask for none."""
    parameters, asked = dict(model.named_parameters()), set(trainable) - {EMBEDDING, HEAD}
    before = {name: (p.requires_grad, p.grad) for name, p in parameters.items()}
    hooks = []

    def add(name: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if name in total:
            total[name].add_(gradient)
        else:
            total[name] = gradient.to(wide(gradient.dtype))

    try:
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in asked)
            if name in asked:
                parameter.grad = None
                hooks.append(parameter.register_post_accumulate_grad_hook(partial(add, name)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, parameter in parameters.items():
            requires_grad, parameter.grad = before[name]
            parameter.requires_grad_(requires_grad)


def _place(total: dict[str, Tensor], name: str, weight: Tensor) -> Tensor:
    """Where the gradient of a weight adds up."""
    if name not in total:
        total[name] = torch.zeros_like(weight, dtype=wide(weight.dtype), requires_grad=False)
    return total[name]


def _plain_weights(model: Transformer) -> tuple[Tensor, Tensor]:
    """Those of the embedding and the head. Raises BridgeError for a part that is no longer what it
    was made as, as PEFT makes them: it is read as a matrix."""
    embed, head = model.model.embed_tokens, model.lm_head
    for name, module, kind in ((EMBEDDING, embed, Embedding), (HEAD, head, nn.Linear)):
        if module is not None and type(module).forward is not kind.forward:
            raise BridgeError(
                f"{name.removesuffix('.weight')} is a {type(module).__name__}, and training reads "
                f"the weight of a {kind.__name__} alone; train by the module itself"
            )
    return embed.weight.detach(), (embed if head is None else head).weight.detach()


def pieces(model: Transformer | Packed, batch: Batch) -> Pieces:
    """The cells of a batch that are computed."""
    where = (batch.tokens, batch.groups, batch.active, positions_of(batch))
    return Pieces.of(model.config, model.rope, model.like, *where)


def at(targets: TargetCells, cells: Pieces, device: torch.device) -> Int[Tensor, " n"]:
    """The computed cell of each target."""
    found = cells.found[targets.rows, targets.timesteps]
    return torch.from_numpy(found).to(device)


@torch.no_grad()
def logprobs(
    model: Transformer | Packed, batch: Batch, temperature: float
) -> Float[Tensor, " tokens"]:
    """Clause 7.12: lp of each target at the temperature, in the order of the mask."""
    check_batch(batch, SFT(), model.config.vocab_size)
    check_temperature(temperature)
    cells, targets = pieces(model, batch), TargetCells.of(batch)
    of_narrow = isinstance(model, Packed)
    h = model.over(cells) if of_narrow else model.model(cells.tokens, cells)
    h = h.index_select(0, at(targets, cells, h.device))
    ids = torch.from_numpy(targets.targets).to(h.device, torch.int64)
    return lp_of(model.logits, h, ids, temperature, LOSS_CHUNK)


class Trainer:
    """Updates a model's trainable tensors in place; see `bridge.contract.Trainer`."""

    def __init__(
        self,
        weights: Weights,
        objective: Objective,
        optimizer: AdamW,
        trainable: Sequence[str],
        checkpoint_activations: bool = False,
        loss_chunk: int | None = None,
    ) -> None:
        """Masters start at the model's own values, moments at 0 (clause 7.9)."""
        self.weights, self.objective, self.options = weights, objective, optimizer
        self.checkpoint_activations = checkpoint_activations
        self.loss_chunk = check_loss_chunk(loss_chunk)
        check_trainable(weights.module().state_dict(), trainable)
        own = weights.train(trainable).state_dict()
        self.master = {n: own[n].to(wide(own[n].dtype), copy=True) for n in trainable}
        self.adamw = torch.optim.AdamW(
            list(self.master.values()),
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )

    def step(self, batch: Batch | Sequence[Batch], *, lr: float | None = None) -> Metrics:
        """One update, of one batch or accumulated over several (clause 7.10); the loss's metrics,
        and `grad_norm` before clipping (clauses 7.7, 7.8)."""
        batches, count = micro_batches(batch, self.objective, self.weights.config.vocab_size)
        model, names = self.weights.module(), list(self.master)
        parts, total = [], {}
        how = (self.checkpoint_activations, self.loss_chunk)
        for part in batches:
            metrics, total = loss_and_grads(model, names, part, self.objective, count, *how, total)
            parts.append(metrics)
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
        return {key: self.array(key) for key in state_shapes(self.weights.config, self.master)}

    def array(self, key: str) -> np.ndarray:
        """One array of `state`, alone; moments are 0 before the first step."""
        kind, _, name = key.partition(".")
        if not name:
            return np.array(self._steps(), np.int64)
        master = self.master[name]
        moments = self.adamw.state.get(master, {})
        tensor = master if kind == "master" else moments.get(kind)
        given = torch.zeros_like(master, device="cpu") if tensor is None else tensor
        return given.to("cpu", copy=True).numpy()

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` gave. Raises BridgeError, and changes nothing, where an array is
        missing, left over or has another shape."""
        check_state(self.weights.config, self.master, state)
        step = torch.tensor(float(state["step"]))
        for name, master in self.master.items():  # one after another: a second state may not fit
            given = {
                kind: torch.from_numpy(np.array(state[f"{kind}.{name}"])).to(master)
                for kind in ("master", "exp_avg", "exp_avg_sq")
            }
            master.copy_(given.pop("master"))
            self.adamw.state[master] = {"step": step.to(master.device, copy=True), **given}
        self._publish()

    def _steps(self) -> int:
        first = next(iter(self.master.values()))
        return int(self.adamw.state.get(first, {}).get("step", 0))

    @torch.no_grad()
    def _publish(self) -> None:
        """The model computes with the master weights rounded to its dtype."""
        own = self.weights.module().state_dict()
        for name, master in self.master.items():
            own[name].copy_(master)
        self.weights.changed(self.master)
