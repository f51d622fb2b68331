"""Bridge models for mlx-lm: rows that see each other while they are generated.

A checkpoint directory carries this file, and `model_file` in its config.json names it:

    model, tokenizer = mlx_lm.load(path, trust_remote_code=True)
    group = model.make_group(8)                                       # 8 interdependent rows
    mlx_lm.batch_generate(model, tokenizer, [prompt] * 8, prompt_caches=group, sampler=...)
    model(tokens, cache)                                # [B, S] to [B, S, V]: rows that stand alone
    model(tokens, cache, groups=[0, 0, 1, 1], active=active)

Which rows read each other: none, unless it is said, since mlx-lm makes batches of what is
unrelated: the requests of its server, the examples that `lora` learns from. `make_group(N)` gives
the prompt caches of N rows of one prompt, which remain a group while rows join their batch, end or
are removed. `groups`, a number a row, says so for one call, as a loss of one's own needs it.

The rows of a group are fed in step, and have one prompt, or are refused. mlx-lm, of which this
needs 0.31.2, starts 8 rows at a time and has 32 under way; as rows end it starts others, one at a
time if need be, and so may part a group in the middle of a run, whose answers are then lost. So for
more than 8 rows give both `prefill_batch_size` and `completion_batch_size` the number of all rows,
or run groups after one another where memory does not hold them all.

Which cells are read: all, or those where `active [B, S]` is true; without a cache, host attention
leaves the others out too. While decoding, a row that says an EOS of the config is read no more,
although mlx-lm feeds that token once before it drops the row.

Departures from spec bridge-1.0, whose clauses are cited: a prompt is computed once a row, not once
a group (4.2), and the last token of a row that ends by stop words, or by a length limit before
others do, is read once. What mlx-lm itself does not compute is refused: yarn with
`attention_factor`, `truncate` or one `mscale` alone; biases of qwen3; another head_dim in qwen2.
Sliding windows are masks here. Where mlx-lm runs the plain host, without this file, it knows none
in mistral, qwen2 and qwen3, and takes a config that is silent on `tie_word_embeddings` for tied.

Axes: B rows, S timesteps, D model width, G groups, N rows of the widest group, H heads, d head
width.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama, qwen2, qwen3
from mlx_lm.models.base import BaseModelArgs, create_attention_mask, create_causal_mask
from mlx_lm.models.cache import KVCache

HOSTS: dict[str, Any] = {"llama": llama, "mistral": llama, "qwen2": qwen2, "qwen3": qwen3}
# What transformers takes where a config is silent, which mlx-lm takes otherwise or not at all.
SILENT: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
}
BLOCKS = "bridge.safetensors"  # beside this file
MIXED = (
    "rows of make_group are in batches of their own, of batch_generate or a BatchGenerator; a row "
    "that stands alone is one of make_group(1) there"
)


@dataclass
class ModelArgs(BaseModelArgs):
    """A config, read as transformers reads it."""

    model_type: str
    bridge: dict[str, Any]
    host: Any  # the arguments of mlx-lm's own model of the family
    windows: tuple[int | None, ...]  # of each layer; None sees all that came before
    ends: tuple[int, ...]  # EOS

    @classmethod
    def from_dict(cls, params: dict[str, Any]) -> "ModelArgs":
        """Raises ValueError for what mlx-lm cannot compute."""
        family = params["model_type"]
        if family not in HOSTS or "bridge" not in params:
            raise ValueError(f"no Bridge model in config.json: model_type {family!r}, or no bridge")
        given = {k: v for k, v in params.items() if v is not None or k == "sliding_window"}
        given = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, **SILENT[family], **given}
        given |= rope_of(given)
        even = given["hidden_size"] // given["num_attention_heads"]
        if family == "qwen2" and given.get("head_dim", even) != even:
            raise ValueError(f"qwen2 in mlx-lm has a head_dim of {even} alone")
        if family == "qwen3" and given.get("attention_bias"):
            raise ValueError("qwen3 in mlx-lm has no attention_bias")
        ends = given.get("eos_token_id", ())
        windows = windows_of(given, family)
        given["layer_types"] = None  # windows are ours: mlx-lm has them in llama alone
        return cls(
            family,
            given["bridge"],
            HOSTS[family].ModelArgs.from_dict(given),
            windows,
            tuple(ends) if isinstance(ends, list | tuple) else (ends,),
        )


def rope_of(given: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, from either spelling (clause 5.7), as mlx-lm takes them."""
    said = dict(given.get("rope_parameters") or given.get("rope_scaling") or {})
    theta = said.pop("rope_theta", None) or given.get("rope_theta") or 10000.0
    kind = said.pop("rope_type", None) or said.pop("type", None) or "default"
    said = {k: v for k, v in said.items() if v is not None}
    said.pop("type", None)
    if kind == "yarn":
        said = {k: v for k, v in said.items() if v or not k.startswith("mscale")}  # 0: not said
        alone = ("mscale" in said) != ("mscale_all_dim" in said)
        if alone or "attention_factor" in said or not said.get("truncate", True):
            raise ValueError(
                "yarn in mlx-lm has no attention_factor, truncate, or one mscale alone"
            )
    if kind in ("yarn", "llama3"):
        length = "original_max_position_embeddings"
        said.setdefault(length, given.get(length) or given["max_position_embeddings"])
    scaling = None if kind == "default" else {"rope_type": kind, **said}
    return {"rope_theta": theta, "rope_scaling": scaling, "rope_parameters": None}


def windows_of(given: dict[str, Any], family: str) -> tuple[int | None, ...]:
    """The sliding window of each layer (clause 5.5)."""
    layers, window, first = given["num_hidden_layers"], given.get("sliding_window"), 0
    if family in ("qwen2", "qwen3"):
        window = (window or 4096) if given.get("use_sliding_window") else None
        first = given.get("max_window_layers", 28)
        if kinds := given.get("layer_types"):
            return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    elif family == "llama":
        window = None
    return tuple(window if i >= first else None for i in range(layers))


class Rows:
    """Rows as a grid `[G, N]`: a group a line, as wide as the widest (clause 2.2)."""

    def __init__(self, groups: Sequence[int]) -> None:
        """`groups [B]`: equal numbers are a group; its rows may lie anywhere."""
        members: dict[int, list[int]] = {}
        for row, group in enumerate(groups):
            members.setdefault(group, []).append(row)
        G, N = len(members), max(map(len, members.values()))
        where = {row: i * N + j for i, m in enumerate(members.values()) for j, row in enumerate(m)}
        lines = [m + m[:1] * (N - len(m)) for m in members.values()]
        self.count, self.shape = len(groups), (G, N)
        self.grid = mx.array(lines)  # which row is there; an empty place repeats its group's first
        self.filled = mx.array([[j < len(m) for j in range(N)] for m in members.values()])
        self.cells = mx.array(
            [where[row] for row in range(len(groups))]
        )  # of each row, in the grid


class Group:
    """Rows of one prompt that read each other, and how many timesteps they have been fed."""

    def __init__(self, width: int, fed: int) -> None:
        self.width, self.fed = width, fed

    def __deepcopy__(self, memo: Any) -> "Group":  # mlx-lm copies a batch to split it in two
        return self


class Declared:
    """A first layer's cache that knows groups. It has nothing of mlx-lm's own caches, so that none
    of them takes its rows in as rows that stand alone."""

    kept: Any  # mlx-lm's own

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{name}: {MIXED}")

    @property
    def nbytes(self) -> int:
        return self.kept.nbytes


class Row(Declared):
    """Of a row of a group, until mlx-lm makes a batch of it."""

    def __init__(self, group: Group, kept: KVCache) -> None:
        self.group, self.kept = group, kept

    @staticmethod
    def merge(caches: Sequence[Any]) -> "Batch":
        """A batch of whole groups. What it is made of stays as it is, and may be used again."""
        if not all(isinstance(cache, Row) for cache in caches):
            raise ValueError(MIXED)
        groups = [cache.group for cache in caches]
        for group in groups:
            if (found := groups.count(group)) != group.width:
                raise ValueError(
                    f"of a group of {group.width} rows mlx-lm starts {found} together, and the "
                    "others out of step; give prefill_batch_size and completion_batch_size, "
                    "both the number of all rows"
                )
        begun = {group: Group(group.width, group.fed) for group in groups}
        kept = KVCache.merge([cache.kept for cache in caches])
        return Batch(kept, [(begun[group], group.fed) for group in groups])


class Batch(Declared):
    """Of a batch, with the group of each row, which stays with it as rows come and go."""

    def __init__(self, kept: Any, rows: list[tuple[Group, int]]) -> None:
        self.kept, self.rows = kept, rows  # of each row its group, and what it has been fed itself
        self.padding: Sequence[int] = ()
        self.reading = True  # whether what is fed may be of prompts
        self.differ = False  # whether rows of a group were fed different tokens of it
        self.split = False  # whether the next that is fed is the last of prompts

    def __deepcopy__(self, memo: Any) -> "Batch":
        """mlx-lm splits off so those rows of whose prompts only the last token is left: all that
        was fed before was of prompts."""
        self.refuse_different_prompts()
        copied = Batch(deepcopy(self.kept, memo), self.rows)
        copied.split = True
        return copied

    def refuse_different_prompts(self) -> None:
        if self.differ:
            raise ValueError(
                "rows of a group have different prompts; each prompt needs a make_group of its own"
            )

    def step(self, S: int) -> Rows:
        """The rows that are fed S timesteps. Raises ValueError for a group that is not in step."""
        if any(fed != group.fed for group, fed in self.rows):
            raise ValueError("rows of a group are out of step, or their prompts differ in length")
        self.advance([S] * len(self.rows))
        return Rows([id(group) for group, _ in self.rows])

    def compare(self, tokens: mx.array, rows: Rows) -> None:
        """Note whether rows of a group are fed the same `tokens [B, S]`, as long as they may be of
        prompts. Raises ValueError where they are and differ."""
        if self.reading:
            said = tokens[rows.grid]
            self.differ |= not mx.array_equal(said, mx.broadcast_to(said[:, :1], said.shape))
        if self.split:
            self.refuse_different_prompts()
            self.reading = self.split = False

    def advance(self, steps: Sequence[int]) -> None:
        """Note what each row has been fed."""
        self.rows = [(g, fed + n) for (g, fed), n in zip(self.rows, steps, strict=True)]
        for group, fed in self.rows:
            group.fed = fed

    def prepare(self, *, lengths: Any = None, right_padding: Sequence[int]) -> None:
        """Before prompts of several lengths: cells at their ends are padding."""
        self.padding = right_padding
        self.kept.prepare(lengths=lengths, right_padding=right_padding)

    def finalize(self) -> None:
        """After them."""
        self.kept.finalize()
        self.advance([-n for n in self.padding])

    def filter(self, keep: Sequence[int]) -> None:
        """Keep some rows, in this order."""
        self.kept.filter(keep)
        self.rows = [self.rows[row] for row in keep]

    def extend(self, other: Any) -> None:
        """Let the rows of another batch join."""
        if not isinstance(other, Batch):
            raise ValueError(MIXED)
        self.kept.extend(other.kept)
        self.rows = self.rows + other.rows

    def extract(self, row: int) -> KVCache:
        """What a row has read, for one that stands alone."""
        return self.kept.extract(row)

    @property
    def state(self) -> Any:
        return self.kept.state


class Bridge(nn.Module):
    """Attention whose sequence is the rows of a group, at each timestep by itself (chapter 3); with
    kind `mlp`, P-Match, which reads no other row (clause 8.1)."""

    def __init__(self, D: int, bridge: dict[str, Any]) -> None:
        super().__init__()
        self.kind, self.num_heads = bridge["kind"], bridge["num_heads"]
        E = bridge["num_heads"] * bridge["head_dim"]
        self.norm = nn.RMSNorm(D, eps=bridge["norm_eps"])
        if self.kind == "attention":
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(D, E, bias=False) for _ in "qkv")
            self.o_proj = nn.Linear(E, D, bias=False)
        else:
            self.up_proj = nn.Linear(D, 2 * E, bias=False)
            self.down_proj = nn.Linear(2 * E, D, bias=False)

    def __call__(self, h: mx.array, rows: Rows, active: mx.array | None) -> mx.array:
        """`h [B, S, D]` plus what its active cells read (clause 3.6). Cells not in `active [B, S]`
        (None: all are) pass through and influence nothing, even if they hold NaN."""
        x = self.norm(h if active is None else mx.where(active[..., None], h, 0))
        if self.kind == "attention":
            y = self.o_proj(self.read(x, rows, active))
        else:
            y = self.down_proj(nn.silu(self.up_proj(x)))
        return h + (y if active is None else mx.where(active[..., None], y, 0))

    def read(self, x: mx.array, rows: Rows, active: mx.array | None) -> mx.array:
        """Clauses 3.3 to 3.5: `[B, S, D]` to `[B, S, H d]`."""
        (G, N), S, H = rows.shape, x.shape[1], self.num_heads
        if N == 1:  # a softmax over one row is 1
            return self.v_proj(x)
        q, k, v = (  # [G S, H, N, d]: groups lie apart, so that none is multiplied even by 0
            project(x)[rows.grid].reshape(G, N, S, H, -1).transpose(0, 2, 3, 1, 4).flatten(0, 1)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        there = mx.broadcast_to(rows.filled[..., None], (G, N, S))
        if active is not None:
            there = there & active[rows.grid]
        # A row may always read itself: no softmax is empty, and who is inactive is not heard.
        allowed = there.swapaxes(1, 2).reshape(G * S, 1, 1, N) | mx.eye(N, dtype=mx.bool_)
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=allowed)
        y = y.reshape(G, S, H, N, -1).transpose(0, 3, 1, 2, 4)
        return y.reshape(G * N, S, -1)[rows.cells]


class Model(nn.Module):
    """A host of mlx-lm with its blocks; see the top of this file."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args, self.model_type = args, args.model_type
        host = HOSTS[args.model_type].Model(args.host)
        self.model = host.model
        if not args.host.tie_word_embeddings:
            self.lm_head = host.lm_head
        for i in args.bridge["layers"]:
            self.layers[i].bridge = Bridge(args.host.hidden_size, args.bridge)

    def __call__(
        self,
        inputs: mx.array,
        cache: Any = None,
        input_embeddings: mx.array | None = None,
        *,
        groups: Sequence[int] | None = None,
        active: mx.array | None = None,
    ) -> mx.array:
        """Logits `[B, S, V]` of `inputs [B, S]`. Raises ValueError for groups of other rows."""
        h = self.model.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        B, S = h.shape[:2]
        declared = cache[0] if cache and isinstance(cache[0], Declared) else None
        if groups is not None and declared is not None:
            raise ValueError("groups: make_group has said already which rows read each other")
        rows = (
            Rows(range(B) if groups is None else groups) if declared is None else declared.step(S)
        )
        if rows.count != B:
            raise ValueError(f"groups of {rows.count} rows, but the batch has {B}")
        if declared is not None:
            declared.compare(inputs, rows)
            cache = [declared.kept, *cache[1:]]
        if cache is None:
            cache = [None] * len(self.layers)
        elif S == 1 and active is None:
            active = self.not_ended(inputs, rows)
        masks = {}
        for layer, kept, window in zip(self.layers, cache, self.args.windows, strict=True):
            if window not in masks:
                masks[window] = attention_mask(h, kept, window, active)
            h = layer(h, masks[window], kept)
            if "bridge" in layer:  # clause 3.7
                h = layer.bridge(h, rows, active)
        h = self.model.norm(h)
        return self.lm_head(h) if "lm_head" in self else self.model.embed_tokens.as_linear(h)

    def not_ended(self, inputs: mx.array, rows: Rows) -> mx.array | None:
        """The cells `[B, 1]` that are no EOS (clause 2.3). Where a whole group says it, it is what
        their prompt ends with, or nobody reads on."""
        if not self.args.ends or rows.shape[1] == 1:
            return None
        ended = (inputs[..., None] == mx.array(self.args.ends)).any(-1)
        all_of_group = mx.broadcast_to(ended[rows.grid].all(1, keepdims=True), (*rows.shape, 1))
        return ~ended | all_of_group.flatten(0, 1)[rows.cells]

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The host's tensors, and with them those of the blocks, from the file beside this one."""
        if not any(".bridge." in name for name in weights):
            blocks: Any = mx.load(str(Path(__file__).parent / BLOCKS))
            weights = {**weights, **blocks}
        if self.args.host.tie_word_embeddings:
            weights.pop("lm_head.weight", None)
        return {k: v for k, v in weights.items() if "rotary_emb.inv_freq" not in k}

    @property
    def layers(self) -> list[Any]:
        """The host's layers; those with a block have it as `bridge`."""
        return self.model.layers

    def make_cache(self) -> list[KVCache]:
        """A cache a layer, of a row that stands alone; windows are in the masks."""
        return [KVCache() for _ in self.layers]

    def make_group(self, width: int, cache: Sequence[Any] | None = None) -> list[list[Any]]:
        """Caches for the `width` rows of a prompt, which read each other: `prompt_caches` of
        batch_generate, or `caches` of a BatchGenerator. `cache`: of one row, what they all have
        read before (clause 4.2)."""
        if width < 1:
            raise ValueError(f"a group of {width} rows; it has at least one")
        first, *others = deepcopy(cache) if cache else self.make_cache()
        row = Row(Group(width, first.size()), first)
        return [[row, *others] for _ in range(width)]  # mlx-lm copies what it makes a batch of


def attention_mask(
    h: mx.array, cache: Any, window: int | None, active: mx.array | None
) -> mx.array | str | None:
    """Clauses 5.4 and 5.5. With a cache, padding is what the cache knows of it."""
    if cache is not None or active is None:
        return create_attention_mask(h, cache, window_size=window)
    mask = create_causal_mask(h.shape[1], window_size=window) & active[:, None, None, :]
    return mask | mx.eye(h.shape[1], dtype=mx.bool_)  # no softmax is empty
