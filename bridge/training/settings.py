"""What a run is, as one frozen object: the only list of settings, their defaults and their ranges.

A TOML file has a key for each field, the command line a flag; a flag overrides the file. Paths are
relative to the working directory. A wrong key, type or range is a BridgeError of one line.
"""

import math
import types
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from difflib import get_close_matches
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

from bridge.config import TARGETS
from bridge.decoding.targets import LOSS_CHUNK
from bridge.errors import BridgeError, show
from bridge.files.fields import NAMES
from bridge.files.strict_json import MAX_DEPTH
from bridge.files.utf8 import is_text
from bridge.numbers.ranges import LARGE, RANGES, take
from bridge.training.schedule import SCHEDULES

LOGS = ("tensorboard", "wandb", "trackio")
FILTERED = "would sample from another policy than log-probabilities describe (spec 7.5); leave it"
REFUSED = {name: FILTERED for name in ("top_k", "top_p", "min_p")}


def setting(default: Any, help: str, panel: str, valid: str = "") -> Any:
    """A field with what `--help` says of it; `valid` names one of CHOICES, or the range of a number
    (`bridge.numbers.ranges`) where that is not the field's own name."""
    metadata = {"help": help, "panel": panel, "valid": valid}
    return field(default=default, metadata=metadata)


BETA = RANGES["betas"]
CHOICES: dict[str, Callable[[Any], bool]] = {
    f"one of {', '.join(SCHEDULES)}": lambda x: x in SCHEDULES,
    f"of {', '.join(LOGS)}": lambda x: set(x) <= set(LOGS),
    f"of {', '.join(TARGETS)}": lambda x: set(x) <= set(TARGETS),
    f"two numbers {BETA.says}": lambda x: len(x) == 2 and all(map(BETA.has, x)),
}
SCHEDULE, LOG, TARGET, BETAS = CHOICES
TRAINABLE = "bridge (the blocks, and low-rank updates if there are any), all, or names of tensors."


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What both kinds of training need."""

    kind: ClassVar[str] = ""

    checkpoint: str = setting("", "The model to start from: a checkpoint directory.", "Model")
    out: str = setting("", "The run's directory, to make or to go on with.", "Run")
    task: str = setting(
        "", "reasoning-gym:NAME, a JSONL file, or module:function; see docs/training.md.", "Task"
    )
    task_options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Options of the task, as KEY=VALUE.", "panel": "Task", "valid": ""},
    )
    reward_seconds: float = setting(10.0, "Time limit of a reward.", "Task")
    system: str | None = setting(None, "The system message of the chat.", "Task")
    raw: bool = setting(False, "Feed prompts as they are, without the chat template.", "Task")
    stop: tuple[str, ...] = setting((), "Texts or special tokens that end a row.", "Task")

    base: str | None = setting(None, "The host of an adapter checkpoint.", "Model")
    backend: str | None = setting(None, "See bridge backends; else the best.", "Model")
    device: str | None = setting(None, "Such as cpu or cuda:0; else the best.", "Model")
    dtype: str | None = setting(None, "float32, bfloat16, float16, float64.", "Model")
    trainable: tuple[str, ...] = setting((), TRAINABLE, "Model")
    lora_rank: int | None = setting(
        None,
        "Train the host through low-rank updates of its matrices (LoRA) of this rank, such as 16: "
        "its own weights stay, and need no gradients and moments. Else it trains whole or not.",
        "Model",
    )
    lora_alpha: float | None = setting(
        None, "Updates count alpha / rank times; else alpha is twice the rank.", "Model"
    )
    lora_targets: tuple[str, ...] = setting(
        (),
        f"The matrices that get updates: some of {', '.join(TARGETS)}; else all.",
        "Model",
        TARGET,
    )
    adapter: bool = setting(
        False,
        "Save the blocks and low-rank updates alone; only where they alone train.",
        "Model",
    )
    checkpoint_activations: bool = setting(
        False, "Compute layers again in the backward pass: less memory, more time.", "Model"
    )

    loss_chunk: int = setting(
        LOSS_CHUNK, "Logits are in memory of so many targets at once: fewer take less.", "Model"
    )

    problems: int = setting(16, "Problems that are sampled.", "Sampling")
    width: int = setting(8, "Rows of a group.", "Sampling", "train.width")
    max_new_tokens: int | None = setting(
        None, "Of each row; else 256, or what the context leaves.", "Sampling"
    )
    temperature: float = setting(
        1.0,
        "Of the sampling, at which log-probabilities are taken too.",
        "Sampling",
        "train.temperature",
    )
    max_rows: int = setting(256, "At most so many rows are decoded at once.", "Sampling")

    lr: float = setting(1e-5, "Peak learning rate.", "Optimizer")
    schedule: str = setting(
        "constant", "Of the learning rate after warm-up.", "Optimizer", SCHEDULE
    )
    warmup: int = setting(0, "Steps of linear warm-up.", "Optimizer")
    lr_end: float = setting(0.0, "Where linear and cosine lead, as a fraction of lr.", "Optimizer")
    betas: tuple[float, ...] = setting((0.9, 0.999), "Of AdamW.", "Optimizer", BETAS)
    adam_eps: float = setting(1e-8, "Of AdamW.", "Optimizer")
    weight_decay: float = setting(0.0, "Of AdamW, decoupled.", "Optimizer")
    max_grad_norm: float = setting(1.0, "Gradients are clipped to it.", "Optimizer")
    micro_batch_tokens: int = setting(
        32768,
        "Cells computed in one forward pass, padding included: what a group's rows share, such as "
        "its prompt, counts once. Groups stay whole.",
        "Optimizer",
    )
    stop_grad_norm: float = setting(
        1e4, "A gradient norm above it ends the run, its batch saved.", "Run"
    )
    stop_loss: float = setting(
        4.0,
        "A loss above so many times its lowest median of 20 steps, and above ln(vocabulary), ends "
        "the run, its batch saved.",
        "Run",
    )

    seed: int = setting(0, "Of data order and sampling.", "Run")
    save_every: int = setting(20, "Steps between checkpoints.", "Run")
    keep: int = setting(2, "Checkpoints kept: the latest ones.", "Run")
    eval_every: int = setting(20, "Steps between evaluations; 0: none.", "Run")
    eval_problems: int = setting(64, "Validation problems of an evaluation.", "Run")
    norms_every: int = setting(
        10, "Steps between measurements of the blocks' norm ratios; 0: none.", "Run"
    )
    log: tuple[str, ...] = setting((), f"Beside log.jsonl: {', '.join(LOGS)}.", "Run", LOG)

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for f in fields(self):
            value, valid = _typed(f.name, getattr(self, f.name), hints[f.name]), f.metadata["valid"]
            if valid in CHOICES:
                if not CHOICES[valid](value):
                    raise BridgeError(f"{f.name} must be {valid}, not {_shown(value)}")
            elif type(value) in (int, float):
                value = take(range_of(f), value)
            object.__setattr__(self, f.name, value)
        for name in ("checkpoint", "out"):
            if not getattr(self, name):
                raise BridgeError(f"{name} is missing; name a directory")
        for name in ("checkpoint", "out", "task", "base", "data"):
            if "\0" in (path := getattr(self, name, None) or ""):
                raise BridgeError(f"{name} must be a name without NUL, not {_shown(path)}")
        if self.lora_rank is not None and self.trainable == ("all",):
            raise BridgeError(
                "lora_rank spares the host's own matrices, which trainable all would train; give "
                "one of the two"
            )

    @property
    def trained(self) -> str | tuple[str, ...]:
        """As `Model.trainer` takes it; empty where nothing says it."""
        return self.trainable[0] if self.trainable in (("bridge",), ("all",)) else self.trainable

    def to_json(self) -> dict[str, Any]:
        """Every field that is set, with plain lists, in order; `kind` first."""
        found: dict[str, Any] = {"kind": self.kind}
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None:
                found[f.name] = list(value) if isinstance(value, tuple) else value
        return found


@dataclass(frozen=True, kw_only=True)
class SFTSettings(Settings):
    """The warm-up of fresh blocks on groups of correct responses."""

    kind: ClassVar[str] = "sft"

    data: str | None = setting(
        None, "JSONL of prompt and correct responses, in place of sampling them.", "Data"
    )
    problems: int = setting(256, "Problems to sample responses to.", "Data")
    samples: int = setting(8, "Responses sampled a problem.", "Data")
    distinct: bool = setting(False, "Count equal responses to a problem once.", "Data")
    width: int = setting(8, "At most so many correct responses are a group.", "Data", "train.width")
    epochs: int = setting(3, "Times that every group is learnt from.", "Data")
    groups: int = setting(16, "Groups of an update.", "Optimizer")
    lr: float = setting(1e-3, "Peak learning rate.", "Optimizer")
    warmup: int = setting(10, "Steps of linear warm-up.", "Optimizer")
    trainable: tuple[str, ...] = setting(("bridge",), TRAINABLE, "Model")
    eval_every: int = setting(0, "Steps between evaluations; 0: none.", "Run")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.task and (self.data is None or self.eval_every):
            raise BridgeError("task is missing; name one, or give data and no eval_every")


@dataclass(frozen=True, kw_only=True)
class GRPOSettings(Settings):
    """Reinforcement learning by group-relative advantages (clauses 7.5 and 7.6)."""

    kind: ClassVar[str] = "grpo"

    steps: int = setting(100, "Steps: each samples, scores and learns.", "Run")
    problems: int = setting(16, "Problems of a step, each one group.", "Sampling")
    width: int = setting(8, "Rows of a group.", "Sampling", "train.width")
    minibatches: int = setting(1, "Updates of a step, of whole groups.", "Optimizer")
    epochs: int = setting(1, "Times that a step's rows are learnt from.", "Optimizer")
    eps_low: float = setting(0.2, "Ratios are clipped to 1 - eps_low.", "Objective")
    eps_high: float = setting(0.28, "And to 1 + eps_high.", "Objective")
    beta: float = setting(0.0, "Weight of the KL penalty to the model at the start.", "Objective")
    normalise_std: bool = setting(
        True, "Divide advantages by the group's std; Dr. GRPO does not.", "Objective"
    )
    drop_equal: bool = setting(
        False, "Leave groups of equal rewards out of the batch.", "Objective"
    )
    mask_truncated: bool = setting(
        False,
        "Leave rows that max_new_tokens cut off out of the loss; their rewards still count in the "
        "group.",
        "Objective",
    )
    stop_loss: float = setting(
        100.0,
        "A loss above so many times the largest advantage, or 1, ends the run, its batch saved.",
        "Run",
    )
    stop_entropy: float = setting(
        0.9,
        "An entropy above so much of ln(vocabulary), after one below half of it, ends the run, its "
        "batch saved; at 1 or above none does.",
        "Run",
    )
    gap_every: int = setting(
        10, "Steps between measurements of the log-probability gap; 0: none.", "Run"
    )
    trainable: tuple[str, ...] = setting(
        (), f"{TRAINABLE} Default: all, and bridge where there are updates.", "Model"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.task:
            raise BridgeError("task is missing; name one, such as reasoning-gym:countdown")
        if self.minibatches > self.problems:
            raise BridgeError(
                f"minibatches must be at most problems ({self.problems}), since groups stay whole; "
                f"not {self.minibatches}"
            )


KINDS: dict[str, type[Settings]] = {"sft": SFTSettings, "grpo": GRPOSettings}


def read_settings(kind: str, given: Mapping[str, Any], where: str = "settings") -> Settings:
    """Settings from names and values, such as a TOML file's; `where` they are from, for messages.

    Raises BridgeError for a key that there is not, a value of the wrong type or out of range, and
    for settings of another kind of training.
    """
    if given.get("kind", kind) != kind:
        raise BridgeError(f"{where}: kind is {given['kind']!r}; use bridge train {given['kind']}")
    known = [f.name for f in fields(KINDS[kind])]
    for name in given:
        if name in REFUSED:
            raise BridgeError(f"{where}: {name} is refused in training: it {REFUSED[name]} out")
        if name != "kind" and name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise BridgeError(f"{where}: {name} is no setting of bridge train {kind}{hint}")
    try:
        return KINDS[kind](**{name: value for name, value in given.items() if name != "kind"})
    except BridgeError as error:
        raise BridgeError(f"{where}: {error}") from None


def range_of(f: "Field[Any]") -> str:
    """The name in `bridge.numbers.ranges` of a field that is a number."""
    return f.metadata["valid"] or f.name


def _typed(name: str, value: Any, hint: Any) -> Any:
    """The value as the field's type, where it is one: an int serves as a float, a list or a single
    value as a tuple."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    wanted = options[0]
    if get_origin(wanted) is tuple:
        inner = get_args(wanted)[0]
        listed = value if isinstance(value, list | tuple) else [value]
        return tuple(_typed(name, item, inner) for item in listed)
    if get_origin(wanted) is dict:
        if not isinstance(value, Mapping):
            raise BridgeError(f"{name} must be a table, not {_shown(value)}")
        return _plain(name, value)
    if wanted is float and type(value) is int and abs(value) <= LARGE:
        value = float(value)
    if type(value) is not wanted or (isinstance(value, float) and not math.isfinite(value)):
        raise BridgeError(f"{name} must be {NAMES[wanted]}, not {_shown(value)}")
    return _written(name, value)


def _plain(name: str, value: Any, depth: int = MAX_DEPTH) -> Any:
    """What an option of a task is, if TOML can say it: it is kept with the run."""
    if isinstance(value, Mapping) and depth and all(isinstance(key, str) for key in value):
        return {
            _written(name, key): _plain(f"{name}.{key}", item, depth - 1)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple) and depth:
        return [_plain(name, item, depth - 1) for item in value]
    finite = not isinstance(value, float) or math.isfinite(value)
    if not isinstance(value, str | bool | int | float) or not finite:
        raise BridgeError(
            f"{name} must be a text, a finite number, true, false, or a list or table of such, not "
            f"{_shown(value)}"
        )
    return _written(name, value)


def _written(name: str, value: Any) -> Any:
    """The value, where a file can say it. Raises BridgeError for a text that is no UTF-8."""
    if isinstance(value, str) and not is_text(value):
        raise BridgeError(f"{name} must be text in UTF-8, not {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    return show(list(value) if isinstance(value, tuple) else value)
