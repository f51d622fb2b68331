"""Hypothesis strategies: random small models and the batches to run them on.

Shapes, families and settings are drawn by Hypothesis, so that a failure shrinks to the plainest
model that shows it; the numbers in tensors come from a drawn seed. A configuration is drawn as the
raw Hugging Face object, in either spelling, and parsed as a user's would be.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from bridge.config import (
    FAMILIES,
    SPEC_VERSION,
    TARGETS,
    LoraConfig,
    bridge_shapes,
    lora_names,
    tensor_shapes,
)
from bridge.contract import GRPO, SFT
from bridge_conformance.cases import (
    MAGNITUDES,
    BlockCase,
    DecodeCase,
    ModelCase,
    RowsCase,
    TrainCase,
    rows_of,
    share,
)
from bridge_conformance.cases_coming import SHORTEST, ComingCase, Wave
from bridge_conformance.cases_ends import SMALLEST, EndsCase
from bridge_conformance.cases_life import Life, LifeCase

SEEDS = st.integers(0, 2**32 - 1)
MAX_POSITIONS = (64, 32768)


@st.composite
def rope_settings(draw) -> dict[str, Any]:
    """The rope keys of a raw config: every type, older and newer spelling (clauses 5.6, 5.7)."""
    theta = draw(st.sampled_from([10000.0, 100.0, 500000]))
    kind = draw(st.sampled_from(["default", "linear", "llama3", "yarn"]))
    if kind == "default" and draw(st.booleans()):
        return {"rope_theta": theta} if draw(st.booleans()) else {}
    settings: dict[str, Any] = {}
    if kind != "default":
        settings["factor"] = draw(st.sampled_from([2.0, 8.0]))
    if kind in ("llama3", "yarn"):
        settings["original_max_position_embeddings"] = draw(st.sampled_from([16, 48]))
    if kind == "llama3":
        settings |= {"low_freq_factor": 1.0, "high_freq_factor": draw(st.sampled_from([2.0, 4.0]))}
    if kind == "yarn":
        extras = (
            {},
            {"attention_factor": 1.5},
            {"beta_fast": 4, "beta_slow": 0.5, "truncate": False},
            {"mscale": 0.7, "mscale_all_dim": 1.3},
        )
        settings |= draw(st.sampled_from(extras))
    spelling = draw(st.sampled_from(["rope_parameters", "rope_type", "type"]))
    if spelling == "rope_parameters":
        return {spelling: {"rope_type": kind, "rope_theta": theta, **settings}}
    return {"rope_theta": theta, "rope_scaling": {spelling: kind, **settings}}


@st.composite
def host_configs(draw, families: tuple[str, ...] = FAMILIES) -> dict[str, Any]:
    """A raw host config: GQA, tied or not, biases, sliding windows, rope settings (chapter 5)."""
    family = draw(st.sampled_from(families))
    kv_heads = draw(st.integers(1, 2))
    heads = kv_heads * draw(st.integers(1, 3))
    head_dim = draw(st.sampled_from([4, 2, 8]))
    layers = draw(st.integers(1, 3))
    raw: dict[str, Any] = {
        "model_type": family,
        "vocab_size": draw(st.integers(8, 24)),
        "hidden_size": heads * head_dim,
        "intermediate_size": draw(st.integers(4, 20)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": draw(st.sampled_from(MAX_POSITIONS)),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-3])),
        "tie_word_embeddings": draw(st.booleans()),
        "hidden_act": "silu",
        "eos_token_id": 1,
        "bos_token_id": 0,
        **draw(rope_settings()),
    }
    if family == "qwen3" or (family != "qwen2" and draw(st.booleans())):
        raw["head_dim"] = draw(st.sampled_from([head_dim, head_dim + 2]))
    if family in ("llama", "qwen3"):
        raw["attention_bias"] = draw(st.booleans())
    if family == "llama":
        raw["mlp_bias"] = draw(st.booleans())
    if family == "mistral":
        raw["sliding_window"] = draw(st.sampled_from([None, 3, 2, 5]))
    given = draw(st.sampled_from([None, "max_window_layers", "layer_types"]))
    if family in ("qwen2", "qwen3") and given is not None:
        raw |= {"use_sliding_window": True, "sliding_window": draw(st.integers(2, 3))}
        if given == "max_window_layers":
            raw[given] = draw(st.integers(0, layers - 1))
        else:
            kinds = ["full_attention", "sliding_attention"] * layers
            first = draw(st.integers(0, 1))
            raw[given] = kinds[first : first + layers]
    return raw


@st.composite
def models(
    draw,
    kinds: tuple[str, ...] = ("attention", "mlp"),
    magnitudes: tuple[str, ...] = tuple(MAGNITUDES),
) -> ModelCase:
    """A host with Bridge blocks of one of `kinds` after at least one layer (chapters 3 and 8)."""
    raw = draw(host_configs())
    layer_numbers = range(raw["num_hidden_layers"])
    heads, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    if draw(st.booleans()):  # as wide as the model: square weights, which hide a transposition
        heads = raw["num_attention_heads"]
        head_dim = raw["hidden_size"] // heads
    raw["bridge"] = {
        "spec_version": SPEC_VERSION,
        "kind": draw(st.sampled_from(kinds)),
        "num_heads": heads,
        "head_dim": head_dim,
        "layers": sorted(draw(st.sets(st.sampled_from(layer_numbers), min_size=1))),
        "norm_eps": draw(st.sampled_from([1e-6, 1e-3])),
    }
    # Half of the models are plain.
    extreme = draw(st.booleans())
    return ModelCase(raw, draw(SEEDS), draw(st.sampled_from(magnitudes)) if extreme else "plain")


# By number of groups first: a list would mostly be short.
WIDTHS = st.integers(1, 3).flatmap(
    lambda groups: st.lists(st.integers(1, 5), min_size=groups, max_size=groups)
)
# How the active cells of a row may lie: all of them, padding on either side, gaps, none at all.
PATTERNS = ("full", "left", "right", "both", "gaps", "none")


@st.composite
def row_batches(draw, model: ModelCase) -> RowsCase:
    """A teacher-forced batch: groups of different widths, their rows interleaved (chapter 2)."""
    widths = draw(WIDTHS)
    timesteps = draw(st.integers(1, 9))
    patterns = draw(st.lists(st.sampled_from(PATTERNS), min_size=sum(widths), max_size=sum(widths)))
    return rows_of(model, widths, timesteps, patterns, draw(st.booleans()), draw(SEEDS))


@st.composite
def rows_cases(
    draw,
    kinds: tuple[str, ...] = ("attention", "mlp"),
    magnitudes: tuple[str, ...] = tuple(MAGNITUDES),
) -> RowsCase:
    """A model and a teacher-forced batch."""
    return draw(row_batches(draw(models(kinds, magnitudes))))


@st.composite
def block_cases(draw, kinds: tuple[str, ...] = ("attention", "mlp")) -> BlockCase:
    """One block of a model, and a residual stream to run it on."""
    rows = draw(rows_cases(kinds))
    layer = draw(st.sampled_from(rows.model.config.bridge.layers))
    return BlockCase(rows, layer, draw(SEEDS))


@st.composite
def decode_cases(draw) -> DecodeCase:
    """Prompts of different lengths and widths, forced tokens, and rows that end when they like."""
    model = draw(models())
    widths = draw(WIDTHS)
    lengths = draw(st.lists(st.integers(1, 6), min_size=len(widths), max_size=len(widths)))
    return DecodeCase(model, tuple(widths), tuple(lengths), draw(st.integers(1, 5)), draw(SEEDS))


@st.composite
def long_cases(draw) -> DecodeCase:
    """Windows over prompts of different lengths, or hundreds of timesteps: either way the longest
    prompt leaves before the last one does, and rows before that."""
    model = draw(models(magnitudes=("plain",)))
    raw = model.raw | {"max_position_embeddings": 1024}
    long = draw(st.booleans())
    if not long and raw["model_type"] in ("qwen2", "qwen3", "mistral"):
        raw["sliding_window"] = draw(st.integers(2, 6))
    longest = draw(st.integers(40, 300) if long else st.integers(6, 12))
    others = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    widths = draw(st.lists(st.integers(1, 3), min_size=len(others) + 1, max_size=len(others) + 1))
    widths[draw(st.integers(0, len(others)))] += draw(st.sampled_from([0, 4]))
    steps = draw(st.integers(260, 340) if long else st.integers(8, 20))
    case = DecodeCase(
        replace(model, raw=raw), tuple(widths), (longest, *others), steps, draw(SEEDS)
    )
    while not leaves_in_turn(case):
        case = replace(case, seed=case.seed + 1)
    return case


def leaves_in_turn(case: DecodeCase) -> bool:
    """Whether all rows of the longest prompt, the first, are gone before the last rows are, and
    some of another prompt leave before and after that."""
    ends = case.alive.sum(axis=0)
    first = case.row_prompt == 0
    gone, others = ends[first].max(), np.unique(ends[~first])
    return gone < case.steps and (len(others) == 1 or others[0] < gone)


@st.composite
def coming_cases(draw) -> ComingCase:
    """Groups that come in up to four waves: soon, later, or when all before have left."""
    model = draw(models(magnitudes=("plain",)))
    each = draw(st.lists(st.integers(1, 2), min_size=2, max_size=4))
    groups, steps = sum(each), draw(st.integers(SHORTEST, 9))
    widths = draw(st.lists(st.integers(1, 4), min_size=groups, max_size=groups))
    lengths = draw(st.lists(st.integers(1, 9), min_size=groups, max_size=groups))
    waves = tuple(Wave(draw(st.sampled_from([1, 2, 3, 4, 99])), prompts) for prompts in each)
    text = DecodeCase(model, tuple(widths), tuple(lengths), steps, draw(SEEDS), False)
    return ComingCase(text, waves)


@st.composite
def ends_cases(draw) -> EndsCase:
    """Samplings at their ends, on a vocabulary of a size of its own."""
    return EndsCase(draw(st.integers(SMALLEST, 24)), draw(SEEDS))


@st.composite
def births(draw) -> LifeCase:
    """A model and a batch to learn from, with nothing done yet."""
    case = draw(train_cases())
    return LifeCase(case.rows, case.trainable, (), case.seed)


@st.composite
def train_cases(draw) -> TrainCase:
    """A batch with targets, an objective, and what is trained: the blocks alone, or everything."""
    # Saturated probabilities have gradients that are all rounding.
    magnitudes = ("plain", "tiny outputs")
    rows = draw(rows_cases(magnitudes=magnitudes).filter(lambda rows: rows.active.any()))
    config = rows.model.config
    bridge = [n for i in range(config.num_hidden_layers) for n in bridge_shapes(config, i)]
    trainable = draw(st.sampled_from([tuple(bridge), tuple(tensor_shapes(config))]))
    objective = draw(st.sampled_from([SFT(), GRPO(0.2, 0.28), GRPO(0.2, 0.28, 0.1, 0.7)]))
    return TrainCase(rows, objective, trainable, draw(SEEDS))


@st.composite
def trainable_cases(draw) -> TrainCase:
    """A batch to learn from by some of the tensors: one, the norms alone, or any."""
    case = draw(train_cases())
    names = list(tensor_shapes(case.rows.model.config))
    norms = {name for name in names if name.endswith("norm.weight")}
    one = st.sampled_from(names)
    some = draw(
        st.one_of(st.sets(one, min_size=1, max_size=1), st.just(norms), st.sets(one, min_size=1))
    )
    return replace(case, trainable=tuple(name for name in names if name in some))


@st.composite
def shared_cases(draw) -> TrainCase:
    """A batch to learn from whose groups begin alike: for all, some or none of its timesteps, with
    padding or gaps among them, and offsets of positions (clause 7.14)."""
    case = draw(train_cases())
    groups, timesteps = len(np.unique(case.rows.groups)), case.rows.tokens.shape[1]
    leads, patterns = (
        draw(st.lists(one, min_size=groups, max_size=groups))
        for one in (st.integers(0, timesteps), st.sampled_from(("full", "left", "gaps")))
    )
    shift = draw(st.sampled_from(("none", "group", "row")))
    rows = share(case.rows, leads, patterns, shift, draw(SEEDS))
    return replace(case, rows=rows if rows.active.any() else case.rows)


@st.composite
def lora_cases(draw) -> TrainCase:
    """A model with low-rank updates of some of its host's matrices, and a batch from which they
    learn alone, beside the blocks, or with everything (clause 5.10)."""
    case = draw(train_cases())
    some = draw(st.sets(st.sampled_from(TARGETS), min_size=1))
    targets = tuple(target for target in TARGETS if target in some)
    lora = LoraConfig(draw(st.integers(1, 4)), draw(st.sampled_from([1.0, 3.0])), targets)
    rows = replace(case.rows, model=replace(case.rows.model, lora=lora))
    config = rows.model.config
    updates = lora_names(config)
    blocks = [name for i in range(config.num_hidden_layers) for name in bridge_shapes(config, i)]
    trainable = draw(st.sampled_from([updates, updates + blocks, list(tensor_shapes(config))]))
    return replace(case, rows=rows, trainable=tuple(trainable))


class Lives(Life):
    """Programs for models of any kind."""

    births = births()
