"""Two versions of Bridge against each other in one run: what a change costs, or gains.

    git worktree add ../before HEAD~1
    python benchmarks/trees.py ../before . [--backend torch] [--figures decode8,prefill]

Each tree has a process of its own, with the same checkpoint (SmolLM2-135M with blocks, unless one
is given), and they are asked in turn, the order reversed each round. Given are the medians over
rounds of the second tree's seconds to the first's: 1.03 is 3 % slower. The same tree twice, which
`--twice` adds, tells how far medians are from 1 by chance.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

PARTS = ("", "backends", "conformance", "cli")  # of a tree, where its packages are
PROMPT, STEPS = 128, 24  # tokens; timesteps
ROWS, TIMESTEPS = 8, 64  # of a training batch, in groups of four


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description="Two trees of Bridge, in turn.")
    parser.add_argument("trees", nargs=2, type=Path, metavar="TREE")
    parser.add_argument("--checkpoint", type=Path, help="one with blocks")
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--figures", default="decode1,decode8,prefill,logits,train,train-all")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--twice", action="store_true", help="the first tree a second time too")
    parser.add_argument("--out", type=Path, help="keep the figures as JSON here")
    options = parser.parse_args()
    trees = [tree.resolve() for tree in options.trees]
    for tree in trees:
        if not (tree / "bridge").is_dir():
            parser.error(f"{tree}: has no bridge/; give a checkout of Bridge")
    names = ["before", "after"]
    if options.twice:
        trees, names = [*trees, trees[0]], [*names, "before again"]
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        if options.checkpoint is None:
            from beside import make

            checkpoint = make(Path(scratch))
        else:
            checkpoint = options.checkpoint.resolve()  # each process works in its own tree
        children = [
            stack.enter_context(_start(tree, options.backend, checkpoint, options.dtype))
            for tree in trees
        ]
        figures = {
            figure: _measure(dict(zip(names, children, strict=True)), figure, options.rounds)
            for figure in options.figures.split(",")
        }
    if options.out is not None:
        _keep(figures, options)


def _start(tree: Path, backend: str, checkpoint: Path, dtype: str) -> "subprocess.Popen[str]":
    """A process that has the tree's own packages, whatever is installed."""
    path = os.pathsep.join(str(tree / part) for part in PARTS)
    return subprocess.Popen(
        [sys.executable, "-c", f"import trees; trees.answer({backend!r}, {dtype!r})"],
        env={
            **os.environ,
            "PYTHONPATH": path + os.pathsep + str(Path(__file__).parent),
            "CHECKPOINT": str(checkpoint),
        },
        cwd=tree,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _measure(
    children: "dict[str, subprocess.Popen[str]]", figure: str, rounds: int
) -> dict[str, Any]:
    """One figure: the seconds of all rounds but a first, which warms up, and ratios to `before`."""
    seconds: dict[str, list[float]] = {name: [] for name in children}
    for turn in range(rounds + 1):
        order = list(children.items())
        for name, child in order if turn % 2 else reversed(order):
            assert child.stdin is not None and child.stdout is not None
            print(figure, file=child.stdin, flush=True)
            line = child.stdout.readline()
            if not line:
                raise SystemExit(f"{name}: ended while it measured {figure}")
            if turn:
                seconds[name].append(float(line))
    ratios = {
        name: statistics.median(b / a for a, b in zip(seconds["before"], found, strict=True))
        for name, found in seconds.items()
        if name != "before"
    }
    said = ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items())
    print(f"{figure:10}  {said}   ({1000 * statistics.median(seconds['before']):.1f} ms before)")
    return {"ratios": ratios, "seconds": seconds}


def answer(backend: str, dtype: str) -> None:
    """In a tree's process: for each figure asked for, the seconds that it took once."""
    import numpy as np

    import bridge
    from bridge.contract import SFT, AdamW, Batch, Sampling

    model = bridge.load(os.environ["CHECKPOINT"], backend=backend, dtype=dtype).implementation
    random = np.random.default_rng(0)
    prompt = random.integers(0, model.config.vocab_size, PROMPT)
    tokens = random.integers(0, model.config.vocab_size, (ROWS, TIMESTEPS + 1))
    groups, mask = np.arange(ROWS) // 4, np.ones((ROWS, TIMESTEPS), bool)
    batch = Batch(tokens[:, :-1], groups, mask, tokens[:, 1:], mask)
    positions = np.broadcast_to(np.arange(TIMESTEPS), mask.shape)
    names = [name for name, _ in model.tensors()]
    blocks = [name for name in names if ".bridge." in name]
    trainers: dict[str, Any] = {}

    def decode(width: int) -> float:
        decoder = model.prefill([prompt], [width], STEPS + 1)
        decoder.sample(sampling)
        start = time.perf_counter()
        for _ in range(STEPS):
            decoder.advance()
            decoder.sample(sampling)
        return time.perf_counter() - start

    def train(which: list[str], name: str) -> float:
        if name not in trainers:
            trainers.clear()  # masters and moments of one at a time
            trainers[name] = model.trainer(SFT(), AdamW(lr=1e-6), which)
        return _timed(lambda: trainers[name].step(batch))

    sampling = Sampling(temperature=1.0, seed=0)
    figures: dict[str, Callable[[], float]] = {
        "decode1": lambda: decode(1),
        "decode8": lambda: decode(8),
        "decode16": lambda: decode(16),
        "prefill": lambda: _timed(lambda: model.prefill([prompt], [8], 8).sample(sampling)),
        "logits": lambda: _timed(lambda: model.logits(batch.tokens, groups, mask, positions)),
        "train": lambda: train(blocks, "train"),
        "train-all": lambda: train(names, "train-all"),
    }
    for line in sys.stdin:
        print(figures[line.strip()](), flush=True)


def _timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _keep(figures: dict[str, Any], options: argparse.Namespace) -> None:
    from record import record

    from bridge_cli.machine import processor

    results = {
        "machine": {"device": processor(), "cores": os.cpu_count()},
        "backend": options.backend,
        "dtype": options.dtype,
        "figures": figures,
    }
    record(results, f"trees-{options.backend}", options.out)


if __name__ == "__main__":
    main()
