"""Tests of the tests: faults planted in a backend, one at a time, each of which must be caught."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from bridge_conformance.checks import CHECKS
from bridge_conformance.trial import Nonconformance, Target
from bridge_torch import backend, block, decode, model, sampling, train
from bridge_torch.backend import TorchBackend

# By name: what to patch, with what, given the original; and a check that must then fail.
FAULTS = {}


def fault(owner, name, check):
    def register(make):
        FAULTS[make.__name__] = (owner, name, make, check)
        return make

    return register


BLOCK = "block_is_within_the_numerics_rule"
LOGITS = "logits_are_within_the_numerics_rule"
CACHED = "cached_decoding_equals_teacher_forcing"
SAMPLED = "sampled_tokens_follow_the_rule"
GRADIENTS = "loss_and_gradients_are_within_the_numerics_rule"
STEPS = "training_steps_are_within_the_numerics_rule"


@fault(block.Grid, "of", BLOCK)
def groups_are_ignored(original):
    return staticmethod(lambda groups, device: original(np.zeros_like(groups), device))


@fault(block.Block, "_allowed", BLOCK)
def finished_rows_are_read(original):
    return lambda self, grid, active, S: original(self, grid, None, S)


@fault(block.Block, "_allowed", BLOCK)
def a_row_does_not_read_itself(original):
    def wrong(self, grid, active, S):
        allowed = original(self, grid, torch.ones(len(grid_rows(grid)), S, dtype=torch.bool), S)
        return allowed & ~torch.eye(grid.width, dtype=torch.bool) | (allowed.sum(-1) < 2)[..., None]

    def grid_rows(grid):
        return range(grid.groups * grid.width if grid.to_rows is None else len(grid.to_rows))

    return wrong


@fault(block.Block, "__call__", BLOCK)
def the_norm_is_left_out(original):
    def wrong(self, hidden, grid, active=None):
        return original(replace(self, norm=torch.ones_like(self.norm)), hidden, grid, active)

    return wrong


@fault(block.Block, "__call__", "blocked_rows_have_no_influence_on_the_block")
def inactive_rows_get_output(original):
    return lambda self, hidden, grid, active=None: original(self, hidden, grid, None)


@fault(block, "rms_norm", BLOCK)
def eps_is_left_out(original):
    return lambda x, weight, eps: original(x, weight, 0.0)


@fault(model, "rotate", LOGITS)
def rope_turns_the_other_way(original):
    return lambda x, rope: original(x, torch.stack([rope[0], -rope[1]]))


@fault(model.Transformer, "cells", LOGITS)
def windows_are_one_too_wide(original):
    def wrong(self, groups, active, positions):
        for layer in self.layers:
            layer.window = layer.window and layer.window + 1
        cells = original(self, groups, active, positions)
        for layer in self.layers:
            layer.window = layer.window and layer.window - 1
        return replace(cells, masks={w and w - 1: mask for w, mask in cells.masks.items()})

    return wrong


@fault(model, "feed_forward", LOGITS)
def gate_and_up_are_swapped(original):
    def wrong(layer, h, x):
        gate, up = layer.gate_up(x).chunk(2, -1)
        return layer.down.add_to(h, torch.nn.functional.silu(up) * gate)

    return wrong


@fault(decode.Decoder, "_compact", CACHED)
def caches_stay_where_they_were(original):
    def wrong(self, rows):
        own = self.own.clone()
        original(self, rows)
        self.own = own

    return wrong


@fault(decode.Decoder, "_forward", CACHED)
def positions_start_one_late(original):
    def wrong(self, tokens):
        self.lengths = self.lengths + 1
        try:
            return original(self, tokens)
        finally:
            self.lengths = self.lengths - 1

    return wrong


@fault(sampling, "weights", SAMPLED)
def filters_come_in_another_order(original):
    def wrong(z, options):
        first = original(z, replace(options, temperature=1.0, top_k=None))
        second = original(z, replace(options, top_p=None, min_p=None))
        return torch.where(first > 0, second, 0)

    return wrong


@fault(sampling.Uniforms, "keep", SAMPLED)
def rows_change_their_numbers(original):
    def wrong(self, rows):
        original(self, rows)
        self.rows = np.arange(len(rows))

    return wrong


@fault(train, "loss", GRADIENTS)
def losses_are_averaged_by_row(original):
    def wrong(logits, batch, objective):
        value, metrics = original(logits, batch, objective)
        return value * metrics["tokens"] / len(batch.tokens), metrics

    return wrong


@fault(train, "loss", GRADIENTS)
def both_sides_clip_alike(original):
    def wrong(logits, batch, objective):
        if isinstance(objective, train.SFT):
            return original(logits, batch, objective)
        return original(logits, batch, replace(objective, eps_high=9.0))

    return wrong


@fault(block.Block, "_mix", GRADIENTS)
def gradients_are_cut_across_rows(original):
    def wrong(self, qkv, H, grid, active):
        E = qkv.shape[-1] // 3
        return original(self, torch.cat([qkv[..., :E], qkv[..., E:].detach()], -1), H, grid, active)

    return wrong


@fault(torch.nn.utils, "clip_grad_norm_", STEPS)
def nothing_is_clipped(original):
    return lambda parameters, limit: original(parameters, float("inf"))


@fault(torch.optim, "AdamW", STEPS)
def decay_is_coupled(original):
    return torch.optim.Adam


@fault(backend, "to_numpy", "tensors_come_back_byte_for_byte")
def tensors_are_rounded_on_the_way(original):
    return lambda tensor: original(tensor.to(torch.bfloat16).to(tensor.dtype))


def run(check, examples):
    target = Target(TorchBackend(), "cpu", "float32", check.clause)

    # Without shrinking: that it fails is enough.
    phases = (Phase.explicit, Phase.generate)

    @settings(max_examples=examples, phases=phases, derandomize=True, database=None)
    @given(st.data())
    def examine(data):
        check.run(target, data.draw(check.cases))

    examine()


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name, monkeypatch):
    owner, attribute, make, check = FAULTS[name]
    monkeypatch.setattr(owner, attribute, make(getattr(owner, attribute)))
    for module in (model, decode):  # which import some of these by name
        if hasattr(module, attribute) and owner is not module and not isinstance(owner, type):
            monkeypatch.setattr(module, attribute, getattr(owner, attribute))
    if name == "filters_come_in_another_order":
        monkeypatch.setattr(decode, "sample", sampling.sample)
    with pytest.raises(Nonconformance, match=r"^clause "):
        run(CHECKS[check], 60)
