"""All checks, with the clause and level that each holds a backend to and the cases it runs on.

To run one on one case: `CHECKS[name].run(Target(backend, device, dtype, clause), case)`; it raises
`Nonconformance` where the backend breaks the clause.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis.stateful import RuleBasedStateMachine
from hypothesis.strategies import SearchStrategy

from bridge_conformance import (
    checks_ahead,
    checks_block,
    checks_checkpoint,
    checks_coming,
    checks_decode,
    checks_ends,
    checks_golden,
    checks_life,
    checks_long,
    checks_lora,
    checks_model,
    checks_shared,
    checks_train,
    checks_trainable,
    strategies,
    worst,
)
from bridge_conformance.checks_golden import GoldenCase, golden_vector_is_met
from bridge_conformance.checks_trainable import is_long, is_short
from bridge_conformance.trial import Target

# What a level is about (clause 10.3); each includes those before it.
LEVELS = {
    1: "the block",
    2: "the teacher-forced model",
    3: "cached decoding and generation",
    4: "gradients",
    5: "the training step",
    6: "checkpoint round trips",
}
_train = strategies.train_cases()
# The cases that checks share, by kind: a level's, or those of a kind that has checks of its own. A
# state machine draws what is done to a model. Golden vectors have one case each.
CASES: dict[int | str, SearchStrategy[Any] | type[RuleBasedStateMachine]] = {
    1: strategies.block_cases(),
    2: strategies.rows_cases(),
    3: strategies.decode_cases(),
    4: _train,
    5: _train,
    6: strategies.rows_cases(),
    "long": strategies.long_cases(),
    "coming": strategies.coming_cases(),
    "ends": strategies.ends_cases(),
    "life": strategies.Lives,
    "trainable": strategies.trainable_cases(),
    "shared": strategies.shared_cases(),
    "lora": strategies.lora_cases(),
}
# What comes before those drawn, in every profile: the worst that is known.
WORST: dict[int | str, tuple[Any, ...]] = {
    "long": worst.LONG,
    "coming": worst.COMING,
    "ends": worst.ENDS,
    "life": worst.LIFE,
    "trainable": worst.TRAINABLE,
    "shared": worst.SHARED,
    "lora": worst.LORA,
}


def _any(case: Any) -> bool:
    return True


@dataclass(frozen=True)
class Check:
    """A property: `run(target, case)` for the cases `CASES[cases]`."""

    run: Callable[[Target, Any], None]
    clause: str
    level: int
    cases: int | str
    applies: Callable[[Any], bool] = _any  # to which of them
    golden: str | None = None  # the name of the golden vector, which is then its one case

    @property
    def name(self) -> str:
        """The function's name, which says the property."""
        return f"golden-{self.golden}" if self.golden else self.run.__name__

    @property
    def property(self) -> str:
        """The property in one line: the first of the function's docstring."""
        first = (self.run.__doc__ or self.name).strip().partition("\n\n")[0]
        return " ".join(first.split())


def _check(
    run: Callable[[Target, Any], None],
    clause: str,
    level: int,
    applies: Callable[[Any], bool] = _any,
    *,
    cases: int | str | None = None,
) -> Check:
    return Check(run, clause, level, level if cases is None else cases, applies)


def _golden(name: str) -> Check:
    case = GoldenCase(name)
    clause = name.partition("-")[0]
    level = checks_golden.LEVELS[case.what]
    return Check(
        golden_vector_is_met, clause, level, level, lambda other: other == case, golden=name
    )


CHECKS: dict[str, Check] = {
    check.name: check
    for check in (
        _check(checks_block.block_is_within_the_numerics_rule, "3.6", 1),
        _check(checks_block.permuting_rows_permutes_the_block, "3.8", 1),
        _check(checks_block.blocked_rows_have_no_influence_on_the_block, "3.4", 1),
        _check(checks_block.repeating_rows_changes_nothing, "3.8", 1),
        _check(checks_block.width_one_adds_the_rows_own_value, "3.8", 1, checks_block.attends),
        _check(checks_block.identical_rows_give_the_width_one_result, "3.8", 1),
        _check(checks_block.timesteps_do_not_mix_in_the_block, "3.3", 1),
        _check(checks_model.logits_are_within_the_numerics_rule, "10.2", 2),
        _check(checks_model.norm_ratios_are_within_the_numerics_rule, "3.9", 2),
        _check(checks_model.fresh_blocks_are_the_identity, "3.8", 2),
        _check(checks_model.permuting_rows_permutes_the_logits, "3.8", 2),
        _check(checks_model.group_numbers_are_only_names, "2.2", 2),
        _check(checks_model.other_groups_have_no_influence, "3.8", 2),
        _check(checks_model.inactive_cells_have_no_influence, "2.3", 2),
        _check(checks_model.repeating_rows_changes_no_logits, "3.8", 2),
        _check(checks_model.no_future_timestep_influences_an_earlier_one, "3.8", 2),
        _check(checks_decode.cached_decoding_equals_teacher_forcing, "4.1", 3),
        _check(checks_decode.next_log_probabilities_are_those_of_the_loss, "6.10", 3),
        _check(checks_decode.a_prompt_is_prefilled_once_for_its_group, "4.2", 3),
        _check(checks_decode.what_is_out_of_bounds_is_refused, "4.4", 3),
        _check(checks_decode.ended_rows_leave_other_groups_unchanged, "4.3", 3),
        _check(checks_decode.what_was_sampled_is_what_is_fed, "10.1", 3),
        _check(checks_decode.sampled_tokens_follow_the_rule, "6.7", 3),
        _check(checks_decode.generated_rows_follow_the_rule, "6.7", 3),
        _check(checks_long.long_texts_are_decoded_as_they_are_read, "4.1", 3, cases="long"),
        _check(checks_long.long_texts_are_drawn_by_the_rule, "6.2", 3, cases="long"),
        *(
            _check(run, clause, 3, cases="coming")
            for run, clause in (
                (checks_coming.groups_that_come_are_answered_as_if_alone, "4.5"),
                (checks_coming.what_others_held_does_not_reach_a_group, "4.5"),
                (checks_coming.rows_draw_by_settings_of_their_own, "6.9"),
                (checks_coming.what_may_not_come_is_refused, "10.1"),
                (checks_coming.free_bytes_are_a_number_or_none, "10.1"),
                (checks_ahead.steps_ahead_are_those_of_one_at_a_time, "4.6"),
                (checks_ahead.going_back_leaves_nothing_behind, "4.7"),
                (checks_ahead.what_may_not_follow_a_table_is_refused, "4.7"),
            )
        ),
        _check(checks_ends.samplings_hold_at_their_ends, "6.7", 3, cases="ends"),
        _check(checks_train.loss_and_gradients_are_within_the_numerics_rule, "7.4", 4),
        _check(checks_train.log_probabilities_are_those_of_the_loss, "7.12", 4),
        _check(checks_train.gradients_stay_within_a_group, "7.3", 4),
        _check(checks_train.training_steps_are_within_the_numerics_rule, "7.8", 5),
        _check(checks_train.accumulated_batches_are_one_update, "7.10", 5),
        _check(checks_train.computing_layers_again_changes_no_update, "7.11", 5),
        _check(checks_train.a_restored_trainer_goes_on_as_if_never_stopped, "7.9", 5),
        _check(checks_train.a_model_computes_with_what_it_learnt, "7.9", 5),
        _check(checks_life.a_models_life_is_the_references, "7.9", 5, cases="life"),
        _check(
            checks_trainable.a_common_token_learns_from_all_its_cells,
            "7.9",
            4,
            is_long,
            cases="trainable",
        ),
        _check(checks_trainable.any_subset_is_updated_alone, "7.9", 5, is_short, cases="trainable"),
        _check(
            checks_trainable.many_batches_add_up_in_float32, "7.10", 5, is_short, cases="trainable"
        ),
        *(
            _check(run, clause, level, cases="shared")
            for run, clause, level in (
                (checks_shared.shared_timesteps_change_no_gradient, "7.14", 4),
                (checks_shared.shared_timesteps_change_no_forward_pass, "7.14", 4),
                (checks_shared.logits_in_parts_make_the_same_update, "7.15", 5),
                (checks_shared.the_start_stands_in_for_what_was_learnt, "7.16", 5),
            )
        ),
        *(
            _check(run, clause, level, cases="lora")
            for run, clause, level in (
                (checks_lora.updates_are_added_to_the_hosts_maps, "5.10", 2),
                (checks_lora.fresh_updates_change_nothing, "8.3", 2),
                (checks_lora.updates_are_decoded_with, "5.10", 3),
                (checks_lora.updates_have_the_right_gradients, "5.10", 4),
                (checks_lora.updates_are_trained, "5.10", 5),
            )
        ),
        _check(checks_checkpoint.tensors_come_back_byte_for_byte, "9.3", 6),
        _check(checks_checkpoint.stored_dtypes_are_rounded_once, "10.1", 6),
        _check(checks_checkpoint.a_checkpoint_gives_the_same_model, "9.6", 6),
        _check(checks_checkpoint.every_form_gives_the_same_model, "9.12", 6),
        *map(_golden, checks_golden.names()),
    )
}
