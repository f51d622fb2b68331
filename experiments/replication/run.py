"""The experiment: pretrain a base, then arms from it at equal data and steps, and test each.

    python experiments/replication/run.py runs --task search --seed 0 --seed 1

Each stage leaves a directory, and is not done again where that is there; a stage that was stopped
goes on. Arms: `bridge`, `pmatch` (an MLP of equal size in the same places) and `rlvr` (no block).
The first two have a warm-up of their new parameters; then all parameters of each learn from
rewards, on the same problems in the same order. `--arm` names others: the ablations of plans.py.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from ablations import changed
from base import pretrain, write_fresh
from plans import ABLATIONS, ARMS, CHANGED, PLANS, Arm, Plan

import bridge
from bridge.checkpoints.initialise import init
from bridge.errors import BridgeError
from bridge.evaluation.batches import Decoding
from bridge.evaluation.evaluate import evaluate
from bridge.evaluation.summary import report
from bridge.files.atomic import new_file
from bridge.tasks import find_task
from bridge.tasks.synthetic import Synthetic
from bridge.training import GRPOSettings, Settings, SFTSettings, train


def run_seed(here: Path, plan: Plan, seed: int, arms: dict[str, Arm]) -> None:
    """All stages of one seed, in the directory `here`."""
    here.mkdir(parents=True, exist_ok=True)
    task = find_task(plan.task, **plan.options, seed=seed)
    assert isinstance(task, Synthetic)
    _agree(here / "plan.json", {"seed": seed, **asdict(plan)})
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
            demonstration=plan.demonstration,
            seed=seed,
            note=lambda step, loss: _say(here, "pretrain", step, loss, start),
        )
    for name, arm in arms.items():
        with changed(arm.mixing):
            trained = train_arm(here, plan, seed, name, arm)
            test(here, plan, task, name, trained)


def train_arm(here: Path, plan: Plan, seed: int, name: str, arm: Arm) -> Path:
    """Warm-up, if there is something to warm up, and GRPO; the final checkpoint."""
    common: dict[str, Any] = {
        "task": plan.task,
        "task_options": {**plan.options, "seed": seed},
        "backend": "torch",
        "seed": seed,
        "max_new_tokens": plan.new_tokens,
        "save_every": 100,
        "eval_every": 0,
        "raw": True,
    }
    start = here / "base"
    if arm.kind is not None:
        begun = here / f"{name}-fresh"
        if not begun.exists():
            layers = range(0, plan.size.layers, 2) if arm.half else range(plan.size.layers)
            init(
                start,
                begun,
                heads=plan.heads,
                head_dim=plan.head_dim,
                kind=arm.kind,
                layers=list(layers),
                seed=seed,
            )
        start = begun
    if arm.kind is not None and arm.warm_up:
        warm = SFTSettings(
            checkpoint=str(start),
            out=str(here / f"{name}-warm"),
            problems=plan.warm_problems,
            samples=plan.warm_samples,
            width=plan.warm_width,
            groups=plan.warm_groups,
            epochs=plan.warm_epochs,
            lr=plan.warm_lr,
            schedule=plan.warm_schedule,
            trainable=("bridge",),
            **common,
        )
        start = _trained(warm)
    settings = GRPOSettings(
        checkpoint=str(start),
        out=str(here / f"{name}-grpo"),
        steps=plan.steps,
        problems=plan.problems,
        width=plan.width,
        lr=plan.lr,
        schedule="cosine",  # at a constant rate rewards fall again after 200 steps
        eps_high=0.2,
        trainable=("all",),
        **common,
    )
    return _trained(settings)


def test(here: Path, plan: Plan, task: Synthetic, name: str, trained: Path) -> None:
    """Held-out problems at every width, in `ARM-test`; the figures in `ARM.json`."""
    if (here / f"{name}.json").exists():
        return
    found = evaluate(
        bridge.load(trained, backend="torch"),
        task,
        widths=plan.test_widths,
        problems=plan.test_problems,
        decoding=Decoding(max_new_tokens=plan.new_tokens, chat=False),
        directory=here / f"{name}-test",
        name=name,
    )
    _write(here / f"{name}.json", report(found).to_json())


def _trained(settings: Settings) -> Path:
    """The final checkpoint of a run, which is made, or gone on with, unless it is there: a seed
    that is done may be moved."""
    final = Path(settings.out) / "final"
    if not final.exists():
        train(settings)
    return final


def _agree(path: Path, plan: dict[str, Any]) -> None:
    """Write down what is run, or hold it against what was. Raises BridgeError where it differs."""
    found = json.loads(path.read_text()) if path.exists() else {}
    wanted = json.loads(json.dumps(plan))
    for key in found.keys() & wanted.keys():
        if found[key] != wanted[key]:
            raise BridgeError(
                f"{path}: {key} is {found[key]!r}, and now {wanted[key]!r}; run elsewhere"
            )
    _write(path, wanted)


def _write(path: Path, said: Any) -> None:
    """Whole or not at all."""
    with new_file(path) as file:
        file.write(f"{json.dumps(said, indent=1)}\n".encode())


def _say(here: Path, stage: str, step: int, loss: float, start: float) -> None:
    if step % 100 == 0:
        with (here / "log.txt").open("a") as file:
            file.write(f"{stage} {step} loss {loss:.4f} {time.monotonic() - start:.0f} s\n")


def main(
    out: Path,
    task: Annotated[str, typer.Option(help=f"One of {', '.join(PLANS | CHANGED)}.")] = "search",
    seed: Annotated[list[int] | None, typer.Option(help="A run each; 0 if none is given.")] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(help=f"Of {', '.join([*ARMS, *ABLATIONS])}; the first three if none."),
    ] = None,
) -> None:
    """Run the experiment in OUT/TASK/seed-N, or go on with it."""
    known, plans = ARMS | ABLATIONS, PLANS | CHANGED
    try:
        if task not in plans:
            raise BridgeError(f"task {task!r} is not known; use one of {', '.join(plans)}")
        if unknown := [name for name in arm or [] if name not in known]:
            raise BridgeError(f"arm {unknown[0]!r} is not known; use one of {', '.join(known)}")
        for number in seed or [0]:
            arms = {name: known[name] for name in arm or ARMS}
            run_seed(out / task / f"seed-{number}", plans[task], number, arms)
    except BridgeError as error:
        typer.echo(error, err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
