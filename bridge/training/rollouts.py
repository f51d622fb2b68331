"""Problems in, groups of scored responses out; and what the decoder said of their tokens.

Sampling is at a temperature alone, so that the policy that samples is the one whose
log-probabilities are trained (clause 7.5). A reward that raises, hangs or is no number counts as 0
and is counted (`bridge.tasks.Scorer` sees to it); whoever else scores must do the same.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from bridge.decoding.events import Response, ResponseSet
from bridge.decoding.generation import answer
from bridge.decoding.memory import room_for
from bridge.errors import BridgeError
from bridge.model import Model
from bridge.numbers.rewards import equal, mean, reaches, std
from bridge.tasks import Problem, Scores, Task
from bridge.tasks.user_code import take_problems, take_size
from bridge.training.settings import Settings


@dataclass(frozen=True)
class Rollout:
    """The rows that answered one problem, and their rewards."""

    problem: Problem
    prompt: list[int]
    responses: list[Response]
    rewards: Float[np.ndarray, " N"]  # finite
    troubles: list[str]  # what went wrong with rewards, a line each

    @property
    def tokens(self) -> list[list[int]]:
        """Of each response, with the token that ended it."""
        return [response.tokens for response in self.responses]


def roll_out(
    model: Model,
    scorer: Scores,
    problems: Sequence[Problem],
    settings: Settings,
    seed: int,
    *,
    width: int | None = None,
    phase: Callable[[str], object] = lambda name: None,
) -> list[Rollout]:
    """Sample and score `width` responses a problem (None: the settings' width), in one group each.

    `seed` is of this call. `phase` hears `rollout` and `reward` as each begins. Raises BridgeError
    for a prompt that does not fit the context.
    """
    phase("rollout")
    sets = generate(model, [problem.prompt for problem in problems], settings, seed, width)
    phase("reward")
    texts = [r.text for answers in sets for r in answers.responses]
    widths = [len(answers.responses) for answers in sets]
    asked = [problem for problem, rows in zip(problems, widths, strict=True) for _ in range(rows)]
    scores = list(scorer.score(list(zip(asked, texts, strict=True))))
    rollouts = []
    for problem, answers in zip(problems, sets, strict=True):
        own, scores = scores[: len(answers.responses)], scores[len(answers.responses) :]
        values = [score.value if np.isfinite(score.value) else 0.0 for score in own]
        troubles = [
            score.problem or f"reward is {score.value}"
            for score in own
            if score.problem or not np.isfinite(score.value)
        ]
        rewards = np.array(values, np.float64)
        rollouts.append(
            Rollout(problem, answers.prompt_tokens, answers.responses, rewards, troubles)
        )
    return rollouts


def generate(
    model: Model, prompts: Sequence[Any], settings: Settings, seed: int, width: int | None = None
) -> list[ResponseSet]:
    """Responses by the settings, as `Model.generate` gives them. Rows alone say what is decoded at
    once on a CPU, where a run that was stopped ends with the same bytes: what is free does not."""
    requests = model.requests(
        list(prompts),
        width=settings.width if width is None else width,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        seed=seed,
        stop=settings.stop or None,
        chat=model.has_chat_template and not settings.raw,
        system=settings.system,
    )
    width, limit, room = requests[0].width, requests[0].max_new_tokens, None
    if model.device.startswith("cpu"):
        longest = max(len(request.tokens) for request in requests)
        groups = max(1, settings.max_rows // width)
        room = room_for(model.implementation, longest, width, limit, groups)
    return answer(model.engine(max_rows=settings.max_rows, cache_bytes=room), requests)


def summary(rollouts: Sequence[Rollout], threshold: float) -> dict[str, Any]:
    """Figures of scored responses: all rows count alike.

    `accuracy`: the fraction of rewards at `threshold` or above. `equal_groups`: those whose rewards
    are all equal up to rounding, which teach nothing. `bad_rewards`: rows whose reward failed and
    counts as 0, with the commonest failure as `bad_reward`.
    """
    rewards = np.concatenate([rollout.rewards for rollout in rollouts])
    lengths = np.array([len(tokens) for rollout in rollouts for tokens in rollout.tokens])
    cut = [r.finish_reason == "length" for rollout in rollouts for r in rollout.responses]
    troubles = Counter(trouble for rollout in rollouts for trouble in rollout.troubles)
    found = {
        "reward_mean": mean(rewards),
        "reward_std": std(rewards),
        "accuracy": float(reaches(rewards, threshold).mean()),
        "length_mean": float(lengths.mean()),
        "length_max": int(lengths.max()),
        "cut_off": float(np.mean(cut)),
        "equal_groups": sum(equal(rollout.rewards) for rollout in rollouts),
        "bad_rewards": troubles.total(),
    }
    if troubles:
        found["bad_reward"] = troubles.most_common(1)[0][0]
    return found


def decoder_logprobs(
    model: Model, prompt: Sequence[int], responses: Sequence[Sequence[int]], temperature: float
) -> list[Float[np.ndarray, " R"]]:
    """The log-probability that cached decoding gives to each token of a group's responses, float64.

    The group is decoded again with its tokens forced, all rows of it since they see each other. It
    costs one group's decoding; logits stay on the device (clause 6.10).
    """
    left = list(range(len(responses)))
    longest = max(len(response) for response in responses)
    decoder = model.implementation.prefill(
        [np.asarray(prompt, np.int64)], [len(responses)], longest
    )
    found: list[list[float]] = [[] for _ in responses]
    for step in range(longest):
        said = np.array([responses[row][step] for row in left], np.int64)
        lp = decoder.logprobs(said, temperature)
        for row, value in zip(left, lp, strict=True):
            found[row].append(float(value))
        keep = np.array([step + 1 < len(responses[row]) for row in left])
        left = [row for row in left if step + 1 < len(responses[row])]
        if not left:
            break
        decoder.advance(said, keep)
    return [np.array(values) for values in found]


def split_size(task: Task, split: str) -> int | None:
    """How many problems a split has; None: it is endless. Raises BridgeError for an empty one."""
    size = take_size(task, split)
    if size is not None and size < 1:
        raise BridgeError(f"task {task.name}: has no {split} problems")
    return size


def evaluate(
    model: Model, task: Task, scorer: Scores, settings: Settings, seed: int
) -> Mapping[str, Any]:
    """Figures on the first `eval_problems` validation problems, at the training width and
    temperature: the same problems and draws each time, so that two evaluations compare."""
    size = split_size(task, "validation")
    count = settings.eval_problems if size is None else min(size, settings.eval_problems)
    problems = take_problems(task, "validation", range(count))
    rollouts = roll_out(model, scorer, problems, settings, seed)
    found = summary(rollouts, getattr(task, "threshold", 1.0))
    return {"problems": count, **found}
