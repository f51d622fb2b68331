"""The inputs of each golden vector: small, exact in float64, and a function of an attempt's number.

A case is `CASES[name](attempt) -> settings, inputs`, where `name` begins with the clause it shows.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import numpy as np

from bridge.config import bridge_shapes, parse_config, tensor_shapes
from bridge.decoding.inputs import default_positions
from bridge.philox import philox4x32
from bridge_conformance.golden import config_of

Case = tuple[dict[str, Any], dict[str, np.ndarray]]
BRIDGE = {
    "spec_version": "1.0",
    "kind": "attention",
    "num_heads": 2,
    "head_dim": 3,
    "layers": [0],
    "norm_eps": 1e-06,
}
HOST = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": True,
    "bridge": BRIDGE,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {"tie_word_embeddings": False, "rope_theta": 1000000.0},
    "qwen3": {
        "head_dim": 6,
        "use_sliding_window": True,
        "sliding_window": 2,
        "max_window_layers": 0,
    },
    "mistral": {"sliding_window": 3},
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
}


class Numbers:
    """Exact pseudo-random arrays, the same on every machine: multiples of 2^-12 in [-1, 1)."""

    def __init__(self, attempt: int) -> None:
        self.attempt, self.drawn = attempt, 0

    def words(self, *shape: int) -> np.ndarray:
        """uint32."""
        self.drawn += 1
        blocks = np.arange(-(-prod(shape) // 4))
        words = philox4x32((blocks, self.drawn, 0, 2), self.attempt).reshape(-1)
        return words[: prod(shape)].reshape(shape)

    def __call__(self, *shape: int) -> np.ndarray:
        """float64."""
        return (self.words(*shape) >> np.uint32(19)) * 2.0**-12 - 1

    def below(self, end: int, *shape: int) -> np.ndarray:
        """int64 in [0, end)."""
        return self.words(*shape).astype(np.int64) % end

    def tensors(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        """Weights: norms around 1, others around 0."""
        return {
            n: self(*s) / 4 + 1 if n.endswith("norm.weight") else self(*s)
            for n, s in shapes.items()
        }


def bools(*rows: str) -> np.ndarray:
    """`bools("110", "100")` as a bool array."""
    return np.array([[cell == "1" for cell in row] for row in rows])


# Groups of widths 3 and 2, interleaved; rows that end at different times, and padding on the left.
GROUPS = np.array([5, 2, 5, 2, 5])
ACTIVE = bools("11111", "01111", "11100", "00110", "11110")
BATCH_GROUPS, BATCH_ACTIVE = GROUPS[[0, 2, 1]], ACTIVE[[0, 2, 1]]


def positions(attempt: int) -> Case:
    return {}, {"active": bools("11111", "00111", "11100", "01011", "00000")}


def norm(attempt: int) -> Case:
    numbers = Numbers(attempt)
    return {"eps": 1e-06}, {"x": numbers(3, 8), "weight": numbers(8)}


def allowed(attempt: int) -> Case:
    return {}, {"groups": GROUPS, "active": ACTIVE}


def softmax(attempt: int) -> Case:
    pattern = np.array([[True, True, False, True], [False, False, False, True], [False] * 4])
    return {}, {"score": 8 * Numbers(attempt)(3, 4), "allowed": pattern}


def block(attempt: int, kind: str, groups: np.ndarray, active: np.ndarray) -> Case:
    numbers, bridge = Numbers(attempt), {**BRIDGE, "kind": kind}
    shapes = bridge_shapes(parse_config({**HOST, "bridge": bridge}), 0)
    names = {n.partition("bridge.")[2]: s for n, s in shapes.items()}
    weights = {f"weights.{n}": a for n, a in numbers.tensors(names).items()}
    hidden = 2 * numbers(*active.shape, 8)
    return {"bridge": bridge}, {"hidden": hidden, "groups": groups, "active": active, **weights}


# Updates of some modules, whose matrices are beside others that have none.
LORA: dict[str, Any] = {
    "rank": 2,
    "alpha": 3.0,
    "targets": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
}


def model(
    attempt: int, lora: dict[str, Any] | None = None, **changes: Any
) -> tuple[dict[str, Any], dict[str, np.ndarray], Numbers]:
    raw, numbers = {**HOST, **changes}, Numbers(attempt)
    settings = {"config": raw} if lora is None else {"config": raw, "lora": lora}
    tensors = numbers.tensors(tensor_shapes(config_of(settings)))
    return settings, {f"weights.{n}": a for n, a in tensors.items()}, numbers


def logits(attempt: int, **changes: Any) -> Case:
    settings, weights, numbers = model(attempt, **changes)
    batch = {
        "tokens": numbers.below(11, *ACTIVE.shape),
        "groups": GROUPS,
        "active": ACTIVE,
        "positions": default_positions(ACTIVE),
    }
    return settings, {**batch, **weights}


def ratios(attempt: int, kind: str) -> Case:
    bridge = {**BRIDGE, "kind": kind, "layers": [0, 1]}
    return logits(attempt, num_hidden_layers=2, bridge=bridge)


def decode(attempt: int, lora: dict[str, Any] | None = None, **more: Any) -> Case:
    settings, weights, numbers = model(attempt, lora, model_type="mistral", sliding_window=3)
    prompts = {"prompt.0": numbers.below(11, 4), "prompt.1": numbers.below(11, 2)}
    # Rows by columns, steps by rows: a column of ones ends where its row does.
    alive = bools("11111", "11101", "10101", "00101")
    settings |= {"widths": [3, 2], "max_new_tokens": 5, **more}
    return settings, {
        **prompts,
        "tokens": numbers.below(11, *alive.shape),
        "alive": alive,
        **weights,
    }


def coming(attempt: int) -> Case:
    settings, weights, numbers = model(attempt, model_type="mistral", sliding_window=3)
    prompts = {f"prompt.{i}": numbers.below(11, n) for i, n in enumerate((4, 2, 5, 1))}
    # A column of ones begins where its row comes: the last one when all others have left.
    alive = bools("111000", "111000", "101110", "001100", "000001", "000001")
    settings |= {"widths": [2, 1, 2, 1], "max_new_tokens": 5, "comes": [[0, 1], [], [2], [], [3]]}
    tokens = numbers.below(11, *alive.shape)
    return settings, {**prompts, "tokens": tokens, "alive": alive, **weights}


SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 1.0, "seed": 1},
    {"temperature": 1.0, "seed": 2**63 + 2},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 5, "seed": 3},
    {"temperature": 1.4, "top_p": 0.9, "min_p": 0.02, "seed": 1},
]


def say(attempt: int) -> Case:
    settings, weights, numbers = model(attempt + 1)  # by which two rows end early
    prompts = {"prompt.0": numbers.below(11, 3), "prompt.1": numbers.below(11, 2)}
    settings |= {"widths": [3, 2], "steps": 6, "samplings": SAMPLINGS, "ends": [4, 9]}
    return settings, {**prompts, **weights}


def back(attempt: int) -> Case:
    settings, inputs = say(attempt)
    # Of four columns, the first group takes back all that was fed, so that the row that ended at
    # once goes on, and the second group one timestep.
    gone = {"back": np.array([3, 3, 3, 1, 1]), "keep": np.array([True, True, False, True, True])}
    return settings | {"ahead": 4}, {**inputs, **gone, "tokens": np.array([5, 6, 7, 8, 10])}


def generate(attempt: int) -> Case:
    settings, weights, numbers = model(attempt)
    sampling = {"temperature": 0.9, "top_k": 9, "top_p": 0.95, "min_p": 0.02, "seed": 2**40 + 7}
    settings |= {"width": 4, "steps": 6, "sampling": sampling}
    return settings, {"prompt": numbers.below(11, 3), **weights}


def rope(attempt: int, kind: str) -> Case:
    numbers = Numbers(attempt)
    parameters = {"rope_type": kind, "rope_theta": 10000.0, **ROPES[kind]}
    raw = {**HOST, "head_dim": 8, "rope_parameters": parameters}
    return {"config": raw}, {"positions": np.array([[0, 1, 17, 63]]), "heads": numbers(1, 4, 2, 8)}


def swiglu(attempt: int) -> Case:
    numbers = Numbers(attempt)
    return {}, {"gate": 8 * numbers(4, 6), "up": numbers(4, 6)}


def philox(attempt: int) -> Case:
    # The published vectors of the algorithm have these counters under other keys; see the tests.
    counters = [[0, 0, 0, 0], [1, 2, 3, 4], [2**32 - 1] * 4]
    return {"seed": 2**63 + 12345}, {"counter": np.array(counters, np.int64)}


def uniform(attempt: int) -> Case:
    counters = [[s, r, p] for s in (0, 1, 1000) for r in (0, 7) for p in (0, 3)]
    return {"seed": 42}, {"counter": np.array(counters, np.int64)}


def sampling(attempt: int) -> Case:
    numbers = Numbers(attempt)
    samplings: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.5, "top_k": 4},
        {"temperature": 1.5, "top_p": 0.7},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 0.8, "top_k": 6, "top_p": 0.9, "min_p": 0.05},
    ]
    scores = (4 * numbers(12, 9)).astype(np.float32)
    scores[0] = np.round(scores[0])  # ties
    u = ((numbers(12) + 1) / 2).astype(np.float32)
    return {"samplings": samplings}, {"logits": scores, "uniform": u}


def train_batch(numbers: Numbers, active: np.ndarray, groups: np.ndarray) -> dict[str, np.ndarray]:
    shape = active.shape
    mask = active & (np.arange(shape[1]) >= 1)
    return {
        "tokens": numbers.below(11, *shape),
        "groups": groups,
        "active": active,
        "targets": np.where(mask, numbers.below(11, *shape), 0),
        "target_mask": mask,
        "advantages": np.array([1.0, -1.5, 0.5])[: shape[0]],
        "old_logprobs": np.where(mask, numbers(*shape) - 2.5, 0),
        "ref_logprobs": np.where(mask, numbers(*shape) - 2.5, 0),
    }


def loss(attempt: int, objective: dict[str, float] | None) -> Case:
    numbers = Numbers(attempt)
    batch = train_batch(numbers, BATCH_ACTIVE, BATCH_GROUPS)
    return {"objective": objective}, {"logits": 2 * numbers(*BATCH_ACTIVE.shape, 11), **batch}


REWARDS: dict[str, list[list[float]]] = {
    "": [[1.0, 0.0, 0.0, 1.0], [0.5, 0.5], [0.25, -2.0]],
    # Equal are the first, and the one at the border; the others are not.
    "-rounding": [
        [0.3, 0.1 + 0.2, 0.3],
        [-1.0, -1.0 - 2.0**-46],
        [1.0, 1.0 + 2.0**-45, 1.0],
        [0.7, 0.7 + 1e-9, 0.7 + 4e-9],
    ],
    "-tiny": [[0.0, 1e-200, 3e-200], [3e-200, 3e-200], [-1e-200, 0.0]],
    "-huge": [[1e300, -1e300, 0.0, 0.0], [1.5e308, -1.5e308], [1e300, 1.0, 0.0]],
}


def advantages(attempt: int, kind: str) -> Case:
    groups = REWARDS[kind]
    numbers = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    return {}, {"rewards": np.concatenate(groups), "groups": numbers}


def clip(attempt: int) -> Case:
    numbers = Numbers(attempt)
    return {"max_norm": 0.5}, {"a": numbers(3, 4), "b": numbers(5)}


OPTIMIZER = {"lr": 0.01, "betas": [0.9, 0.95], "eps": 1e-06, "weight_decay": 0.1}


def adamw(attempt: int) -> Case:
    numbers = Numbers(attempt)
    return {"optimizer": OPTIMIZER}, {"weight": numbers(3, 4), "gradients": numbers(4, 3, 4)}


def training(attempt: int, **more: Any) -> Case:
    settings, weights, numbers = model(attempt)
    trainable = list(bridge_shapes(parse_config(settings["config"]), 0))
    settings |= {"objective": {"beta": 0.05}, "trainable": trainable, **more}
    return settings, {**train_batch(numbers, BATCH_ACTIVE, BATCH_GROUPS), **weights}


def updates(attempt: int) -> Case:
    settings, weights, numbers = model(attempt, LORA, model_type="qwen2")
    ends = (".lora_A.weight", ".lora_B.weight", ".q_proj.bias", ".bridge.v_proj.weight")
    trainable = [n for n in tensor_shapes(config_of(settings)) if n.endswith(ends)]
    settings |= {"objective": None, "trainable": trainable}
    return settings, {**train_batch(numbers, BATCH_ACTIVE, BATCH_GROUPS), **weights}


def shared(attempt: int) -> Case:
    settings, weights, numbers = model(attempt, model_type="mistral", sliding_window=3)
    batch = train_batch(numbers, BATCH_ACTIVE, BATCH_GROUPS)
    batch["tokens"][1, :2] = batch["tokens"][0, :2]  # two timesteps of the first group's rows
    batch["tokens"][1, 2] = (batch["tokens"][0, 2] + 1) % 11  # at the third they part
    trainable = list(tensor_shapes(config_of(settings)))
    settings |= {"objective": {"beta": 0.05}, "trainable": trainable}
    return settings, {**batch, **weights}


def fresh_updates(attempt: int) -> Case:
    return {"config": {**HOST, "num_hidden_layers": 2}, "lora": LORA, "seed": 2**33 + 1}, {}


def fresh(attempt: int, kind: str) -> Case:
    bridge = {**BRIDGE, "kind": kind, "layers": [0, 1]}
    return {"config": {**HOST, "num_hidden_layers": 2, "bridge": bridge}, "seed": 2**33 + 1}, {}


CASES: dict[str, Callable[[int], Case]] = {
    "2.4-positions": positions,
    "3.2-norm": norm,
    "3.4-allowed": allowed,
    "3.5-softmax": softmax,
    "3.6-block": partial(
        block, kind="attention", groups=np.zeros(4, np.int64), active=np.ones((4, 2), bool)
    ),
    "3.6-block-ragged": partial(block, kind="attention", groups=GROUPS, active=ACTIVE),
    "3.9-ratios-attention": partial(ratios, kind="attention"),
    "3.9-ratios-mlp": partial(ratios, kind="mlp"),
    "4.1-decode": decode,
    "4.5-decode": coming,
    "4.6-say": say,
    "4.7-back": back,
    **{f"5.1-logits-{f}": partial(logits, model_type=f, **c) for f, c in FAMILIES.items()},
    **{f"5.6-rope-{kind}": partial(rope, kind=kind) for kind in ROPES},
    "5.8-swiglu": swiglu,
    "5.10-decode": partial(decode, lora=LORA),
    "5.10-gradients": updates,
    "6.1-philox": philox,
    "6.2-uniform": uniform,
    "6.7-sampling": sampling,
    "6.7-generate": generate,
    "6.10-logprobs": partial(decode, temperature=0.7),
    "7.3-gradients": training,
    "7.4-loss-sft": partial(loss, objective=None),
    "7.5-loss-grpo": partial(
        loss, objective={"eps_low": 0.2, "eps_high": 0.28, "beta": 0.1, "temperature": 0.75}
    ),
    **{f"7.6-advantages{kind}": partial(advantages, kind=kind) for kind in REWARDS},
    "7.7-clip": clip,
    "7.8-adamw": adamw,
    "7.9-training": partial(training, updates=2, optimizer={**OPTIMIZER, "eps": 0.01}),
    "7.14-gradients": shared,
    "8.1-block-mlp": partial(block, kind="mlp", groups=GROUPS, active=ACTIVE),
    "8.2-fresh-attention": partial(fresh, kind="attention"),
    "8.2-fresh-mlp": partial(fresh, kind="mlp"),
    "8.3-fresh": fresh_updates,
}
