"""What every backend refuses, in the same words, and what it fills in.

A backend calls these on the NumPy arrays it is given, before it computes anything. Each refusal is
a BridgeError of one line that names the field and the mend.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from bridge.config import ModelConfig, tensor_shapes
from bridge.contract import GRPO, AdamW, Batch, Objective
from bridge.decoding.targets import LOSS_CHUNK
from bridge.errors import BridgeError, show
from bridge.numbers.ranges import RANGES, take
from bridge.numbers.rounding import rounded


def default_positions(active: Bool[np.ndarray, "B S"]) -> Int[np.ndarray, "B S"]:
    """Clause 2.4: how many active cells a row has before this one, int64."""
    return np.maximum(np.cumsum(active, axis=1, dtype=np.int64) - 1, 0)


def positions_of(batch: Batch) -> Int[np.ndarray, "B S"]:
    """Those that a batch gives, or else clause 2.4's."""
    return default_positions(batch.active) if batch.positions is None else batch.positions


def outside(
    ids: Int[np.ndarray, "*axes"], end: int, where: Bool[np.ndarray, "*axes"] | bool = True
) -> Int[np.ndarray, " N"]:
    """Those of the ids that are outside 0..end-1; of the ones that are read, if `where` says."""
    return ids[where & ((ids < 0) | (ids >= end))]


def check_device_and_dtype(
    backend: str, device: str, devices: Collection[str], dtype: str, dtypes: Collection[str]
) -> None:
    """Refuse a device that is not there, and a dtype that a backend does not compute in."""
    for kind, given, known in (("device", device, devices), ("dtype", dtype, dtypes)):
        if given not in known:
            raise BridgeError(
                f"backend {backend}: no {kind} {given!r}; use one of {', '.join(known)}"
            )


def check_weights(backend: str, device: str, weights: str | None, able: Collection[str]) -> None:
    """Refuse to make matrices what a backend cannot make them on a device (clause 10.5)."""
    if weights is not None and weights not in able:
        has = f"has: {', '.join(able)}" if able else "has none; leave weights out"
        raise BridgeError(
            f"weights {show(weights)} are not there for backend {backend!r} on {device} ({has})"
        )


def check_whole(weights: str | None) -> None:
    """Refuse to train, or to give gradients of, a model whose matrices were made integers."""
    if weights is not None:
        raise BridgeError(
            f"weights: {weights} are for decoding, and have no gradient; load the model without "
            "weights to train or change it"
        )


def take_tensor(
    tensors: Mapping[str, np.ndarray],
    name: str,
    shape: tuple[int, ...],
    dtype: str | None = None,
) -> np.ndarray:
    """One tensor of a model being loaded to compute in `dtype`: rounded to it, once, or in a
    narrower dtype that it was stored in and that `dtype` holds; None: as it was stored. Refuses one
    that is missing, has another shape, or holds a number that is too large for `dtype`."""
    if name not in tensors:
        raise BridgeError(f"tensor {name} is missing")
    tensor = np.asarray(tensors[name])
    if tensor.shape != shape:
        raise BridgeError(f"tensor {name} is {list(tensor.shape)}, need {list(shape)}")
    wanted = tensor.dtype if dtype is None else np.dtype(dtype)
    return rounded(tensor, wanted, name) if wanted.itemsize <= tensor.itemsize else tensor


def check_swap(
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    dtype: str,
    weights: str | None = None,
) -> dict[str, np.ndarray]:
    """The tensors that a `swap` puts into a model (clause 7.16), each taken as `take_tensor` takes
    it; before anything is changed, since a refusal must change nothing. Refuses a name that the
    model lacks, another shape, and a model whose matrices were made integers."""
    check_whole(weights)
    shapes = tensor_shapes(config)
    for name in tensors:
        if name not in shapes:
            raise BridgeError(f"swap: no tensor is named {show(name)}")
    return {name: take_tensor(tensors, name, shapes[name], dtype) for name in tensors}


def check_prompts(
    config: ModelConfig,
    prompts: Sequence[np.ndarray],
    widths: Sequence[int],
    max_new_tokens: int,
) -> None:
    """Refuse an empty prompt, one past the context (clause 4.4), an id that is no token, and a
    width below 1."""
    if not len(prompts) == len(widths) > 0:
        raise BridgeError(
            f"prefill: {len(widths)} widths for {len(prompts)} prompts; give each one"
        )
    context = config.max_position_embeddings
    for number, (prompt, width) in enumerate(zip(prompts, widths, strict=True)):
        if len(prompt) == 0:
            raise BridgeError(f"prompt {number} is empty; give at least one token")
        if width < 1:
            raise BridgeError(f"prompt {number}: width must be 1 or above, not {width}")
        ids = np.asarray(prompt)
        if outside(ids, config.vocab_size).size:
            raise BridgeError(f"prompt {number} has an id outside 0..{config.vocab_size - 1}")
        check_context(f"prompt {number}", len(prompt), max_new_tokens, context)


def check_context(name: str, tokens: int, max_new_tokens: int, context: int) -> None:
    """Refuse a prompt of so many tokens whose rows may go past the context (clause 4.4); `name` is
    what to call it."""
    if tokens + max_new_tokens > context:
        raise BridgeError(
            f"{name} has {tokens} tokens, and with max_new_tokens {max_new_tokens} it goes past "
            f"the context of {context}; lower max_new_tokens, or shorten the prompt or leave it out"
        )


def check_advance(
    vocab_size: int,
    group: Int[np.ndarray, " R"],
    left: Int[np.ndarray, " R"],
    drawn: Int[np.ndarray, "R k"] | None,
    tokens: np.ndarray | None,
    keep: np.ndarray | None,
    back: np.ndarray | None,
) -> tuple[Bool[np.ndarray, " R"], Int[np.ndarray, " R"]]:
    """`keep` and `back` of an `advance` as arrays, once they are seen to be allowed.

    `group`: the prompt of each row before the call; `left`: how many timesteps it may still be fed,
    after those that were fed ahead; `drawn`: what `sample` (k is 1) or `sample_ahead` gave last at
    this step, None: nothing. Refuses what is not one a row, an id that is no token, going back in a
    way that clause 4.7 does not know, a row that has ended, and a timestep where none is left. What
    stands for a dropped row is not read, and its `back` is 0 in what comes out.
    """
    rows = len(group)
    kept = np.ones(rows, bool) if keep is None else np.asarray(keep)
    fed = None if tokens is None else np.asarray(tokens)
    steps = np.zeros(rows, np.int64) if back is None else np.asarray(back)
    for name, given in (("tokens", fed), ("keep", kept), ("back", steps)):
        if given is not None and given.shape != (rows,):
            raise BridgeError(
                f"advance: {name} is {list(given.shape)}, but there are {rows} rows; give each one"
            )
    for name, given, kinds in (("keep", kept, "b"), ("back", steps, "iu")):
        if given.dtype.kind not in kinds:
            wanted = "bool" if name == "keep" else "integer"
            raise BridgeError(f"advance: {name} must be {wanted}, not {given.dtype}")
    if fed is None and drawn is None:
        raise BridgeError("advance: no tokens given and none drawn; call sample first")
    if fed is not None and outside(fed, vocab_size, kept).size:
        raise BridgeError(f"advance: tokens has an id outside 0..{vocab_size - 1}")
    steps = np.where(kept, steps, 0).astype(np.int64)
    _check_back(group[kept], 1 if drawn is None else drawn.shape[1], steps[kept], fed)
    if drawn is not None and (drawn[np.arange(rows), -1 - steps][kept] < 0).any():
        raise BridgeError("advance: a row that has ended is kept; drop it, or go back before it")
    if ((left + steps)[kept] < 1).any():
        raise BridgeError(
            "advance: this step is past the max_new_tokens that a row came with; "
            "prefill or admit with more"
        )
    return kept, steps


def _check_back(
    group: Int[np.ndarray, " kept"],
    ahead: int,
    steps: Int[np.ndarray, " kept"],
    fed: np.ndarray | None,
) -> None:
    """Clause 4.7: no further than was fed ahead, a group together, with tokens to go on with."""
    if (bad := outside(steps, ahead)).size:
        raise BridgeError(
            f"advance: back {bad[0]} is outside 0..{ahead - 1}, what sample_ahead fed"
        )
    if steps.any() and fed is None:
        raise BridgeError("advance: back needs tokens, those to go on with")
    _, first, group = np.unique(group, return_index=True, return_inverse=True)
    if (steps != steps[first][group]).any():
        raise BridgeError("advance: back differs between rows of a group; they go back together")


def check_next_tokens(
    vocab_size: int, rows: int, tokens: np.ndarray, temperature: float
) -> Int[np.ndarray, " R"]:
    """The tokens whose log-probabilities a decoder is asked for (clause 6.10), int64. Refuses what
    is not one a row, an id that is no token, and a temperature at which there are none."""
    given = np.asarray(tokens)
    if given.shape != (rows,):
        raise BridgeError(
            f"logprobs: tokens is {list(given.shape)}, but there are {rows} rows; give each one"
        )
    if outside(given, vocab_size).size:
        raise BridgeError(f"logprobs: tokens has an id outside 0..{vocab_size - 1}")
    if not 0 < temperature < float("inf"):
        raise BridgeError(f"logprobs: temperature must be above 0, not {temperature}")
    return given.astype(np.int64)


def check_block(config: ModelConfig, layer: int) -> None:
    """Refuse a layer without a block."""
    with_block = config.bridge.layers if config.bridge else ()
    if layer not in with_block:
        raise BridgeError(f"layer {layer} has no Bridge block; layers with one: {list(with_block)}")


def check_trainable(names: Collection[str], trainable: Sequence[str]) -> None:
    """Refuse a name that is no tensor of the model, and to train nothing."""
    if not trainable:
        raise BridgeError("trainable: no tensor is named; name at least one")
    for name in trainable:
        if name not in names:
            raise BridgeError(f"trainable: no tensor is named {name!r}")


def state_shapes(config: ModelConfig, trained: Collection[str]) -> dict[str, tuple[int, ...]]:
    """The arrays of a trainer's state (clause 7.9), by key, in order: the step, and three of each
    trained tensor, side by side."""
    shapes, kinds = tensor_shapes(config), ("master", "exp_avg", "exp_avg_sq")
    arrays = {f"{kind}.{name}": shapes[name] for name in trained for kind in kinds}
    return {"step": (), **arrays}


def check_state(
    config: ModelConfig, trained: Collection[str], state: Mapping[str, np.ndarray]
) -> None:
    """Refuse a trainer's state (clause 7.9) that lacks an array of the `trained` tensors, holds one
    more, or has one of another shape."""
    wanted = state_shapes(config, trained)
    if differing := sorted(wanted.keys() ^ state.keys()):
        raise BridgeError(
            f"trainer state: {differing[0]} is missing or not trained here; "
            "resume with the same trainable tensors"
        )
    for key, shape in wanted.items():
        if state[key].shape != shape:
            raise BridgeError(
                f"trainer state: {key} is {list(state[key].shape)}, need {list(shape)}"
            )
    step = float(state["step"])
    if not (step.is_integer() and 0 <= step < 2**53):
        raise BridgeError(f"trainer state: step must be a number of steps, not {step:g}")


def check_optimizer(optimizer: AdamW) -> None:
    """Refuse a number that no setting of training may be; a rate of 0 leaves the weights be."""
    given = {"adam_eps": optimizer.eps, "weight_decay": optimizer.weight_decay}
    if optimizer.lr != 0:
        given["lr"] = optimizer.lr
    if optimizer.max_grad_norm is not None:
        given["max_grad_norm"] = optimizer.max_grad_norm
    for name, value in given.items():
        take(name, value)
    betas: Any = optimizer.betas
    if not isinstance(betas, Sequence) or isinstance(betas, str) or len(betas) != 2:
        raise BridgeError(f"betas must be two numbers {RANGES['betas'].says}, not {show(betas)}")
    for beta in betas:
        take("betas", beta)


def check_batch(batch: Batch, objective: Objective, vocab_size: int) -> None:
    """Refuse a batch whose shapes disagree, that has no target, or lacks what is read."""
    shape = batch.tokens.shape
    cells = ("active", "targets", "target_mask", "positions", "old_logprobs", "ref_logprobs")
    for name in cells:
        value = getattr(batch, name)
        if value is not None and value.shape != shape:
            raise BridgeError(f"batch.{name} is {list(value.shape)}, but tokens are {list(shape)}")
    for name in ("groups", "advantages"):
        value = getattr(batch, name)
        if value is not None and value.shape != shape[:1]:
            raise BridgeError(f"batch.{name} is {list(value.shape)}, not one number a row")
    for name in ("active", "target_mask"):
        if getattr(batch, name).dtype != bool:
            raise BridgeError(f"batch.{name} must be bool, not {getattr(batch, name).dtype}")
    if not batch.target_mask.any():
        raise BridgeError("batch.target_mask has no target token; leave such a batch out")
    if (batch.target_mask & ~batch.active).any():
        raise BridgeError("batch.target_mask has a target where active is false (clause 7.1)")
    for name, where in (("tokens", batch.active), ("targets", batch.target_mask)):
        if outside(getattr(batch, name), vocab_size, where).size:
            raise BridgeError(f"batch.{name} has an id outside 0..{vocab_size - 1}")
    if isinstance(objective, GRPO):
        check_temperature(objective.temperature)
        if batch.advantages is None:
            raise BridgeError("batch.advantages is missing; GRPO needs one a row (clause 7.6)")
        learnt = np.where(batch.target_mask.any(axis=1), batch.advantages, 0.0)
        for row in np.flatnonzero(~(np.abs(learnt) <= np.finfo(np.float32).max)):
            raise BridgeError(
                f"batch.advantages holds {learnt[row]:g} in row {row}, which is not finite in "
                "float32; mend the rewards (clause 7.6)"
            )
        if objective.beta and batch.ref_logprobs is None:
            raise BridgeError("batch.ref_logprobs is missing; GRPO needs them unless beta is 0")


def check_temperature(temperature: float) -> None:
    """Refuse a temperature at which there are no log-probabilities (clause 7.5)."""
    if not 0 < temperature < float("inf"):
        raise BridgeError(f"temperature must be above 0 to train, not {temperature}")


def check_loss_chunk(loss_chunk: int | None) -> int:
    """Of how many targets the logits may be in memory at once (clause 7.15): the number given, or
    `LOSS_CHUNK`. Refuses one below 1."""
    return LOSS_CHUNK if loss_chunk is None else take("loss_chunk", loss_chunk)


def micro_batches(
    batch: Batch | Sequence[Batch], objective: Objective, vocab_size: int
) -> tuple[list[Batch], int]:
    """The batches of one update, each checked, and the number of targets in all of them, by which
    each one's loss is divided (clause 7.10). Refuses a group that is split over two of them."""
    batches = [batch] if isinstance(batch, Batch) else list(batch)
    if not batches:
        raise BridgeError("step: no batch given; give at least one")
    seen: dict[int, int] = {}
    for number, part in enumerate(batches):
        check_batch(part, objective, vocab_size)
        for group in np.unique(part.groups).tolist():
            if group in seen:
                raise BridgeError(
                    f"batch.groups: group {group} is split over micro-batches {seen[group]} and "
                    f"{number}; its rows read each other, so keep them in one (clause 7.3)"
                )
            seen[group] = number
    return batches, sum(int(part.target_mask.sum()) for part in batches)


def add_metrics(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The metrics of an update from those of its micro-batches, each a sum over targets that was
    divided by the number of targets in all of them (clause 7.10)."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0.0) for part in parts) for name in names}
