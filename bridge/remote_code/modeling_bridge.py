"""Bridge models for plain transformers 5: rows that see each other while they are generated.

A checkpoint directory carries this file, and `auto_map` in its config.json names a class of it:

    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    model.generate(**inputs, num_return_sequences=8, do_sample=True)  # 8 interdependent rows
    model(input_ids, attention_mask=mask, groups=groups, widths=widths, labels=labels)
    Trainer(model, train_dataset=groups, data_collator=model.collate_groups)

Which rows read each other: every row of the input is a prompt of its own, and the rows that
`num_return_sequences` makes of it are its group. `groups [B]` says otherwise: rows with equal
numbers are a group. So a batch of unrelated rows, without `groups`, stays unrelated.

Trainers shuffle rows and shard them, and a group that is parted would be read as if it had fewer
rows. So `groups` comes with `widths [B]`, how many rows the group of each row has, and a group that
is not all there is refused; `generate` alone, which sees all rows, needs no `widths`.
`collate_groups` makes such batches of examples that are whole groups, which a trainer may shuffle
as it likes. A Trainer takes a row for an example where it gathers what `predict` gives and what
`compute_metrics` gets, and cuts the last batch to as many rows as it has examples: there
`per_device_eval_batch_size` is 1, or divides the number of groups, on one device. Its loss is not
cut.

Which cells are read: those where `attention_mask` is 1. In `generate` a row that has ended, by EOS
or another stopping criterion, is read no more, its last token included; with `labels`, each row's
last token is likewise a target and no input. `active [B, S]`, if given, stands for all of this.

Clauses are those of spec bridge-1.0, after arXiv 2510.01143. One departure: a prompt is computed
once a row, as transformers does, where once a group would do (clause 4.2). Axes: B rows, S
timesteps, D model width, G groups, N rows of the widest group, H heads, d head width.
"""

# The classes that stand before a family's own call what pyright does not see there.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportIncompatibleMethodOverride=false, reportPrivateImportUsage=false
# pyright: reportOptionalMemberAccess=false

from functools import wraps
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, StoppingCriteriaList
from transformers.generation import GenerationMode
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3ForCausalLM


class Layout(NamedTuple):
    """Rows as a grid: a group a line, as wide as the widest."""

    rows: Tensor  # [G, N]: which row is there; an empty place repeats its group's first
    filled: Tensor  # [G, N] bool: whether a place is none of the empty ones
    cells: Tensor  # [B]: where a row is in the flat grid

    @classmethod
    def of(cls, groups: Tensor, B: int) -> "Layout":
        """The layout of `groups [B]`, whose rows may lie in any order (clause 2.2)."""
        if groups.shape != (B,):
            raise ValueError(f"groups is {list(groups.shape)}, not one number a row: [{B}]")
        _, group, widths = groups.unique(return_inverse=True, return_counts=True)
        order, first = group.argsort(stable=True), (widths.cumsum(0) - widths)[:, None]
        number = torch.arange(int(widths.max()), device=groups.device)
        filled = number < widths[:, None]
        rows = order[torch.where(filled, first + number, first)]
        return cls(rows, filled, filled.flatten().nonzero()[:, 0][order.argsort()])


def layout_of(groups: Any, widths: Any, B: int, device: Any, whole: bool = False) -> Layout:
    """The layout of `groups [B]`; None: each row is one. Raises ValueError where one is not as wide
    as `widths [B]` says, or nothing says it and they are not known to be `whole`."""
    if isinstance(groups, Layout):
        return groups
    if groups is None:
        groups = torch.arange(B)
    elif widths is None and not whole:
        raise ValueError(
            "groups: a shuffle or a shard may have parted them; give also widths [B], how many "
            "rows the group of each row has, as collate_groups does"
        )
    layout = Layout.of(groups.to(device), B)
    if widths is not None:
        if widths.shape != (B,):
            raise ValueError(f"widths is {list(widths.shape)}, not one number a row: [{B}]")
        found = layout.filled.sum(1)[layout.cells // layout.filled.shape[1]]
        if len(wrong := (found != widths.to(device)).nonzero()):
            row = int(wrong[0])
            raise ValueError(
                f"groups: of a group of {int(widths[row])} rows {int(found[row])} came; a shuffle "
                "or a shard parted it, so make each example a whole group, with collate_groups"
            )
    return layout


def tell_layers(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    """Before the layers run: which rows are a group, and which cells are fed. Some trainers call
    them without the head, and so without what `BridgeForCausalLM.forward` works out."""
    fed = kwargs.get("inputs_embeds")
    fed = fed if fed is not None else args[0] if args else kwargs["input_ids"]
    groups, active = kwargs.pop("groups", None), kwargs.pop("active", None)
    if active is None:
        if groups is not None:
            raise ValueError("groups, without the head: say with active [B, S] what is fed")
        active = torch.ones(fed.shape[:2])  # rows alone: what is masked is not read anyway
    widths, B = kwargs.pop("widths", None), len(fed)
    kwargs["layout"] = layout_of(groups, widths, B, fed.device)
    kwargs["active"] = active.to(fed.device, torch.bool)
    return args, kwargs


class BridgeBlock(nn.Module):
    """Attention whose sequence is the rows of a group, at each timestep by itself (chapter 3); with
    kind `mlp`, P-Match, which reads no other row (clause 8.1)."""

    def __init__(self, hidden_size: int, bridge: dict[str, Any]) -> None:
        super().__init__()
        self.kind, self.head_dim = bridge["kind"], bridge["head_dim"]
        D, E = hidden_size, bridge["num_heads"] * bridge["head_dim"]
        self.norm = nn.RMSNorm(D, eps=bridge["norm_eps"])
        if self.kind == "attention":
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(D, E, bias=False) for _ in "qkv")
            self.o_proj = nn.Linear(E, D, bias=False)
        else:
            self.up_proj = nn.Linear(D, 2 * E, bias=False)
            self.down_proj = nn.Linear(2 * E, D, bias=False)

    def forward(self, hidden: Tensor, layout: Layout, active: Tensor) -> Tensor:
        """`hidden [B, S, D]` plus what its active cells read (clause 3.6). Cells not in
        `active [B, S]` pass through and influence nothing, even if they hold NaN."""
        inactive = ~active[..., None]
        x = self.norm(hidden.masked_fill(inactive, 0))
        if self.kind == "attention":
            y = self.o_proj(self.read(x, layout, active))
        else:
            y = self.down_proj(F.silu(self.up_proj(x)))
        return hidden + y.masked_fill(inactive, 0)

    def read(self, x: Tensor, layout: Layout, active: Tensor) -> Tensor:
        """Clauses 3.3 to 3.5: `[B, S, D]` to `[B, S, H d]`."""
        (G, N), S, d = layout.rows.shape, x.shape[1], self.head_dim
        v = self.v_proj(x)
        if N == 1:  # a softmax over one row is 1
            return v
        # Groups lie apart, so that what another one holds is not even multiplied by 0.
        q, k, v = (
            z[layout.rows].view(G, N, S, -1, d).permute(0, 2, 3, 1, 4)  # [G, S, H, N, d]
            for z in (self.q_proj(x), self.k_proj(x), v)
        )
        score = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * d**-0.5
        there = (active[layout.rows] & layout.filled[..., None]).transpose(1, 2)  # [G, S, N]
        # A row may always read itself: no softmax is empty, and who is inactive is not heard.
        allowed = there[:, :, None, None] | torch.eye(N, dtype=torch.bool, device=x.device)
        p = score.masked_fill(~allowed, -torch.inf).softmax(-1)
        mixed = (p.to(v.dtype) @ v).permute(0, 3, 1, 2, 4)  # [G, N, S, H, d]
        return mixed.reshape(G * N, S, -1)[layout.cells]


def active_cells(B: int, S: int, attention_mask: Any, training: bool = False) -> Tensor:
    """`[B, S]`: the last S timesteps of a mask; None has ones. Where one is `training`, a row's
    last token is none that is fed (clause 7.2)."""
    if attention_mask is None:
        active = torch.ones(B, S, dtype=torch.bool)
    elif isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        active = attention_mask[:, -S:].bool()
    else:
        raise ValueError("attention_mask is not [B, T]; say with active [B, S] what is fed")
    return active & (active.flip(1).cumsum(1).flip(1) > 1) if training else active


class Responses(StoppingCriteriaList):
    """What ends the rows of a `generate`; also knows which of the tokens it made are active."""

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        super().__init__(criteria)
        self.alive: list[Tensor] = []  # for each token [B] bool: whether its row goes on after it

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        ended = super().__call__(input_ids, scores, **kwargs)
        self.alive.append(~ended & self.alive[-1] if self.alive else ~ended)
        return ended

    def active(self, B: int, S: int, attention_mask: Tensor | None) -> Tensor:
        """`[B, S]` of the cells fed next, where the mask has ones for all that was generated."""
        active = active_cells(B, S, attention_mask)
        if not (made := self.alive[-S:]):
            return active
        alive = F.pad(torch.stack(made, dim=1), (S - len(made), 0), value=True)
        return active.to(alive.device) & alive


class WithBlock:
    """Stands before a family's decoder layer: its block comes after the FFN (clause 3.7)."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        has_block = layer_idx in config.bridge["layers"]
        self.bridge = BridgeBlock(config.hidden_size, config.bridge) if has_block else None

    def forward(self, hidden: Tensor, *args: Any, layout: Layout, active: Tensor, **kwargs: Any):
        hidden = super().forward(hidden, *args, **kwargs)
        return hidden if self.bridge is None else self.bridge(hidden, layout, active)


class BridgeForCausalLM:
    """Stands before a family's model: its layers are `BridgeLayer`s, and are told who is there."""

    BridgeLayer: type[nn.Module]
    _auto_class = "AutoModelForCausalLM"  # so that `save_pretrained` writes this file too

    def __init__(self, config: Any) -> None:
        bridge = getattr(config, "bridge", None) or {}
        if bridge.get("spec_version") != "1.0" or bridge["kind"] not in ("attention", "mlp"):
            raise ValueError(f"config.json: bridge must be as spec 1.0 has it, not {bridge!r}")
        super().__init__(config)
        for i in range(config.num_hidden_layers):
            self.model.layers[i] = self.BridgeLayer(config, i)
        self.model.register_forward_pre_hook(tell_layers, with_kwargs=True)
        self._no_split_modules = {*(self._no_split_modules or ()), "BridgeLayer"}
        self.post_init()
        for name, weight in self.named_parameters():  # fresh blocks change nothing (clause 8.2)
            if name.endswith(("bridge.o_proj.weight", "bridge.down_proj.weight")):
                nn.init.zeros_(weight)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        groups: Tensor | Layout | None = None,
        widths: Tensor | None = None,
        active: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The family's own; `groups`, `widths` and `active` are as the head of this file says."""
        fed = input_ids if inputs_embeds is None else inputs_embeds
        B, S = fed.shape[:2]
        kwargs["groups"] = layout_of(groups, widths, B, fed.device)
        if active is None:
            active = active_cells(B, S, attention_mask, labels is not None)
        kwargs |= {"position_ids": position_ids, "inputs_embeds": inputs_embeds, "labels": labels}
        kwargs |= {"active": active, "logits_to_keep": logits_to_keep}
        return super().forward(input_ids, attention_mask, **kwargs)

    @staticmethod
    def collate_groups(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch of whole groups, each an example: `input_ids` and `labels`, if given also
        `attention_mask`, are lists with the list of each row. Rows are padded on the right."""
        rows = {
            name: [torch.tensor(row) for example in examples for row in example[name]]
            for name in ("input_ids", "attention_mask", "labels")
            if name in examples[0]
        }
        rows.setdefault("attention_mask", [torch.ones_like(row) for row in rows["input_ids"]])
        widths = torch.tensor([len(example["input_ids"]) for example in examples])
        padding = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        batch = {
            name: nn.utils.rnn.pad_sequence(said, batch_first=True, padding_value=padding[name])
            for name, said in rows.items()
        }
        numbers = torch.arange(len(examples))
        batch |= {"groups": numbers.repeat_interleave(widths)}
        return batch | {"widths": widths.repeat_interleave(widths)}

    @wraps(GenerationMixin.generate)
    def generate(self, inputs=None, generation_config=None, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, sampled or greedy. Refuses what would mix rows or tear them apart."""
        settings, _ = self._prepare_generation_config(generation_config, **kwargs)
        mode = settings.get_generation_mode(kwargs.get("assistant_model"))
        if mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
            raise ValueError(f"{mode.value} would mix rows that read each other; sample instead")
        if settings.cache_implementation == "paged":
            self.generate_batch()
        for name in ("custom_generate", "active"):
            if kwargs.get(name) is not None:
                raise ValueError(f"generate: leave {name} out; a Bridge model has its own")
        return super().generate(inputs, generation_config, *args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """What every kind of continuous batching begins with."""
        raise ValueError("continuous batching would part rows that read each other; use generate")

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        self.init_continuous_batching()

    def _sample(self, input_ids, *, stopping_criteria, generation_config, groups=None, **kwargs):
        """The loop of `generate`, which sees rows end. `groups`, if given, is as long as they."""
        if groups is None:
            groups = torch.arange(len(input_ids)) // generation_config.num_return_sequences
        responses = Responses(stopping_criteria)
        widths = kwargs.pop("widths", None)
        layout = layout_of(groups, widths, len(input_ids), input_ids.device, whole=True)
        kwargs |= {"groups": layout, "responses": responses}
        kwargs |= {"stopping_criteria": responses, "generation_config": generation_config}
        return super()._sample(input_ids, **kwargs)

    @wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, input_ids, *args, responses: Responses, **kwargs):
        """What `forward` gets at each step of `_sample`."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        fed = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
        inputs["active"] = responses.active(*fed.shape[:2], kwargs.get("attention_mask"))
        return inputs


class BridgeLlamaForCausalLM(BridgeForCausalLM, LlamaForCausalLM):
    class BridgeLayer(WithBlock, LlamaDecoderLayer): ...


class BridgeQwen2ForCausalLM(BridgeForCausalLM, Qwen2ForCausalLM):
    class BridgeLayer(WithBlock, Qwen2DecoderLayer): ...


class BridgeQwen3ForCausalLM(BridgeForCausalLM, Qwen3ForCausalLM):
    class BridgeLayer(WithBlock, Qwen3DecoderLayer): ...


class BridgeMistralForCausalLM(BridgeForCausalLM, MistralForCausalLM):
    class BridgeLayer(WithBlock, MistralDecoderLayer): ...
