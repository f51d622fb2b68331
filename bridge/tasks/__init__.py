"""What models are asked, and what their responses are worth: tasks, rewards, a safe place to score.

    task = find_task("reasoning-gym:countdown", min_numbers=3, max_numbers=3)
    with Scorer(task) as scorer:
        [score] = scorer.score([(task.problem("test", 0), "<answer>3 + 4</answer>")])

In: names of tasks and their options, responses as texts. Out: problems, and scores. A task is of
reasoning-gym (`gym`), of a file (`jsonl`), drawn (`search`, `guess`, `chain`) or a user's own; what
scores runs in processes of its own (`scorer`). Knows nothing of models.
"""

from bridge.tasks.find import find_task
from bridge.tasks.problem import SPLITS, Problem, Score, Scores, Task
from bridge.tasks.scorer import Scorer

__all__ = ["SPLITS", "Problem", "Score", "Scorer", "Scores", "Task", "find_task"]
