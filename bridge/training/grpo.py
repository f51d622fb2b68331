"""GRPO on groups whose rows see each other (clauses 7.5 and 7.6).

This variant, in short: one group a problem; advantages within the group, divided by its std or not
(Dr. GRPO); clipping by token, asymmetric; one mean over all targets of an update (DAPO);
log-probabilities at the sampling temperature; no dynamic sampling, but groups of equal rewards may
be left out, and so may rows that were cut off. `old` comes from the training forward, once a step
has more than one update; `ref` from the same model with the starting values of what is trained.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from bridge.contract import GRPO, Batch
from bridge.errors import BridgeError
from bridge.numbers.rewards import equal, scaled
from bridge.tasks.user_code import take_problems
from bridge.training.batches import Group, make_batch, pack
from bridge.training.loop import Run
from bridge.training.rollouts import (
    Rollout,
    decoder_logprobs,
    roll_out,
    split_size,
    summary,
)
from bridge.training.schedule import (
    MINIBATCHES,
    ROLLOUTS,
    learning_rate,
    permutation,
    problem_number,
    stream_seed,
)
from bridge.training.settings import GRPOSettings

AVERAGED = ("loss", "entropy", "clip_fraction", "kl")  # over the targets of a step's updates


class PolicySteps:
    """The steps of GRPO: each samples, scores, and learns."""

    def __init__(self, run: Run, settings: GRPOSettings, start: Mapping[str, np.ndarray]) -> None:
        """`start`: what is trained as it was at the start, in the policy that the KL penalty is to;
        not read where beta is 0."""
        assert run.task is not None
        self.run, self.settings, self.start = run, settings, start
        self.task, self.size = run.task, split_size(run.task, "train")
        self.threshold = getattr(run.task, "threshold", 1.0)

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.settings.steps

    def position(self, step: int) -> int:
        """Problems used before a step."""
        return step * self.settings.problems

    def step(self, step: int) -> dict[str, Any]:
        """One step; its figures."""
        settings, run = self.settings, self.run
        rollouts = self._roll_out(step)
        groups = self._groups(rollouts)
        figures = summary(rollouts, self.threshold)
        if settings.gap_every and step % settings.gap_every == 0:
            run.phases("gap")
            figures |= self._gap(groups[0])
        figures |= run.norms(step, groups)
        kept = [g for g in groups if self._kept(g)]
        minibatches = self._minibatches(kept, step)
        run.phases("update")
        lr = learning_rate(
            step, settings.steps, settings.lr, settings.schedule, settings.warmup, settings.lr_end
        )
        updates = [
            run.update(step, batches, lr) for _ in range(settings.epochs) for batches in minibatches
        ]
        seconds = run.phases.take()
        tokens = sum(len(response) for group in groups for response in group.responses)
        learnt = sum(update["tokens"] for update in updates)
        return {
            **figures,
            **({"idle_groups": sum(map(_idle, groups))} if settings.mask_truncated else {}),
            **_average(updates),
            "updates": len(updates),
            "dropped_groups": len(groups) - len(kept),
            "lr": lr,
            "rows": sum(group.rows for group in groups),
            "rollout_tokens_per_second": tokens / seconds["seconds_rollout"],
            "train_tokens_per_second": learnt / seconds["seconds_update"],
            **seconds,
        }

    def _roll_out(self, step: int) -> list[Rollout]:
        """The groups of a step: its problems and draws are a pure function of seed and step."""
        settings, run = self.settings, self.run
        first = self.position(step)
        numbers = [
            problem_number(self.size, settings.seed, first + i) for i in range(settings.problems)
        ]
        seed = stream_seed(settings.seed, ROLLOUTS, step)
        assert run.scorer is not None
        with run.interrupt.dropping():
            run.phases("problems")
            problems = take_problems(self.task, "train", numbers)
            return roll_out(run.model, run.scorer, problems, settings, seed, phase=run.phases)

    def _groups(self, rollouts: Sequence[Rollout]) -> list[Group]:
        """What is learnt from: the rows with their advantages."""
        rewards = np.concatenate([rollout.rewards for rollout in rollouts])
        numbers = np.repeat(np.arange(len(rollouts)), [len(r.rewards) for r in rollouts])
        advantages = group_advantages(rewards, numbers, self.settings.normalise_std)
        for row in np.flatnonzero(np.abs(advantages) > np.finfo(np.float32).max):
            raise BridgeError(
                f"problem {rollouts[numbers[row]].problem.number}: its rewards, such as "
                f"{rewards[row]:g}, are too far apart for advantages in float32 without "
                "normalise_std; scale the reward down, or leave normalise_std true"
            )
        return [
            Group(
                r.prompt,
                r.tokens,
                advantages[numbers == i],
                f"problem {r.problem.number}",
                self._learnt(r),
            )
            for i, r in enumerate(rollouts)
        ]

    def _learnt(self, rollout: Rollout) -> np.ndarray | None:
        """The rows that were not cut off, where those that were are left out (clause 7.13)."""
        if not self.settings.mask_truncated:
            return None
        return np.array([response.finish_reason != "length" for response in rollout.responses])

    def _kept(self, group: Group) -> bool:
        """Whether a group is in the batch: one without a target cannot be."""
        has_target = group.learnt is None or group.learnt.any()
        return bool(has_target and (not self.settings.drop_equal or np.any(group.advantages)))

    def _minibatches(self, groups: list[Group], step: int) -> list[list[Batch]]:
        """The micro-batches of each update of an epoch, with `old` and `ref` where needed."""
        settings, run = self.settings, self.run
        if not groups:
            return []
        run.phases("logprobs")
        order = permutation(len(groups), settings.seed, MINIBATCHES, step)
        parts = np.array_split(order, min(settings.minibatches, len(groups)))
        packed = [pack([groups[i] for i in p], settings.micro_batch_tokens) for p in parts]
        if len(packed) * settings.epochs > 1:
            packed = [[self._with(batch, "old_logprobs") for batch in part] for part in packed]
        if settings.beta:
            with run.model.swapped(self.start):
                packed = [[self._with(batch, "ref_logprobs") for batch in part] for part in packed]
        return packed

    def _with(self, batch: Batch, field: str) -> Batch:
        return replace(batch, **{field: self.run.model.logprobs(batch, self.settings.temperature)})

    def _gap(self, group: Group) -> dict[str, float]:
        """How far the decoder's log-probabilities of a group are from those that are trained: mean
        and largest difference over its tokens."""
        model, temperature = self.run.model, self.settings.temperature
        batch = make_batch([replace(group, learnt=None)])
        trained = model.logprobs(batch, temperature)[batch.target_mask]
        decoded = decoder_logprobs(model, group.prompt, group.responses, temperature)
        gap = np.abs(np.concatenate(decoded) - trained)
        return {"logprob_gap": float(gap.mean()), "logprob_gap_max": float(gap.max())}


def group_advantages(
    rewards: Float[np.ndarray, " B"], groups: Int[np.ndarray, " B"], normalise_std: bool = True
) -> Float[np.ndarray, " B"]:
    """`A = (r - mean r) / std r` over each group, std of the population, nothing added to it
    (clause 7.6); in float64.

    A group whose rewards are equal up to rounding gets exactly 0. `normalise_std=False` leaves the
    division out (Dr. GRPO). Rewards and their spread may be of any size. Raises BridgeError for a
    reward that is not finite.
    """
    rewards = np.asarray(rewards, np.float64)
    for row in np.flatnonzero(~np.isfinite(rewards)):
        raise BridgeError(
            f"reward {rewards[row]} of row {row} is not finite; mend the reward (clause 7.6)"
        )
    advantages = np.zeros_like(rewards)
    for group in np.unique(groups):
        rows = groups == group
        if equal(rewards[rows]):
            continue
        r, exponent = scaled(rewards[rows])
        spread = r.max() - r.min()
        apart = (r - r.min()) / spread  # in [0, 1]: squares of a tiny spread would vanish
        centred = apart - apart.mean()
        with np.errstate(over="ignore"):  # of rewards near its end
            unscaled = np.ldexp(centred * spread, exponent)
        advantages[rows] = centred / apart.std() if normalise_std else unscaled
    return advantages


def objective(settings: GRPOSettings) -> GRPO:
    """What a step's updates improve."""
    return GRPO(settings.eps_low, settings.eps_high, settings.beta, settings.temperature)


def _idle(group: Group) -> bool:
    """Whether no row of a group teaches: equal rewards, or cut off."""
    assert group.advantages is not None
    return not np.any(group.advantages if group.learnt is None else group.advantages[group.learnt])


def _average(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """Metrics of a step from those of its updates: means over targets, and of gradient norms."""
    tokens = sum(update["tokens"] for update in updates)
    found = {
        name: sum(update[name] * update["tokens"] for update in updates) / tokens
        for name in AVERAGED
        if updates and name in updates[0]
    }
    if updates:
        found["grad_norm"] = float(np.mean([update["grad_norm"] for update in updates]))
    return {**found, "tokens": tokens}
