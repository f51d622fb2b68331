"""All checks, with the clause that each holds a backend to and the cases that it runs on.

To run one on one case: `CHECKS[name].run(Target(backend, device, dtype, clause), case)`; it raises
`Nonconformance` where the backend breaks the clause.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis.strategies import SearchStrategy

from bridge_conformance import checks_block, checks_decode, checks_model, checks_train, strategies
from bridge_conformance.trial import Target


@dataclass(frozen=True)
class Check:
    """A property: `run(target, case)` for every case that `cases` draws."""

    run: Callable[[Target, Any], None]
    clause: str
    cases: SearchStrategy[Any]

    @property
    def name(self) -> str:
        """The function's name, which says the property."""
        return self.run.__name__


_block, _rows = strategies.block_cases(), strategies.rows_cases()
_decode, _train = strategies.decode_cases(), strategies.train_cases()
_attention = strategies.block_cases(kinds=("attention",))

CHECKS: dict[str, Check] = {
    check.name: check
    for check in (
        Check(checks_block.block_is_within_the_numerics_rule, "3.6", _block),
        Check(checks_block.permuting_rows_permutes_the_block, "3.8", _block),
        Check(checks_block.blocked_rows_have_no_influence_on_the_block, "3.4", _block),
        Check(checks_block.repeating_rows_changes_nothing, "3.8", _block),
        Check(checks_block.width_one_adds_the_rows_own_value, "3.8", _attention),
        Check(checks_block.identical_rows_give_the_width_one_result, "3.8", _block),
        Check(checks_block.timesteps_do_not_mix_in_the_block, "3.3", _block),
        Check(checks_model.logits_are_within_the_numerics_rule, "10.2", _rows),
        Check(checks_model.fresh_blocks_are_the_identity, "3.8", _rows),
        Check(checks_model.permuting_rows_permutes_the_logits, "3.8", _rows),
        Check(checks_model.group_numbers_are_only_names, "2.2", _rows),
        Check(checks_model.other_groups_have_no_influence, "3.8", _rows),
        Check(checks_model.inactive_cells_have_no_influence, "2.3", _rows),
        Check(checks_model.repeating_rows_changes_no_logits, "3.8", _rows),
        Check(checks_model.no_future_timestep_influences_an_earlier_one, "3.8", _rows),
        Check(checks_model.tensors_come_back_byte_for_byte, "9.3", strategies.models()),
        Check(checks_decode.cached_decoding_equals_teacher_forcing, "4.1", _decode),
        Check(checks_decode.a_prompt_is_prefilled_once_for_its_group, "4.2", _decode),
        Check(checks_decode.ended_rows_leave_other_groups_unchanged, "4.3", _decode),
        Check(checks_decode.what_was_sampled_is_what_is_fed, "10.1", _decode),
        Check(checks_decode.sampled_tokens_follow_the_rule, "6.7", _decode),
        Check(checks_train.loss_and_gradients_are_within_the_numerics_rule, "7.4", _train),
        Check(checks_train.training_steps_are_within_the_numerics_rule, "7.8", _train),
        Check(checks_train.accumulated_batches_are_one_update, "7.10", _train),
        Check(checks_train.computing_layers_again_changes_no_update, "7.11", _train),
        Check(checks_train.gradients_stay_within_a_group, "7.3", _train),
        Check(checks_train.a_restored_trainer_goes_on_as_if_never_stopped, "7.9", _train),
    )
}
