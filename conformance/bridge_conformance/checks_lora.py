"""Checks of low-rank updates (clauses 5.10 and 8.3): what other checks ask, of models that have
them, and what is asked of them alone.
"""

from dataclasses import replace

from bridge_conformance.cases import DecodeCase, TrainCase
from bridge_conformance.checks_checkpoint import tensors_come_back_byte_for_byte
from bridge_conformance.checks_decode import (
    cached_decoding_equals_teacher_forcing,
    next_log_probabilities_are_those_of_the_loss,
)
from bridge_conformance.checks_model import logits_are_within_the_numerics_rule
from bridge_conformance.checks_model import start as start_rows
from bridge_conformance.checks_train import (
    loss_and_gradients_are_within_the_numerics_rule,
    same_updates,
    start,
)
from bridge_conformance.trial import Target


def updates_are_added_to_the_hosts_maps(target: Target, case: TrainCase) -> None:
    """Clause 5.10: by alpha / r, in all modules that have one; tensors come back in their order."""
    logits_are_within_the_numerics_rule(target, case.rows)
    tensors_come_back_byte_for_byte(target, case.rows)


def fresh_updates_change_nothing(target: Target, case: TrainCase) -> None:
    """Clause 8.3: with `lora_B` zero, the model is the one without updates."""
    trial, _, allowed = start_rows(target, case.rows)
    fresh = {n: a * (".lora_B." not in n) for n, a in trial.tensors.items()}
    without = {name: array for name, array in fresh.items() if ".lora_" not in name}
    got = trial.load(tensors=fresh).logits(*case.rows.arguments)
    plain = trial.load(replace(case.rows.model.config, lora=None), without)
    want, where = plain.logits(*case.rows.arguments), case.rows.active
    trial.same(got[where], want[where], 2 * allowed, "logits against those without updates", case)


def updates_are_decoded_with(target: Target, case: TrainCase) -> None:
    """Clause 5.10: with matrices that have the updates in them, or beside them."""
    text = DecodeCase(case.rows.model, (2, 1), (3, 1), 3, case.seed % 2**32)
    cached_decoding_equals_teacher_forcing(target, text)
    next_log_probabilities_are_those_of_the_loss(target, text)


def updates_have_the_right_gradients(target: Target, case: TrainCase) -> None:
    """Clauses 5.10 and 7.3: alone, beside the blocks, and with all that there is."""
    loss_and_gradients_are_within_the_numerics_rule(target, case)


def updates_are_trained(target: Target, case: TrainCase) -> None:
    """Clauses 5.10 and 7.9: what is named learns, and the frozen matrices stay as they were."""
    trial, batch = start(target, case)
    same_updates(trial, case, batch, [batch])
