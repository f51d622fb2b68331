"""The experiment: pretrain a base, then three arms from it at equal data and steps.

    python experiments/replication/run.py runs --seed 0 --seed 1

Each stage leaves a directory, and is not done again where that is there; a stage that was stopped
goes on. Arms: `bridge`, `pmatch` (an MLP of equal size in the same places) and `rlvr` (no block).
The first two have a warm-up of their new parameters; then all parameters of each learn from
rewards, on the same problems in the same order.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from base import Size, pretrain, write_fresh

import bridge
from bridge.evaluation.batches import Decoding
from bridge.evaluation.evaluate import evaluate
from bridge.evaluation.summary import report
from bridge.initialise import init
from bridge.tasks import find_task
from bridge.tasks.search import OperatorSearch
from bridge.training import GRPOSettings, SFTSettings, train

TASK = "bridge.tasks.search:operator_search"
ARMS = {"bridge": "attention", "pmatch": "mlp", "rlvr": None}


@dataclass(frozen=True)
class Plan:
    """What is run; everything but the seed."""

    modulus: int = 19
    trials: int = 2
    size: Size = field(default_factory=Size)
    pretrain_steps: int = 2000
    pretrain_rows: int = 128
    heads: int = 2
    head_dim: int = 10
    warm_problems: int = 1024
    warm_epochs: int = 4
    warm_groups: int = 32
    warm_width: int = 4
    warm_lr: float = 2e-3
    steps: int = 300
    problems: int = 32
    width: int = 8
    lr: float = 7e-5
    test_problems: int = 300
    test_widths: tuple[int, ...] = (1, 2, 4, 8, 16)

    @property
    def new_tokens(self) -> int:
        """Of a response: its trials, the mark, the answer, and the end."""
        return 7 * self.trials + 5


def run_seed(root: Path, plan: Plan, seed: int) -> None:
    """All stages of one seed, in `root/seed-N`."""
    here = root / f"seed-{seed}"
    here.mkdir(parents=True, exist_ok=True)
    task = find_task(TASK, modulus=plan.modulus, seed=seed)
    assert isinstance(task, OperatorSearch)
    said = json.dumps({"seed": seed, **asdict(plan)}, indent=2)
    (here / "plan.json").write_text(said + "\n")
    if not (here / "fresh").exists():
        write_fresh(here / "fresh", task, plan.size, seed)
    if not (here / "base").exists():
        start = time.monotonic()
        pretrain(
            here / "fresh",
            here / "base",
            task,
            steps=plan.pretrain_steps,
            rows=plan.pretrain_rows,
            trials=plan.trials,
            seed=seed,
            note=lambda step, loss: _say(here, "pretrain", step, loss, start),
        )
    for arm, kind in ARMS.items():
        trained = train_arm(here, plan, seed, arm, kind)
        test(here, plan, task, arm, trained)


def train_arm(here: Path, plan: Plan, seed: int, arm: str, kind: str | None) -> Path:
    """Warm-up, if there is something to warm up, and GRPO; the final checkpoint."""
    common: dict[str, Any] = {
        "task": TASK,
        "task_options": {"modulus": plan.modulus, "seed": seed},
        "backend": "torch",
        "seed": seed,
        "max_new_tokens": plan.new_tokens,
        "save_every": 100,
        "eval_every": 0,
        "raw": True,
    }
    start = here / "base"
    if kind is not None:
        begun = here / f"{arm}-fresh"
        if not begun.exists():
            init(start, begun, heads=plan.heads, head_dim=plan.head_dim, kind=kind, seed=seed)
        warm = SFTSettings(
            checkpoint=str(begun),
            out=str(here / f"{arm}-warm"),
            problems=plan.warm_problems,
            samples=8,
            width=plan.warm_width,
            groups=plan.warm_groups,
            epochs=plan.warm_epochs,
            lr=plan.warm_lr,
            trainable=("bridge",),
            **common,
        )
        train(warm)
        start = here / f"{arm}-warm" / "final"
    settings = GRPOSettings(
        checkpoint=str(start),
        out=str(here / f"{arm}-grpo"),
        steps=plan.steps,
        problems=plan.problems,
        width=plan.width,
        lr=plan.lr,
        schedule="cosine",  # at a constant rate every arm unlearns its arithmetic after 200 steps
        eps_high=0.2,
        trainable=("all",),
        **common,
    )
    train(settings)
    return here / f"{arm}-grpo" / "final"


def test(here: Path, plan: Plan, task: OperatorSearch, arm: str, trained: Path) -> None:
    """Held-out problems at every width, in `ARM-test`."""
    found = evaluate(
        bridge.load(trained, backend="torch"),
        task,
        widths=plan.test_widths,
        problems=plan.test_problems,
        decoding=Decoding(max_new_tokens=plan.new_tokens, chat=False),
        directory=here / f"{arm}-test",
        name=arm,
    )
    said = report(found).to_json()
    (here / f"{arm}.json").write_text(json.dumps(said, indent=1) + "\n")


def _say(here: Path, stage: str, step: int, loss: float, start: float) -> None:
    if step % 100 == 0:
        with (here / "log.txt").open("a") as file:
            file.write(f"{stage} {step} loss {loss:.4f} {time.monotonic() - start:.0f} s\n")


def main(
    out: Path,
    seed: Annotated[list[int] | None, typer.Option(help="A run each; 0 if none is given.")] = None,
) -> None:
    """Run the experiment in OUT, or go on with it."""
    for number in seed or [0]:
        run_seed(out, Plan(), number)


if __name__ == "__main__":
    typer.run(main)
